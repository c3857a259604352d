"""Runtime "ray": trainer, dedicated scorer, rollout workers and the store of weights as actors of a Ray cluster.

    controller (this process, no model)
        |--calls--> trainer actor --update--> object store --once a node--> Keeper (shared memory) --> servers of the node
        |--calls--> scorer actor  <---------------'                             ^
        |--HTTP---> server of a worker: samples                                 '-- store: for those behind, or new
        '--calls--> environments of a worker

The loop is that of every runtime. Workers that end are started again within `engine.max_restarts`; `oldlogits workers`
changes how many there are. The end of the trainer or the scorer ends the run. Nothing here waits without a deadline or a
watch on who is waited for. The one file that imports ray.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, cast

import numpy as np
import ray
from numpy.typing import NDArray
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from oldlogits.config import RunConfig
from oldlogits.core.errors import ConfigError, OldLogitsError, WorkerDiedError
from oldlogits.core.protocols import Piece, PolicyVersion, ScoredPieces, WeightUpdate
from oldlogits.rollout.fleet import Fleet, Host, Patience
from oldlogits.rollout.launch import LaunchSpec
from oldlogits.rollout.server import Server, ServerFailedError
from oldlogits.rollout.turns import EnvironmentFailed
from oldlogits.rollout.vllm import VllmEngine
from oldlogits.rollout.wire import Json
from oldlogits.runtime import actors
from oldlogits.runtime.handles import CallingTrainer, Handles
from oldlogits.runtime.remote_environments import AwaitingRunner, Place, PlaceLostError, stand_in
from oldlogits.train.trainer import Published

RAY_SETTINGS: Final = MappingProxyType(
    {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # actors without a GPU see what the machine has, as Ray will do anyway
        "RAY_worker_niceness": "0",  # else the trainer gives way to everything else on its machine
    }
)
"""Environment variables of a cluster that the run starts, unless they are set."""
CALL_S: Final = 30.0
"""Beyond the environments' own time-out: how long a worker may take to answer a call."""
POLL_S: Final = 1.0
"""Between two looks at how many workers are wanted."""


async def _value(ref: Any) -> Any:
    """The value of a reference; a cancellation of the wait does not cancel the call.

    Raises:
        ray.exceptions.RayError: The actor ended, or what it was to return is lost.
    """
    return await asyncio.wrap_future(ref.future())


class CallsActor:
    """The trainer or the dedicated scorer as an actor.

    Args:
        name: Of it.
        build: See `actors.Calls`.
        arguments: Of `build`.
        place: On the cluster.
    """

    def __init__(
        self, name: str, build: Callable[..., object], arguments: tuple[object, ...], place: Mapping[str, Any]
    ) -> None:
        self._name = name
        made = ray.remote(concurrency_groups={"watch": 1})(actors.Calls)
        self._actor = made.options(**place).remote(name, build, arguments)

    async def ready(self, start_s: float) -> None:
        """Wait until it is built.

        Raises:
            OldLogitsError: It cannot be built, or the cluster has no place for it.
        """
        try:
            async with asyncio.timeout(start_s):
                await self.call("start", ())
        except TimeoutError:
            raise no_place(f"the {self._name}", start_s) from None

    async def call(self, method: str, arguments: tuple[object, ...], payload: Any = None) -> tuple[object, Any]:
        """Carry out a call; returns its value, and the reference of the weights that come with it.

        Raises:
            OldLogitsError: What it raised.
            WorkerDiedError: The actor ended.
        """
        result, weights = self._actor.call.options(num_returns=2).remote(method, arguments, payload)
        try:
            succeeded, value = await _value(result)
        except ray.exceptions.RayActorError as error:
            raise self._died(error) from error
        if not succeeded:
            raise value
        return value, weights

    async def watch(self) -> None:
        """Wait until it ends by itself.

        Raises:
            WorkerDiedError: It did.
        """
        try:
            await _value(self._actor.live.options(concurrency_group="watch").remote())
        except ray.exceptions.RayActorError as error:
            raise self._died(error) from error

    def _died(self, error: Exception) -> WorkerDiedError:
        return WorkerDiedError(
            f"the {self._name} actor ended",
            got=str(error).strip().splitlines()[0],
            allowed=f"a {self._name} that runs until the end of the run",
            fix="look for an out-of-memory kill or a lost node; go on with --resume from the last checkpoint",
        )


