"""A server of a run, and what is known of it: its process, what runs on it, what it has sampled."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Literal, Protocol

from oldlogits.core.engine import EngineSpec
from oldlogits.core.engine_stats import Incident
from oldlogits.core.errors import ConfigError
from oldlogits.core.server import ServerInfo, ServerProtocol


@dataclass(slots=True, kw_only=True, eq=False)
class Attempt:
    """A request as one server has it.

    Args:
        id: The server's name for the request.
        version: The version that the server had when it was sent.
        num_kept: Output tokens that earlier attempts sampled.
        cut: Set when its server counts as down.
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

    @property
    def where(self) -> str:
        """Where to look for what it said."""

    async def ready(self, server: ServerProtocol, start_s: float) -> None:
        """Wait until it answers; raises `ServerFailedError` if it ended, or takes longer than `start_s`."""

    def restart(self) -> None:
        """End what is left of it and start it again."""

    def close(self) -> None:
        """End it and whatever it has started."""


@dataclass(slots=True, kw_only=True, eq=False)
class Replica:
    """A server that holds a copy of the model, and what is known of it.

    Args:
        is_new: Whether it joined a fleet that runs already, and was not up yet.
        is_broken: Whether its process, if the run started it, must be started again before it can be taken back.
        done: What was done to take it back, since it went down.
        answered_at: When it last answered a request; seconds of the monotonic clock.
        num_misses: Health checks in a row without an answer.
        num_sampled: Tokens that it has sampled since it started, as it said at the last look; None: it does not say.
        num_received: How many of them have arrived here, and those of before it was connected.
    """

    server: ServerProtocol
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

    def check_fit(self, info: ServerInfo, spec: EngineSpec) -> None:
        """Refuse a server whose numerics, adapters or context are not those that the run needs."""
        url, scale = self.server.url, repr(spec.adapter_scale)
        if info.numerics != spec.numerics:
            raise ConfigError(
                f"the server {url} has other numerics than the recipe",
                got=f"{info.numerics}, engine.precision = '{spec.numerics}'",
                allowed="the same",
                fix=f"set engine.precision = '{info.numerics}', or start the server with others",
            )
        if info.adapter_scale != spec.adapter_scale:
            raise ConfigError(
                f"the server {url} takes other weights than this run sends",
                got=f"adapters scaled by {info.adapter_scale!r}, here {scale} (lora_alpha / lora_rank; 0: whole weights)",
                allowed="the same",
                fix=f"start it with {self.server.flag('adapter_scale', scale)}",
            )
        if info.max_context < spec.max_context:
            raise ConfigError(
                f"the server {url} has too short a context",
                got=f"{info.max_context} tokens",
                allowed=f">= env.max_episode_tokens = {spec.max_context}",
                fix=f"start it with {self.server.flag('max_context', str(spec.max_context))}",
            )

        if spec.returns_routing and not info.returns_routing:
            raise ConfigError(
                f"the server {url} does not say which experts it chose",
                got="an answer without routing, and model.routing is not 'off'",
                allowed="the experts of every token that it reads",
                fix="start it with --enable-return-routed-experts, or set model.routing = 'off'",
            )

    async def close(self) -> None:
        """End its process, if the run started it, and leave no connection."""
        if self.launched is not None:
            self.launched.close()
        await self.server.close()

    def go_down(self, reason: str, *, is_failure: bool) -> Incident:
        """Cut what runs on it; returns what its end interrupts."""
        self.is_up, self.is_broken, self.num_misses = False, True, 0
        for attempt in self.attempts:
            attempt.cut.set()
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
