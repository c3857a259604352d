"""The servers that sample: who is up, who gets the next request, and what happens to one that fails.

              health, deadlines                      found dead, hung, or with weights of no version of this run
    up  ------------------------------------------------------------------------------>  down
     ^    its requests are cut: each is sent again as prompt + what was kept of it          |
     '-- connect, current weights, the last probe again <-- restart, if it is ours ---------'

The rule of the end: the run ends when no server has been up for `recover_s` seconds, or when servers that were started by
the run have used up their restarts and none is up. As long as one is up it goes on; a weight update needs none, since a
server that comes back is given the current weights before it samples.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Literal

from oldlogits.core.errors import ConfigError, WorkerDiedError
from oldlogits.engines.http.client import Server, ServerFailedError, ServerInfo
from oldlogits.engines.http.messages import Json
from oldlogits.engines.http.servers import Attempt, Host, Launched, Timeouts
from oldlogits.engines.spec import Incident

HEALTH_TIMEOUT_S: Final = 10.0
"""How long a server may take to say that it is well."""
ABORT_AGAIN_S: Final = 0.25
"""After which an abort is sent again to requests that go on."""
SLACK: Final = 4
"""Requests that a server may have above the least busy one and still get the next turns of its trajectories."""
MISSES: Final = 3
"""Health checks in a row without an answer after which a server counts as hung."""


class Fleet:
    """Several servers as one.

    Args:
        hosts: At least one.
        patience: How long to wait for what.
        check: Refuses a server that does not fit the run.
        supply: Gives a server that is up again the current weights, and checks that it holds them; returns what it did.
    """

    def __init__(
        self,
        hosts: Sequence[Host],
        *,
        patience: Timeouts,
        check: Callable[[Host, ServerInfo], None],
        supply: Callable[[Server], Awaitable[str]],
    ) -> None:
        self.hosts, self._patience = list(hosts), patience
        self._check, self._supply = check, supply
        self.listen: Callable[[Incident], None] = lambda incident: None
        self.paused = False
        self._lock = asyncio.Lock()  # who talks to servers about weights
        self._waiting: list[asyncio.Future[None]] = []
        self._death: WorkerDiedError | None = None
        self._seen_up_at = time.monotonic()
        self._num_restarts = 0
        self._last_failure = ""

    @property
    def up(self) -> list[Host]:
        """The servers that get requests."""
        return [host for host in self.hosts if host.is_up]

    @property
    def num_running(self) -> int:
        """Requests that servers have."""
        return sum(len(host.attempts) for host in self.hosts)

    async def start(self) -> None:
        """Connect to all servers, once.

        Raises:
            ConfigError: One cannot do what training needs.
            WorkerDiedError: One does not answer.
        """
        await asyncio.gather(*map(self._start, self.hosts))
        self._seen_up_at = time.monotonic()

    async def _start(self, host: Host) -> None:
        try:
            if host.launched is not None:
                await host.launched.ready(host.server, self._patience.start_s)
            await self._connect(host)
            host.num_sampled = host.num_received = await host.server.num_sampled(HEALTH_TIMEOUT_S)
        except ServerFailedError as failure:
            raise WorkerDiedError(
                f"the server {host.server.url} cannot be used",
                got=str(failure),
                allowed="a server that answers when the run begins",
                fix="start it, or correct engine.urls" if host.launched is None else f"see {host.launched.where}",
            ) from failure
        host.is_up, host.answered_at = True, time.monotonic()

    async def choose(self, *, spread: int | None = None, before: Host | None = None) -> Host:
        """The server for the next request: that with the fewest; waits while none is up or all are paused.

        Args:
            spread: Instead: the server of this number, modulo how many are up.
            before: The one that had the trajectory's last turn, and its keys and values: it goes first unless it has more
                than `SLACK` requests above the fewest.

        Raises:
            WorkerDiedError: There will be none.
        """
        while True:
            if self._death is not None:
                raise copy.copy(self._death)
            up = self.up
            if up and not self.paused:
                if spread is not None:
                    return up[spread % len(up)]
                idlest = min(up, key=lambda host: len(host.attempts))
                near = before is not None and before.is_up and len(before.attempts) <= len(idlest.attempts) + SLACK
                return before if near and before is not None else idlest
            self._waiting.append(asyncio.get_running_loop().create_future())
            await self._waiting[-1]

    def add(self, host: Host) -> None:
        """A server joins: it gets requests as soon as it is ready and has the current weights."""
        host.is_new = True
        self.hosts.append(host)

    async def remove(self, host: Host) -> None:
        """A server leaves: what runs on it is sent again to others."""
        self.fail(host, "it was asked to leave", is_failure=False)
        self.hosts.remove(host)
        if host.launched is not None:
            host.launched.close()
        await host.server.close()

    async def pause(self, mode: str) -> None:
        """Pause all that are up."""
        async with self._lock:
            self.paused = True
            await self._all(lambda server: server.pause(mode))

    async def resume(self) -> None:
        """Let them go on."""
        async with self._lock:
            await self._all(lambda server: server.resume())
            self.paused = False
        self._notify()

    async def update(self, take: Callable[[], Awaitable[tuple[Json, str]]]) -> None:
        """Give all that are up new weights.

        Args:
            take: Makes them ready, while no server reads any; returns where they are and what they are called.
        """
        async with self._lock:
            update_info, label = await take()
            await self._all(lambda server: server.update(update_info, label))

    async def abort(self, why: Literal["resubmit", "end"], attempts: Sequence[Attempt]) -> None:
        """End attempts and wait until they are over; a server that does not do it counts as down."""
        for attempt in attempts:
            attempt.why = attempt.why or why
        await asyncio.gather(*(self._abort(host, [a for a in attempts if a in host.attempts]) for host in self.up))

    async def _abort(self, host: Host, attempts: list[Attempt]) -> None:
        if not attempts:
            return
        try:
            async with asyncio.timeout(self._patience.control_s):
                while running := [attempt for attempt in attempts if not attempt.ended.is_set()]:
                    await host.server.abort([attempt.id for attempt in running])
                    await _within(ABORT_AGAIN_S, running)  # one that had not arrived yet was not aborted
        except (ServerFailedError, TimeoutError) as failure:
            self.fail(host, f"it does not abort a request: {failure or 'no answer'}")

    async def suspect(self, host: Host, reason: str) -> None:
        """A request to a server failed: is it the server's end, or did a connection break, or is it only slow?"""
        if not host.is_up:
            return
        try:
            await host.server.check_health(HEALTH_TIMEOUT_S)
        except ServerFailedError as failure:
            if not failure.timed_out:  # else it has as many tries as it has without that request
                self.fail(host, reason)

    def fail(self, host: Host, reason: str, *, is_failure: bool = True) -> None:
        """A server counts as down: what ran on it is sent again, and it is taken back when it is well."""
        self._last_failure = f"{host.server.url}: {reason}"
        if not host.is_up:
            return
        host.is_up, host.is_broken, host.num_misses = False, True, 0
        incident = host.goes_down(reason, is_failure=is_failure)
        for attempt in host.attempts:
            attempt.cut.set()
        self.listen(incident)

    async def supervise(self) -> None:
        """Watch the servers until the rule of the end says that it is over.

        Raises:
            WorkerDiedError: It is.
        """
        watches: dict[Host, asyncio.Task[None]] = {}
        try:
            while True:
                for host in [host for host in self.hosts if host not in watches]:
                    watches[host] = asyncio.create_task(self._watch(host))
                await asyncio.sleep(self._patience.poll_s)
                for host in [host for host in watches if host not in self.hosts]:
                    watches.pop(host).cancel()
                for watch in watches.values():
                    if watch.done():
                        watch.result()
                if self.up:
                    self._seen_up_at = time.monotonic()
                elif time.monotonic() - self._seen_up_at > self._patience.recover_s or self._is_hopeless():
                    self._death = self._died(self._last_failure)
                    raise self._death
        finally:
            self._notify()
            for watch in watches.values():
                watch.cancel()
            await asyncio.gather(*watches.values(), return_exceptions=True)  # their connections are closed by then

    async def close(self) -> None:
        """Leave no connection and no process."""
        for host in self.hosts:
            if host.launched is not None:
                host.launched.close()
        for host in self.hosts:
            await host.server.close()

    def _is_hopeless(self) -> bool:
        """Whether every server is one that was started, has ended, and may not be started again."""
        ended = all(host.launched is not None and host.launched.exit_code is not None for host in self.hosts)
        return ended and self._num_restarts >= self._patience.max_restarts

    async def _watch(self, host: Host) -> None:
        while host in self.hosts:
            await asyncio.sleep(self._patience.poll_s)
            if host.is_up:
                await self._look(host)
            elif not self.paused and host in self.hosts:
                try:
                    await self._recover(host)
                except (ServerFailedError, ConfigError) as failure:  # it may come back as one that can be used
                    self._last_failure = f"{host.server.url}: {failure}"

    async def _look(self, host: Host) -> None:
        """Is it well, and does every request get its answer?"""
        if host.launched is not None and host.launched.exit_code is not None:
            self.fail(host, f"its process ended with exit code {host.launched.exit_code}")
            return
        try:
            await host.server.check_health(HEALTH_TIMEOUT_S)
            host.num_sampled = await host.server.num_sampled(HEALTH_TIMEOUT_S)
            host.num_misses = 0
        except ServerFailedError as failure:
            host.num_misses += 1
            if host.num_misses >= MISSES or not failure.timed_out:
                self.fail(host, str(failure))
            return
        overdue = []
        for attempt in host.attempts:
            attempt.running_s += 0.0 if self.paused else self._patience.poll_s
            if attempt.running_s > self._patience.request_s and not attempt.why:
                overdue.append(attempt)
        if overdue and time.monotonic() - host.answered_at > self._patience.request_s:
            self.fail(host, f"{len(overdue)} requests hang: no answer to any for {self._patience.request_s:g} s")
        elif overdue:
            await self.abort("resubmit", overdue)

    async def _recover(self, host: Host) -> None:
        """Take a server back: connect, give it the current weights, compare it.

        Raises:
            ServerFailedError: Not yet.
            ConfigError: It came back as one that cannot be used.
        """
        if host.launched is not None:
            if host.is_broken:
                self._restart(host.launched)
                host.is_broken = False
                host.done.append("started again")
            try:
                await host.launched.ready(host.server, self._patience.start_s)
            except ServerFailedError:
                host.is_broken = True
                raise
        if host.is_new and "it joined" not in host.done:
            host.done.append("it joined")
        await self._connect(host)
        async with self._lock:
            if self.paused or host not in self.hosts:  # the update that is under way goes first; or it has left
                return
            host.done.append(await self._supply(host.server))
            host.num_sampled = host.num_received = await host.server.num_sampled(HEALTH_TIMEOUT_S)
            host.is_up, host.is_new, host.answered_at = True, False, time.monotonic()
        self.listen(Incident(what="up", server=host.server.url, reason=", ".join(host.done)))
        host.done = []
        self._notify()

    def _restart(self, launched: Launched) -> None:
        """Start a server again, if it may be.

        Raises:
            ServerFailedError: It was done often enough.
        """
        if self._num_restarts >= self._patience.max_restarts:
            raise ServerFailedError(f"servers were started again {self._num_restarts} times")
        self._num_restarts += 1
        launched.restart()

    async def _connect(self, host: Host) -> None:
        info = await host.server.connect()
        self._check(host, info)
        host.info = info

    async def _all(self, call: Callable[[Server], Awaitable[None]]) -> None:
        """Call every server that is up; those that fail count as down."""

        async def one(host: Host) -> None:
            try:
                await call(host.server)
            except (ServerFailedError, ConfigError) as failure:
                self.fail(host, str(failure))

        await asyncio.gather(*map(one, self.up))

    def _notify(self) -> None:
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            if not future.done():
                future.set_result(None)

    def _died(self, got: str) -> WorkerDiedError:
        return WorkerDiedError(
            "no server is left that samples",
            got=got,
            allowed=f"a server that is up, or comes back within engine.recover_s = {self._patience.recover_s:g} s",
            fix="look at the servers' own messages; start them again and go on with --resume from the last checkpoint",
        )


async def _within(seconds: float, attempts: Sequence[Attempt]) -> None:
    """Wait until all attempts are over, but not for long."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            for attempt in attempts:
                await attempt.ended.wait()