class RayTrainer(CallsActor):
    """The trainer as an actor; its updates stay in the object store, and are handed on by reference."""

    def __init__(self, config: RunConfig, model_folder: Path, probe_ids: Sequence[int], weights: ClusterWeights) -> None:
        where = {"num_cpus": config.ray.trainer_cpus, "num_gpus": config.ray.trainer_gpus}
        super().__init__("trainer", actors.build_trainer, (config, model_folder, list(probe_ids)), where)
        self._weights = weights
        self.handle = CallingTrainer(self._carry_out)

    async def _carry_out(self, method: str, arguments: tuple[object, ...]) -> object:
        value, weights = await self.call(method, arguments)
        if isinstance(value, Published):
            return replace(value, update=await self._weights.sent(weights))
        return await self._weights.sent(weights) if method == "full_weights" else value


class RayScorer(CallsActor):
    """The dedicated scorer as an actor; a `DedicatedScorer`."""

    def __init__(self, config: RunConfig, model_folder: Path, probe_ids: Sequence[int], weights: ClusterWeights) -> None:
        where = {"num_cpus": config.ray.trainer_cpus, "num_gpus": config.ray.trainer_gpus}
        super().__init__("scorer", actors.build_scorer, (config, model_folder, list(probe_ids)), where)
        self._weights, self.window = weights, config.source.window

    async def publish(self, version: PolicyVersion, update: WeightUpdate, probe_logps: NDArray[np.float32]) -> float:
        """Take over a version."""
        value, _ = await self.call("publish", (version, probe_logps), self._weights.reference(update))
        return cast(float, value)

    async def score_pieces(self, pieces: Sequence[Piece], at: PolicyVersion) -> ScoredPieces:
        """Score pieces."""
        value, _ = await self.call("score_pieces", (pieces, at))
        return cast(ScoredPieces, value)


class ClusterWeights:
    """Brings weights to the nodes: each gets an update once, whatever runs on it; a `Carrier`.

    The store is the keeper beside the controller: it takes every update, and gives its whole copy to a node that is new or
    behind, so that the trainer is not asked.
    """

    def __init__(self) -> None:
        self._store = _keeper(ray.get_runtime_context().get_node_id())
        self._nodes: dict[str, _Node] = {}
        self._version: PolicyVersion = -1
        self._last: tuple[WeightUpdate, Any] | None = None

    async def sent(self, weights: Any) -> WeightUpdate:
        """The update behind a reference, over the memory of the object store."""
        try:
            update = actors.unpack(await _value(weights))
        except ray.exceptions.RayError as error:
            raise _lost(error) from error
        self._last = (update, weights)
        return update

    def reference(self, update: WeightUpdate) -> Any:
        """What is passed to actors in place of an update."""
        if self._last is None or self._last[0] is not update:
            self._last = (update, ray.put(actors.pack(update)))
        return self._last[1]

    async def take(self, update: WeightUpdate, version: PolicyVersion) -> Json:
        """Bring the store and every node to a version; nodes that fail are supplied when their servers ask."""
        weights = self.reference(update)
        try:
            taken = await _value(self._store.take.remote(weights, version))
        except ray.exceptions.RayError as error:
            raise _lost(error) from error
        if isinstance(taken, OldLogitsError):
            raise taken
        self._version = version
        await asyncio.gather(*(node.take(weights, version) for node in self._nodes.values()))
        return {"version": version}

    async def path(self, node_id: str) -> str:
        """The file of a node that holds the newest version.

        Raises:
            ServerFailedError: The node does not take it.
        """
        node = self._nodes.setdefault(node_id, _Node(keeper=_keeper(node_id)))
        async with node.lock:
            if node.version != self._version:
                try:
                    await node.take(self._store.full.remote(), self._version)
                except ray.exceptions.RayError as error:
                    raise ServerFailedError(f"the store of weights ended: {error}") from error
            if node.version != self._version:
                del self._nodes[node_id]  # its keeper ended: the next look makes another
                raise ServerFailedError("its node did not take the weights")
            return str(node.path)

    async def share(self, node_id: str, text: str) -> Path:
        """Write a text on a node where weights would be."""
        node = self._nodes.setdefault(node_id, _Node(keeper=_keeper(node_id)))
        try:
            return cast(Path, await _value(node.keeper.share.remote(text)))
        except ray.exceptions.RayError as error:
            self._nodes.pop(node_id, None)
            raise ServerFailedError(f"its node does not answer: {error}") from error

    def close(self) -> None:
        """Leave no file."""
        keepers = [self._store, *(node.keeper for node in self._nodes.values())]
        with contextlib.suppress(ray.exceptions.RayError):
            ray.wait([keeper.close.remote() for keeper in keepers], num_returns=len(keepers), timeout=5.0)


