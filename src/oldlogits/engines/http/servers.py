"""What is known of a server: its process, what runs on it, and how long to wait for it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Literal, Protocol

from oldlogits.engines.http.client import Server, ServerInfo
from oldlogits.engines.spec import Incident


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """How long to wait for what.

    Args:
        recover_s: Without any server.
        request_s: For one answer; then the request is cut and sent again with what it has.
        control_s: For a control call.
        start_s: For a server that was started.
        poll_s: Between two looks at a server.
        max_restarts: Of the servers that the run starts, in all.
    """

    recover_s: float = 300.0
    request_s: float = 600.0
    control_s: float = 60.0
    start_s: float = 300.0
    poll_s: float = 1.0
    max_restarts: int = 5


@dataclass(slots=True, kw_only=True, eq=False)
class Attempt:
    """A request as one server has it.

    Args:
        id: The server's name for it.
        version: That the server had when it was sent.
        num_kept: Output tokens that earlier attempts sampled.
        cut: Set when its server counts as down.
        ended: Set when it is over.
        why: Why it was aborted, if it was: to be sent again, or for good.
        running_s: How long it has run, pauses not counted.
    """

    id: str
    version: int
    num_kept: int
    cut: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    why: Literal["", "resubmit", "end"] = ""
    running_s: float = 0.0


class Launched(Protocol):
    """The process of a server that the run starts."""

    @property
    def exit_code(self) -> int | None:
        """None while it lives."""
        ...

    @property
    def where(self) -> str:
        """Where to look for what it said."""
        ...

    async def ready(self, server: Server, start_s: float) -> None:
        """Wait until it answers.

        Raises:
            ServerFailedError: It ended, or takes longer than `start_s`.
        """
        ...

    def restart(self) -> None:
        """End what is left of it and start it again."""
        ...

    def close(self) -> None:
        """End it and whatever it has started."""
        ...


@dataclass(slots=True, kw_only=True, eq=False)
class Host:
    """A server and what is known of it.

    Args:
        server: Speaks to it.
        launched: Its process, if the run started it.
        info: What it said when it was connected last.
        is_up: Whether it gets requests.
        is_new: Whether it joined a fleet that runs already, and was not up yet.
        is_broken: Whether its process, if the run started it, must be started again before it can be taken back.
        done: What was done to take it back, since it went down.
        attempts: What runs on it.
        answered_at: When it last answered a request; seconds of the monotonic clock.
        num_misses: Health checks in a row without an answer.
        num_sampled: Tokens that it has sampled since it started, as it said at the last look; None: it does not say.
        num_received: Those of them that have arrived here, and those of before it was connected.
    """

    server: Server
    launched: Launched | None = None
    info: ServerInfo | None = None
    is_up: bool = False
    is_new: bool = False
    is_broken: bool = False
    done: list[str] = field(default_factory=list)
    attempts: set[Attempt] = field(default_factory=set)
    answered_at: float = 0.0
    num_misses: int = 0
    num_sampled: int | None = None
    num_received: int | None = None

    def receive(self, num_tokens: int) -> None:
        """An answer has arrived."""
        if self.num_received is not None:
            self.num_received += num_tokens

    def goes_down(self, reason: str, *, is_failure: bool) -> Incident:
        """What its end interrupts."""
        sampled, received = self.num_sampled, self.num_received
        return Incident(
            what="down",
            server=self.server.url,
            reason=reason,
            is_failure=is_failure,
            num_requests=len(self.attempts),
            num_kept_tokens=sum(attempt.num_kept for attempt in self.attempts),
            num_lost_tokens=None if sampled is None or received is None else max(0, sampled - received),
        )
