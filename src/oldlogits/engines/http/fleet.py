"""The servers that sample: who is up, who gets the next request, and what happens to the requests of one that fails.

              found dead, hung, or with weights of no version of this run: `Fleet.fail`
    up  ------------------------------------------------------------------------------>  down
     ^    its requests are cut: each is sent again as prompt + what was kept of it          |
     '-- connect, current weights, the last probe again <-- restart, if it is ours ---------'    supervision.py

As long as one is up the run goes on; a weight update needs none, since a server that comes back is given the current weights
before it samples.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Literal

from oldlogits.core.engine import PauseMode, Timeouts
from oldlogits.core.engine_stats import Incident
from oldlogits.core.errors import ConfigError, WorkerDiedError
from oldlogits.core.server import ServerFailedError, ServerProtocol, SharedWeights
from oldlogits.engines.http.replica import Attempt, Replica

HEALTH_TIMEOUT_S: Final = 10.0
"""How long a server may take to say that it is well."""
ABORT_AGAIN_S: Final = 0.25
"""After which an abort is sent again to requests that go on."""
SLACK: Final = 4
"""Requests that a server may have above the least busy one and still get the next turns of its trajectories."""


class Fleet:
    """Several servers as one."""

    def __init__(self, replicas: Sequence[Replica], timeouts: Timeouts) -> None:
        self.replicas, self._timeouts = list(replicas), timeouts
        self.listen: Callable[[Incident], None] = lambda incident: None
        self.paused = False
        self.lock = asyncio.Lock()  # who talks to servers about weights
        self.death: WorkerDiedError | None = None
        self.last_failure = ""
        self._changed = asyncio.Condition()

    @property
    def up(self) -> list[Replica]:
        """The servers that get requests."""
        return [replica for replica in self.replicas if replica.is_up]

    @property
    def num_running(self) -> int:
        """Requests that servers have."""
        return sum(len(replica.attempts) for replica in self.replicas)

    async def choose(self, *, spread: int | None = None, before: Replica | None = None) -> Replica:
        """The server for the next request: that with the fewest; waits while none is up or all are paused.

        Args:
            spread: Instead: the server of this number, modulo how many are up.
            before: The one that had the trajectory's last turn, and its keys and values: it goes first unless it has more
                than `SLACK` requests above the fewest.
        """
        async with self._changed:
            await self._changed.wait_for(lambda: self.death is not None or (self.up and not self.paused))
        if self.death is not None:
            raise copy.copy(self.death)
        up = self.up
        if spread is not None:
            return up[spread % len(up)]
        idlest = min(up, key=lambda replica: len(replica.attempts))
        near = before is not None and before.is_up and len(before.attempts) <= len(idlest.attempts) + SLACK
        return before if near and before is not None else idlest

    def add(self, replica: Replica) -> None:
        """A server joins: it gets requests as soon as it is ready and has the current weights."""
        replica.is_new = True
        self.replicas.append(replica)

    async def remove(self, replica: Replica) -> None:
        """A server leaves: what runs on it is sent again to others."""
        self.fail(replica, "it was asked to leave", is_failure=False)
        self.replicas.remove(replica)
        await replica.close()

    async def pause(self, mode: PauseMode) -> None:
        """Pause all that are up."""
        async with self.lock:
            self.paused = True
            await self._all(lambda server: server.pause(mode))

    async def resume(self) -> None:
        """Let them go on."""
        async with self.lock:
            await self._all(lambda server: server.resume())
            self.paused = False
        await self.notify()

    async def update(self, weights: SharedWeights) -> None:
        """Give weights to all that are up; the caller has the lock."""
        await self._all(lambda server: server.update(weights))

    async def abort(self, why: Literal["resubmit", "end"], attempts: Sequence[Attempt]) -> None:
        """End attempts and wait until they are over; a server that does not do it counts as down."""
        for attempt in attempts:
            attempt.why = attempt.why or why
        await asyncio.gather(*(self._abort(replica, [a for a in attempts if a in replica.attempts]) for replica in self.up))

    async def _abort(self, replica: Replica, attempts: list[Attempt]) -> None:
        if not attempts:
            return
        try:
            async with asyncio.timeout(self._timeouts.control_s):
                while running := [attempt for attempt in attempts if not attempt.ended.is_set()]:
                    await replica.server.abort([attempt.id for attempt in running])
                    await _within(ABORT_AGAIN_S, running)  # one that had not arrived yet was not aborted
        except (ServerFailedError, TimeoutError) as failure:
            self.fail(replica, f"it does not abort a request: {failure or 'no answer'}")

    async def suspect(self, replica: Replica, reason: str) -> None:
        """A request to a server failed: is it the server's end, or did a connection break, or is it only slow?"""
        if not replica.is_up:
            return
        try:
            await replica.server.check_health(HEALTH_TIMEOUT_S)
        except ServerFailedError as failure:
            if not failure.timed_out:  # else it has as many tries as it has without that request
                self.fail(replica, reason)

    def fail(self, replica: Replica, reason: str, *, is_failure: bool = True) -> None:
        """A server counts as down: what ran on it is sent again, and it is taken back when it is well."""
        self.last_failure = f"{replica.server.url}: {reason}"
        if replica.is_up:
            self.listen(replica.go_down(reason, is_failure=is_failure))

    async def notify(self) -> None:
        """Let those who wait for a server look again."""
        async with self._changed:
            self._changed.notify_all()

    async def close(self) -> None:
        """Leave no connection and no process."""
        for replica in self.replicas:
            await replica.close()

    async def _all(self, call: Callable[[ServerProtocol], Awaitable[None]]) -> None:
        """Call every server that is up; those that fail count as down."""

        async def one(replica: Replica) -> None:
            try:
                await call(replica.server)
            except (ServerFailedError, ConfigError) as failure:
                self.fail(replica, str(failure))

        await asyncio.gather(*map(one, self.up))


async def _within(seconds: float, attempts: Sequence[Attempt]) -> None:
    """Wait until all attempts are over, but not for long."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            for attempt in attempts:
                await attempt.ended.wait()