@dataclass(slots=True, kw_only=True, eq=False)
class _Node:
    """What a node holds."""

    keeper: Any
    version: PolicyVersion = -1
    path: Path | None = None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def take(self, weights: Any, version: PolicyVersion) -> None:
        """Take an update; after a failure it is behind."""
        try:
            taken = await _value(self.keeper.take.remote(weights, version))
        except ray.exceptions.RayError:
            self.version = -1
            return
        behind = isinstance(taken, OldLogitsError)
        self.version, self.path = (-1, None) if behind else (version, taken)


def _keeper(node_id: str) -> Any:
    strategy = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return ray.remote(actors.Keeper).options(num_cpus=0, scheduling_strategy=strategy).remote()


def _lost(error: Exception) -> WorkerDiedError:
    return WorkerDiedError(
        "weights were lost on their way",
        got=str(error).strip().splitlines()[0],
        allowed="a trainer and a store that run until the end of the run",
        fix="look for a lost node or an object store that is too small; go on with --resume from the last checkpoint",
    )


class RayServer(Server):
    """The server of a worker, wherever it runs."""

    def __init__(self, worker: RayWorker, weights: ClusterWeights, *, control_timeout_s: float) -> None:
        super().__init__("http://127.0.0.1", token="", control_timeout_s=control_timeout_s)
        self._worker, self._weights = worker, weights

    async def update(self, update_info: Json, label: str) -> None:
        """Take over weights from its node's copy."""
        assert isinstance(update_info, dict)
        await super().update({**update_info, "path": await self._weights.path(self._worker.node_id)}, label)

    async def _share(self, text: str) -> Path:
        return await self._weights.share(self._worker.node_id, text)


class RayWorker:
    """A worker: the process of a server to the fleet, a place to environments.

    Args:
        name: Of it.
        make: Makes its actor.
        timeout_s: Of one call of an environment.
    """

    def __init__(self, name: str, make: Callable[[], Any], timeout_s: float) -> None:
        self.name, self._make, self._timeout_s = name, make, timeout_s
        self._actor: Any = None
        self._restarts_server = False
        self._watch: asyncio.Task[None] | None = None
        self._dropped: list[int] = []
        self.node_id, self.exit_code = "", cast("int | None", None)
        self.num_environments = 0

    @property
    def is_up(self) -> bool:
        """Whether environments can live there."""
        return self._actor is not None and self.exit_code is None

    @property
    def where(self) -> str:
        """Where to look for what it said."""
        return f"servers/{self.name}.log of the run folder, on its node"

    def restart(self) -> None:
        """Start the server again, and the worker if it has ended; done by `ready`."""
        self._restarts_server = self.is_up

    async def ready(self, server: Server, start_s: float) -> None:
        """Wait until it answers.

        Raises:
            ServerFailedError: It ended, or takes longer than `start_s`.
        """
        try:
            async with asyncio.timeout(start_s):
                await self._start(server)
                while True:
                    with contextlib.suppress(ServerFailedError):
                        await server.check_health(2.0)
                        return
                    if (code := await _value(self._actor.exit_code.remote())) is not None:
                        raise ServerFailedError(f"its server ended with exit code {code}; see {self.where}")
                    await asyncio.sleep(0.2)
        except TimeoutError:
            raise ServerFailedError(f"it is not ready after {start_s:g} s: {no_place(self.name, start_s)}") from None
        except ray.exceptions.RayError as error:
            raise ServerFailedError(f"it ended: {str(error).strip().splitlines()[0]}") from error

    async def _start(self, server: Server) -> None:
        if not self.is_up:
            self._actor, self.exit_code, self.num_environments = self._make(), None, 0
            self._watch = asyncio.create_task(self._live(self._actor))
        elif self._restarts_server:
            await _value(self._actor.restart.remote())
        self._restarts_server = False
        sampler = await _value(self._actor.sampler.remote())
        self.node_id = sampler.node_id
        server.move_to(sampler.url, sampler.token)

    async def _live(self, actor: Any) -> None:
        try:
            await _value(actor.live.remote())
        except ray.exceptions.RayError:
            self.exit_code = -signal.SIGKILL

    def close(self) -> None:
        """End it and all that it has started."""
        if self._watch is not None:
            self._watch.cancel()
        if self._actor is not None:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.kill(self._actor)  # its server is on a leash
        self.exit_code = -signal.SIGKILL

    async def open(self, id: int) -> None:
        """Make an environment."""
        self.num_environments += 1
        failure = await self._answer(self._actor.open.remote(id))
        if failure is not None:
            raise EnvironmentFailed(str(failure))

    async def call(self, id: int, method: str, args: Sequence[object], kwargs: Mapping[str, object]) -> object:
        """Call a method of an environment."""
        succeeded, answer = cast("tuple[bool, object]", await self._answer(self._actor.call.remote(id, method, args, kwargs)))
        if not succeeded:
            raise EnvironmentFailed(str(answer))
        return answer

    def drop(self, id: int) -> None:
        """Forget an environment; told in batches."""
        self.num_environments -= 1
        self._dropped.append(id)
        if len(self._dropped) >= 32 and self.is_up:
            self._actor.drop.remote(self._dropped)
            self._dropped = []

    async def _answer(self, ref: Any) -> object:
        try:
            async with asyncio.timeout(self._timeout_s + CALL_S):
                return await _value(ref)
        except TimeoutError:
            raise EnvironmentFailed(f"its worker did not answer within {self._timeout_s + CALL_S:g} s") from None
        except ray.exceptions.RayActorError as error:
            raise PlaceLostError from error
        except ray.exceptions.RayError as error:  # such as an answer that cannot be sent
            raise EnvironmentFailed(str(error).strip().splitlines()[-1]) from error


