"""Watches the servers of a run: connects them, finds those that fail, and takes them back when they are well.

The rule of the end: the run ends when no server has been up for `recover_s` seconds, or when servers that were started by
the run have used up their restarts and none is up.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Final

from oldlogits.core.engine import EngineSpec, Timeouts
from oldlogits.core.engine_stats import Incident
from oldlogits.core.errors import ConfigError, WorkerDiedError
from oldlogits.core.server import ServerFailedError, ServerProtocol
from oldlogits.engines.http.fleet import HEALTH_TIMEOUT_S, Fleet
from oldlogits.engines.http.replica import Launched, Replica

MISSES: Final = 3
"""Health checks in a row without an answer after which a server counts as hung."""


class Supervisor:
    """Keeps a fleet up.

    Args:
        spec: What the run needs; a server that does not fit it is refused.
        supply: Gives a server that is up again the current weights, and checks that it holds them; returns what it did.
    """

    def __init__(
        self,
        fleet: Fleet,
        spec: EngineSpec,
        timeouts: Timeouts,
        *,
        supply: Callable[[ServerProtocol], Awaitable[str]],
    ) -> None:
        self._fleet, self._spec, self._timeouts, self._supply = fleet, spec, timeouts, supply
        self._seen_up_at = time.monotonic()
        self._num_restarts = 0

    async def start(self) -> None:
        """Connect to all servers, once; all must answer, and be able to do what training needs."""
        await asyncio.gather(*map(self._start, self._fleet.replicas))
        self._seen_up_at = time.monotonic()

    async def _start(self, replica: Replica) -> None:
        try:
            if replica.launched is not None:
                await replica.launched.ready(replica.server, self._timeouts.start_s)
            await self._connect(replica)
            replica.num_sampled = replica.num_received = await replica.server.num_sampled(HEALTH_TIMEOUT_S)
        except ServerFailedError as failure:
            raise WorkerDiedError(
                f"the server {replica.server.url} cannot be used",
                got=str(failure),
                allowed="a server that answers when the run begins",
                fix="start it, or correct engine.urls" if replica.launched is None else f"see {replica.launched.where}",
            ) from failure
        replica.is_up, replica.answered_at = True, time.monotonic()

    async def supervise(self) -> None:
        """Watch the servers until the rule of the end says that it is over, which is a `WorkerDiedError`."""
        watches: dict[Replica, asyncio.Task[None]] = {}
        try:
            while True:
                for replica in [replica for replica in self._fleet.replicas if replica not in watches]:
                    watches[replica] = asyncio.create_task(self._watch(replica))
                await asyncio.sleep(self._timeouts.poll_s)
                for replica in [replica for replica in watches if replica not in self._fleet.replicas]:
                    watches.pop(replica).cancel()
                for watch in watches.values():
                    if watch.done():
                        watch.result()
                if self._fleet.up:
                    self._seen_up_at = time.monotonic()
                elif time.monotonic() - self._seen_up_at > self._timeouts.recover_s or self._is_hopeless():
                    self._fleet.death = self._died(self._fleet.last_failure)
                    raise self._fleet.death
        finally:
            await self._fleet.notify()
            for watch in watches.values():
                watch.cancel()
            await asyncio.gather(*watches.values(), return_exceptions=True)  # their connections are closed by then

    def _is_hopeless(self) -> bool:
        """Whether every server is one that was started, has ended, and may not be started again."""
        processes = [replica.launched for replica in self._fleet.replicas]
        ended = all(process is not None and process.exit_code is not None for process in processes)
        return ended and self._num_restarts >= self._timeouts.max_restarts

    async def _watch(self, replica: Replica) -> None:
        while replica in self._fleet.replicas:
            await asyncio.sleep(self._timeouts.poll_s)
            if replica.is_up:
                await self._look(replica)
            elif not self._fleet.paused and replica in self._fleet.replicas:
                try:
                    await self._recover(replica)
                except (ServerFailedError, ConfigError) as failure:  # it may come back as one that can be used
                    self._fleet.last_failure = f"{replica.server.url}: {failure}"

    async def _look(self, replica: Replica) -> None:
        """Is it well, and does every request get its answer?"""
        if replica.launched is not None and replica.launched.exit_code is not None:
            self._fleet.fail(replica, f"its process ended with exit code {replica.launched.exit_code}")
            return
        try:
            await replica.server.check_health(HEALTH_TIMEOUT_S)
            replica.num_sampled = await replica.server.num_sampled(HEALTH_TIMEOUT_S)
            replica.num_misses = 0
        except ServerFailedError as failure:
            replica.num_misses += 1
            if replica.num_misses >= MISSES or not failure.timed_out:
                self._fleet.fail(replica, str(failure))
            return
        overdue = []
        for attempt in replica.attempts:
            attempt.running_s += 0.0 if self._fleet.paused else self._timeouts.poll_s
            if attempt.running_s > self._timeouts.request_s and not attempt.why:
                overdue.append(attempt)
        if overdue and time.monotonic() - replica.answered_at > self._timeouts.request_s:
            self._fleet.fail(replica, f"{len(overdue)} requests hang: no answer to any for {self._timeouts.request_s:g} s")
        elif overdue:
            await self._fleet.abort("resubmit", overdue)

    async def _recover(self, replica: Replica) -> None:
        """Take a server back: connect, give it the current weights, compare it."""
        if replica.launched is not None:
            if replica.is_broken:
                self._restart(replica.launched)
                replica.is_broken = False
                replica.done.append("started again")
            try:
                await replica.launched.ready(replica.server, self._timeouts.start_s)
            except ServerFailedError:
                replica.is_broken = True
                raise
        if replica.is_new and "it joined" not in replica.done:
            replica.done.append("it joined")
        await self._connect(replica)
        async with self._fleet.lock:
            if self._fleet.paused or replica not in self._fleet.replicas:
                return  # the update that is under way goes first; or it has left
            replica.done.append(await self._supply(replica.server))
            replica.num_sampled = replica.num_received = await replica.server.num_sampled(HEALTH_TIMEOUT_S)
            replica.is_up, replica.is_new, replica.answered_at = True, False, time.monotonic()
        self._fleet.listen(Incident(what="up", server=replica.server.url, reason=", ".join(replica.done)))
        replica.done = []
        await self._fleet.notify()

    def _restart(self, launched: Launched) -> None:
        if self._num_restarts >= self._timeouts.max_restarts:
            raise ServerFailedError(f"servers were started again {self._num_restarts} times")
        self._num_restarts += 1
        launched.restart()

    async def _connect(self, replica: Replica) -> None:
        info = await replica.server.connect()
        replica.check_fit(info, self._spec)
        replica.info = info

    def _died(self, got: str) -> WorkerDiedError:
        return WorkerDiedError(
            "no server is left that samples",
            got=got,
            allowed=f"a server that is up, or comes back within engine.recover_s = {self._timeouts.recover_s:g} s",
            fix="look at the servers' own messages; start them again and go on with --resume from the last checkpoint",
        )
