"""Rollout workers as the fleet and the episodes see them: each the process of a server, and a place for environments."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final, cast

from oldlogits.backends.ray import cluster
from oldlogits.backends.ray.cluster import Actor, ActorEndedError, ClusterError, fetch
from oldlogits.backends.ray.desired_workers import read_wanted
from oldlogits.backends.ray.exchange import Exchange
from oldlogits.backends.ray.remote_environments import Place, PlaceLostError
from oldlogits.backends.ray.weights import ClusterWeights
from oldlogits.config.guard import Caution
from oldlogits.core.engine import ServerOptions
from oldlogits.core.errors import ConfigError, OldLogitsError
from oldlogits.core.server import SERVER_PROTOCOLS, ServerFailedError, ServerProtocol, SharedWeights
from oldlogits.engines.http.client import HttpClient
from oldlogits.engines.http.fleet import Fleet
from oldlogits.engines.http.replica import Replica
from oldlogits.rollout.environment_errors import EnvironmentFailed

CALL_S: Final = 30.0
"""Beyond the environments' own time-out: how long a worker may take to answer a call."""
POLL_S: Final = 1.0
"""Between two looks at how many workers are wanted."""


class RayTransport(HttpClient):
    """Carries calls to the server of a worker, wherever it runs."""

    def __init__(self, worker: RayWorker, weights: ClusterWeights, *, control_timeout_s: float) -> None:
        super().__init__("http://127.0.0.1", token="", control_timeout_s=control_timeout_s)
        self._worker, self._weights = worker, weights

    async def located(self, weights: SharedWeights) -> SharedWeights:
        """Return the weights as its node's copy of them."""
        return replace(weights, path=Path(await self._weights.path(self._worker.node_id)))

    async def share(self, text: str) -> Path:
        """Write a text on its node."""
        return await self._weights.share(self._worker.node_id, text)


class RayWorker:
    """A worker: the process of a server to the fleet, a place to environments."""

    def __init__(self, name: str, make: Callable[[], Actor], *, timeout_s: float, heartbeat_timeout_s: float) -> None:
        self.name, self._make, self._timeout_s, self._heartbeat_timeout_s = name, make, timeout_s, heartbeat_timeout_s
        self.where = f"servers/{name}.log of the run folder, on its node"
        self._actor: Actor | None = None
        self._exchanging: Exchange | None = None
        self._restarts_server = False
        self._watch: asyncio.Task[None] | None = None
        self._dropped: list[int] = []
        self.environments: set[int] = set()  # those of this actor: those of one before it are gone
        self._has_left = False
        self.node_id, self.exit_code = "", cast("int | None", None)

    @property
    def actor(self) -> Actor:
        """Its actor, once it was made."""
        if self._actor is None:
            raise PlaceLostError
        return self._actor

    @property
    def _exchange(self) -> Exchange:
        if self._exchanging is None:
            raise PlaceLostError
        return self._exchanging

    @property
    def is_up(self) -> bool:
        """Whether environments can live there."""
        return self._actor is not None and self.exit_code is None

    def restart(self) -> None:
        """Start the server again, and the worker if it has ended; done by `ready`."""
        self._restarts_server = self.is_up

    async def ready(self, server: ServerProtocol, start_s: float) -> None:
        """Wait until it answers."""
        if self._has_left:
            raise ServerFailedError("it has left")
        try:
            async with asyncio.timeout(start_s):
                await self._start(server)
                while True:
                    with contextlib.suppress(ServerFailedError):
                        await server.check_health(2.0)
                        return
                    if (code := await fetch(self.actor.call("exit_code"))) is not None:
                        raise ServerFailedError(f"its server ended with exit code {code}; see {self.where}")
                    await asyncio.sleep(0.2)
        except TimeoutError:
            raise ServerFailedError(
                f"it is not ready after {start_s:g} s: it is still starting, or has no place where {cluster.free()} is free"
            ) from None
        except (ClusterError, OldLogitsError) as error:
            raise ServerFailedError(f"it ended: {str(error).strip().splitlines()[0]}") from error

    async def _start(self, server: ServerProtocol) -> None:
        if not self.is_up:
            self._actor = actor = self._make()
            self.exit_code = None
            self._exchanging = Exchange(lambda requests: fetch(actor.call("exchange", requests)), cluster.pack)
            self.environments, self._dropped = set(), []
            self._watch = asyncio.create_task(self._live(self._actor))
        elif self._restarts_server:
            await fetch(self.actor.call("restart"))
        self._restarts_server = False
        url, token, self.node_id = await fetch(self.actor.call("where"))
        server.http.move_to(url, token)

    async def _live(self, actor: Actor) -> None:
        try:
            await actor.watch(self._heartbeat_timeout_s)
        except ClusterError:
            self.exit_code = -signal.SIGKILL

    def close(self) -> None:
        """End it and all that it has started, for good."""
        self._has_left, self.environments = True, set()
        if self._watch is not None:
            self._watch.cancel()
        if self._actor is not None:
            self._actor.kill()  # its server is held by a reaper
        self.exit_code = -signal.SIGKILL

    async def open(self, id: int) -> None:
        """Make an environment."""
        here = self.environments
        here.add(id)
        self._exchange.ask("open", id)  # whoever calls it hears why it could not be made

    async def call(self, id: int, method: str, args: Sequence[object], kwargs: Mapping[str, object]) -> object:
        """Call a method of an environment."""
        if id not in self.environments:
            raise PlaceLostError
        return await self._answer(id, method, args, kwargs)

    def drop(self, id: int) -> None:
        """Forget an environment; told in batches."""
        if id not in self.environments:
            return
        self.environments.remove(id)
        self._dropped.append(id)
        if len(self._dropped) >= 32 and self.is_up:
            self.actor.call("drop", self._dropped)
            self._dropped = []

    async def _answer(self, *arguments: object) -> object:
        try:
            async with asyncio.timeout(self._timeout_s + CALL_S):
                return await self._exchange.ask("call", *arguments)
        except TimeoutError:
            raise EnvironmentFailed(f"its worker did not answer within {self._timeout_s + CALL_S:g} s") from None
        except ActorEndedError as error:
            raise PlaceLostError from error
        except (EnvironmentFailed, OldLogitsError):
            raise
        except Exception as error:  # supervision: such as an answer that cannot be sent
            said = str(error).strip() or type(error).__name__
            raise EnvironmentFailed(said.splitlines()[-1]) from error