class Workers:
    """The rollout workers of a run: as many as are wanted, and where environments are placed.

    Args:
        config: The run.
        make: Makes the actor of a worker: its number, and whether it is of the first ones.
        wanted: The file by which `oldlogits workers` says how many there are to be.
        weights: Of the cluster.
    """

    def __init__(self, config: RunConfig, make: Callable[[int], Any], wanted: Path, weights: ClusterWeights) -> None:
        self._config, self._make, self._wanted, self._weights = config, make, wanted, weights
        self._num_made = 0
        self._workers: dict[Host, RayWorker] = {}
        self.fleet: Fleet | None = None
        self.hosts = [self._host() for _ in range(config.ray.num_workers)]

    def _host(self) -> Host:
        number, self._num_made = self._num_made, self._num_made + 1
        worker = RayWorker(f"worker-{number}", partial(self._make, number), self._config.env.timeout_s)
        server = RayServer(worker, self._weights, control_timeout_s=self._config.engine.control_timeout_s)
        host = Host(server=server, launched=worker)
        self._workers[host] = worker
        return host

    async def choose(self) -> Place:
        """The worker with the fewest environments."""
        assert self.fleet is not None
        while True:
            up = [worker for host, worker in self._workers.items() if worker.is_up and host in self.fleet.hosts]
            if up:
                return min(up, key=lambda worker: worker.num_environments)
            await self.fleet.choose()  # waits, and raises when there will be none
            await asyncio.sleep(0.1)

    async def follow(self) -> None:
        """Have as many workers as the file says."""
        assert self.fleet is not None
        while True:
            await asyncio.sleep(POLL_S)
            if not self._wanted.exists():
                continue
            num = int(cast(int, json.loads(self._wanted.read_text(encoding="utf-8"))["num_workers"]))
            while len(self.fleet.hosts) < num:
                self.fleet.add(self._host())
            while len(self.fleet.hosts) > num:
                host = self.fleet.hosts[-1]
                await self.fleet.remove(host)
                del self._workers[host]


@asynccontextmanager
async def open_ray(
    config: RunConfig, model_folder: Path, probe_ids: Sequence[int], sampler_seed: int, *, folder: Path
) -> AsyncIterator[Handles]:
    """Join or start a cluster and its actors; on leaving none of them stays behind, whatever happened."""
    e, r = config.engine, config.ray
    patience = Patience(
        recover_s=e.recover_s,
        request_s=e.request_timeout_s,
        control_s=e.control_timeout_s,
        start_s=r.start_timeout_s,
        max_restarts=e.max_restarts,
    )
    async with AsyncExitStack() as stack:
        stack.enter_context(_cluster(config))
        weights = ClusterWeights()
        trainer = RayTrainer(config, model_folder.resolve(), probe_ids, weights)
        scorer = RayScorer(config, model_folder.resolve(), probe_ids, weights) if config.source.type == "dedicated" else None
        spec = LaunchSpec(
            server=e.start if e.type == "vllm" else "embedded",
            model_path=str(model_folder.resolve()),
            numerics=e.numerics,
            num_slots=e.num_slots,
            max_context=config.env.max_tokens,
            flags=e.flags,
            python=e.python,
            log_folder=(folder / "servers").resolve(),
            seed=sampler_seed,
        )
        await trainer.ready(r.start_timeout_s)
        if scorer is not None:
            await scorer.ready(r.start_timeout_s)
        workers = Workers(config, await _maker(config, spec), folder / "workers.json", weights)
        engine = VllmEngine(
            workers.hosts, max_context=config.env.max_tokens, numerics=e.numerics, patience=patience, weights=weights
        )
        workers.fleet = engine.fleet
        stack.push_async_callback(engine.close)
        await engine.start()
        watched: list[Coroutine[None, None, None]] = [engine.fleet.supervise(), workers.follow(), trainer.watch()]
        watched += [scorer.watch()] if scorer is not None else []
        tasks = tuple(map(asyncio.create_task, watched))
        stack.push_async_callback(_cancelled, tasks)
        yield Handles(
            engine=engine,
            trainer=trainer.handle,
            run_environment=AwaitingRunner(latency_s=config.env.latency_s, seed=sampler_seed),
            engine_stats=engine.stats,
            clock=time.perf_counter,
            real_time=True,
            watch=lambda buffer: None,
            scorer=scorer,
            listen=lambda hear: setattr(engine.fleet, "listen", hear),
            host_environment=lambda environment_class: stand_in(environment_class, workers),
            workers=tasks,
        )