class Workers:
    """The rollout workers of a run: as many as its folder says are wanted, and where environments are placed."""

    def __init__(
        self,
        make: Callable[[int], Actor],
        folder: Path,
        weights: ClusterWeights,
        *,
        num_workers: int,
        environment_timeout_s: float,
        servers: ServerOptions,
    ) -> None:
        self._make, self._folder, self._weights = make, folder, weights
        self._environment_timeout_s, self._servers = environment_timeout_s, servers
        self._num_made = 0
        self._workers: dict[Replica, RayWorker] = {}
        self.fleet: Fleet | None = None
        self.warn: Callable[[Caution], None] = lambda caution: None
        self.replicas = [self._replica() for _ in range(num_workers)]

    def _replica(self) -> Replica:
        number, self._num_made = self._num_made, self._num_made + 1
        worker = RayWorker(
            f"worker-{number}",
            partial(self._make, number),
            timeout_s=self._environment_timeout_s,
            heartbeat_timeout_s=self._servers.timeouts.heartbeat_s,
        )
        http = RayTransport(worker, self._weights, control_timeout_s=self._servers.timeouts.control_s)
        replica = Replica(server=SERVER_PROTOCOLS.find(self._servers.protocol)(http), launched=worker)
        self._workers[replica] = worker
        return replica

    async def choose(self) -> Place:
        """The worker with the fewest environments."""
        assert self.fleet is not None
        while True:
            up = [worker for replica, worker in self._workers.items() if worker.is_up and replica in self.fleet.replicas]
            if up:
                return min(up, key=lambda worker: len(worker.environments))
            await self.fleet.choose()  # waits, and raises when there will be none
            await asyncio.sleep(0.1)

    async def follow(self) -> None:
        """Have as many workers as are wanted."""
        assert self.fleet is not None
        unread = told = ""
        while True:
            await asyncio.sleep(POLL_S)
            try:
                num = read_wanted(self._folder)
            except ConfigError as error:  # half written, or wrong: said once when it is there at a second look; the run goes on
                if str(error) == unread and unread != told:
                    self.warn(Caution(name="workers_wanted", message=str(error), figures={}))
                    told = unread
                unread = str(error)
                continue
            unread = told = ""
            if num is None:
                continue
            while len(self.fleet.replicas) < num:
                self.fleet.add(self._replica())
            while len(self.fleet.replicas) > num:
                replica = self.fleet.replicas[-1]
                await self.fleet.remove(replica)
                del self._workers[replica]