async def _cancelled(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@contextmanager
def _cluster(config: RunConfig) -> Iterator[None]:
    """A connection to the cluster of the recipe, or to one that lives as long as the run."""
    for name, value in RAY_SETTINGS.items():
        os.environ.setdefault(name, value)
    variables = {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path), "OMP_NUM_THREADS": "1"}
    own = {"num_cpus": _needed_cpus(config), "include_dashboard": False} if not config.ray.address else {}
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the controller's to handle
    try:
        ray.init(
            address=config.ray.address or "local",
            runtime_env={"env_vars": variables},
            log_to_driver=False,
            logging_level="ERROR",
            configure_logging=False,
            **own,
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError(
            "there is no cluster to run on",
            got=f"ray.address = '{config.ray.address}': {str(error).strip().splitlines()[0]}",
            allowed="the address of a running cluster, or none",
            fix="start it with `ray start --head`, or remove ray.address",
        ) from error
    finally:
        signal.signal(signal.SIGINT, previous)
    try:
        yield
    finally:
        ray.shutdown()


def _needed_cpus(config: RunConfig) -> int:
    """CPUs that a cluster of this run alone is said to have: its actors share those that there are."""
    r = config.ray
    models = r.trainer_cpus * (2 if config.source.type == "dedicated" else 1)
    return int(np.ceil(models + 4 * max(r.num_workers, 2) * r.worker_cpus)) + 1


async def _maker(config: RunConfig, spec: LaunchSpec) -> Callable[[int], Any]:
    """How the actor of a worker is made: the first ones in places that are reserved together."""
    r = config.ray
    bundle = {"CPU": max(r.worker_cpus, 1e-3), **({"GPU": r.worker_gpus} if r.worker_gpus else {})}
    group: PlacementGroup = placement_group([bundle] * r.num_workers, strategy=r.placement)
    try:
        async with asyncio.timeout(r.start_timeout_s):
            await _value(group.ready())
    except TimeoutError:
        raise no_place(f"{r.num_workers} workers ({r.placement})", r.start_timeout_s) from None
    home = ray.util.get_node_ip_address()
    made = ray.remote(actors.Worker)

    def make(number: int) -> Any:
        place: Any = "SPREAD"
        if number < r.num_workers:
            place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=number)
        options = {"num_cpus": bundle["CPU"], "num_gpus": r.worker_gpus, "scheduling_strategy": place, "max_concurrency": 1000}
        own = replace(spec, seed=spec.seed + number)
        return made.options(**options).remote(
            own, f"worker-{number}", config.env.target, config.env.timeout_s, partial(_node, home)
        )

    return make


def _node(home: str) -> actors.Node:
    """The node that this is called on; on the controller's own, servers listen for this machine alone."""
    address = ray.util.get_node_ip_address()
    return actors.Node(id=ray.get_runtime_context().get_node_id(), address="127.0.0.1" if address == home else address)


def no_place(what: str, waited_s: float) -> ConfigError:
    """The cluster has no room."""
    free = ", ".join(f"{amount:g} {name}" for name, amount in ray.available_resources().items() if name in ("CPU", "GPU"))
    return ConfigError(
        f"the cluster gives no place to {what}",
        got=f"{free or 'nothing'} free after {waited_s:g} s",
        allowed="what ray.num_workers, worker_cpus, worker_gpus, trainer_cpus and trainer_gpus ask for",
        fix="lower them, add nodes, or look for other users of the cluster with `ray status`",
    )
