"""Runtime "ray": trainer, dedicated scorer, rollout workers and the store of weights as actors of a Ray cluster.

    controller (this process, no model)
        |--calls--> trainer actor --update--> object store --once a node--> Keeper (shared memory) --> servers of the node
        |--calls--> scorer actor  <---------------'                             ^
        |--HTTP---> server of a worker: samples                                 '-- store: for those behind, or new
        '--calls--> environments of a worker

The loop is that of every runtime. Workers that end are started again within `engine.max_restarts`; `oldlogits workers`
changes how many there are. The end of the trainer or the scorer ends the run. Nothing here waits without a deadline or a
watch on who is waited for.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from oldlogits.backends.ray import actors, cluster
from oldlogits.backends.ray.cluster import Actor, ActorEndedError, Ref, fetch
from oldlogits.backends.ray.remote_environments import AwaitingRunner, stand_in
from oldlogits.backends.ray.weights import ClusterWeights
from oldlogits.backends.ray.workers import Workers
from oldlogits.config import Caution, RunConfig
from oldlogits.core.errors import ConfigError, WorkerDiedError
from oldlogits.core.scoring import ScoredSpans, ScoringSpan
from oldlogits.core.source import SOURCES
from oldlogits.core.weights import PolicyVersion, WeightUpdate
from oldlogits.engines.http.engine import HttpEngine
from oldlogits.engines.http.launch import LaunchSpec
from oldlogits.engines.http.servers import Timeouts
from oldlogits.engines.spec import Incident
from oldlogits.loop.backend import Backend, TrainerClient
from oldlogits.train.reports import PublishedVersion

Place = Mapping[str, Any]


class ServedActor:
    """The trainer or the dedicated scorer as an actor.

    Args:
        name: Of it.
        build: See `actors.Calls`.
        arguments: Of `build`.
        place: On the cluster.
    """

    def __init__(self, name: str, build: Callable[..., object], arguments: tuple[object, ...], place: Place) -> None:
        self._name = name
        self._actor = Actor(actors.Calls, (name, build, arguments), place=place, watched=True)

    async def ready(self, start_s: float) -> None:
        """Wait until it is built.

        Raises:
            OldLogitsError: It cannot be built.
            ConfigError: It takes longer than `start_s`.
        """
        try:
            async with asyncio.timeout(start_s):
                await self.call("start", ())
        except TimeoutError:
            raise ConfigError(
                f"the {self._name} has its place on the cluster and is still starting",
                got=f"it is not ready after {start_s:g} s",
                allowed="a process that has loaded its packages and the model within ray.start_timeout_s",
                fix="raise ray.start_timeout_s, or look for what else keeps its node busy",
            ) from None

    async def call(self, method: str, arguments: tuple[object, ...], payload: Ref = None) -> tuple[object, Ref]:
        """Carry out a call; returns its value, and the reference of the weights that come with it.

        Raises:
            OldLogitsError: What it raised.
            WorkerDiedError: The actor ended.
        """
        result, weights = self._actor.call("call", method, arguments, payload, num_returns=2)
        try:
            succeeded, value = await fetch(result)
        except ActorEndedError as error:
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
            await self._actor.live()
        except ActorEndedError as error:
            raise self._died(error) from error

    def _died(self, error: Exception) -> WorkerDiedError:
        return WorkerDiedError(
            f"the {self._name} actor ended",
            got=str(error).strip().splitlines()[0],
            allowed=f"a {self._name} that runs until the end of the run",
            fix="look for an out-of-memory kill or a lost node; go on with --resume from the last checkpoint",
        )


class RayTrainer(ServedActor):
    """The trainer as an actor; its updates stay in the object store, and are handed on by reference."""

    def __init__(
        self,
        config: RunConfig,
        model_folder: Path,
        probe_ids: Sequence[int],
        weights: ClusterWeights,
        place: Place,
    ) -> None:
        super().__init__("trainer", actors.build_trainer, (config, model_folder, list(probe_ids)), place)
        self._weights = weights
        self.handle = TrainerClient(self._carry_out)

    async def _carry_out(self, method: str, arguments: tuple[object, ...]) -> object:
        value, weights = await self.call(method, arguments)
        if isinstance(value, PublishedVersion):
            return replace(value, update=await self._weights.sent(weights))
        return await self._weights.sent(weights) if method == "full_weights" else value


class RayScorer(ServedActor):
    """The dedicated scorer as an actor; a `DedicatedScorer`."""

    def __init__(
        self,
        config: RunConfig,
        model_folder: Path,
        probe_ids: Sequence[int],
        weights: ClusterWeights,
        place: Place,
    ) -> None:
        super().__init__("scorer", actors.build_scorer, (config, model_folder, list(probe_ids)), place)
        self._weights, self.window = weights, config.proximal.scorer_versions

    async def publish(self, version: PolicyVersion, update: WeightUpdate, probe_logps: NDArray[np.float32]) -> float:
        """Take over a version."""
        value, _ = await self.call("publish", (version, probe_logps), self._weights.reference(update))
        return cast(float, value)

    async def score_spans(self, pieces: Sequence[ScoringSpan], at: PolicyVersion) -> ScoredSpans:
        """Score pieces."""
        value, _ = await self.call("score_spans", (pieces, at))
        return cast(ScoredSpans, value)


@asynccontextmanager
async def open_ray(
    config: RunConfig, model_folder: Path, probe_ids: Sequence[int], sampler_seed: int, *, folder: Path
) -> AsyncIterator[Backend]:
    """Join or start a cluster and its actors; on leaving none of them stays behind, whatever happened."""
    e, r = config.engine, config.ray
    patience = Timeouts(
        recover_s=e.recover_s,
        request_s=e.request_timeout_s,
        control_s=e.control_timeout_s,
        start_s=r.start_timeout_s,
        max_restarts=e.max_restarts,
    )
    async with AsyncExitStack() as stack:
        stack.enter_context(cluster.connected(r, num_cpus=_needed_cpus(config)))
        weights = ClusterWeights()
        at_trainer, at_scorer, at_workers = await _places(config)
        trainer = RayTrainer(config, model_folder.resolve(), probe_ids, weights, at_trainer)
        scorer = RayScorer(config, model_folder.resolve(), probe_ids, weights, at_scorer) if at_scorer is not None else None
        spec = LaunchSpec(
            server=e.server if e.type == "vllm" else "embedded",
            model_path=str(model_folder.resolve()),
            numerics=e.precision,
            max_num_seqs=e.max_num_seqs,
            max_context=config.env.max_episode_tokens,
            flags=e.flags,
            python=e.python,
            log_folder=(folder / "servers").resolve(),
            seed=sampler_seed,
            adapter_scale=config.model.adapter_scale,
        )
        await trainer.ready(r.start_timeout_s)
        if scorer is not None:
            await scorer.ready(r.start_timeout_s)
        workers = Workers(config, _maker(config, spec, at_workers), folder, weights)
        engine = HttpEngine(
            workers.hosts,
            max_context=config.env.max_episode_tokens,
            numerics=e.precision,
            adapter_scale=config.model.adapter_scale,
            patience=patience,
            weights=weights,
        )
        workers.fleet = engine.fleet
        stack.push_async_callback(engine.close)
        await engine.start()
        watched: list[Coroutine[None, None, None]] = [engine.fleet.supervise(), workers.follow(), trainer.watch()]
        watched += [scorer.watch()] if scorer is not None else []
        tasks = tuple(map(asyncio.create_task, watched))
        stack.push_async_callback(_cancelled, tasks)

        def listen(hear: Callable[[Incident | Caution], None]) -> None:
            engine.fleet.listen = workers.warn = hear

        yield Backend(
            engine=engine,
            trainer=trainer.handle,
            run_environment=AwaitingRunner(latency_s=config.env.latency_s, seed=sampler_seed),
            engine_stats=engine.stats,
            clock=time.perf_counter,
            real_time=True,
            watch=lambda buffer: None,
            scorer=scorer,
            listen=listen,
            host_environment=lambda environment_class: stand_in(environment_class, workers),
            workers=tasks,
        )


async def _cancelled(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _needed_cpus(config: RunConfig) -> int:
    """CPUs that a cluster of this run alone is said to have: its actors share those that there are."""
    r = config.ray
    models = r.trainer_cpus * (1 + SOURCES.find(config.proximal.source).needs_scorer)
    return int(np.ceil(models + 4 * max(r.num_workers, 2) * r.worker_cpus)) + 1


async def _places(config: RunConfig) -> tuple[Place, Place | None, Sequence[Place]]:
    """Reserve the places of the trainer, of the dedicated scorer if there is one, and of the first workers.

    All are reserved before anything starts: a cluster without room for some is known before a model is loaded.

    Raises:
        ConfigError: The cluster has no room for them.
    """
    r = config.ray
    names = ["the trainer", "the scorer"] if config.proximal.source == "dedicated" else ["the trainer"]
    models: dict[str, Place] = {}
    for name in names:
        [models[name]] = await cluster.reserve(
            name, 1, cpus=r.trainer_cpus, gpus=r.trainer_gpus, strategy="PACK", timeout_s=r.start_timeout_s
        )
    workers = await cluster.reserve(
        f"{r.num_workers} workers ({r.placement})",
        r.num_workers,
        cpus=r.worker_cpus,
        gpus=r.worker_gpus,
        strategy=r.placement,
        timeout_s=r.start_timeout_s,
    )
    return models["the trainer"], models.get("the scorer"), workers


def _maker(config: RunConfig, spec: LaunchSpec, places: Sequence[Place]) -> Callable[[int], Actor]:
    """Return what makes the actor of a worker: the first ones in the places that are reserved, later ones anywhere."""
    r, env = config.ray, config.env
    amounts = {"cpus": r.worker_cpus, "gpus": r.worker_gpus}
    node = partial(_node, cluster.node_address())

    def make(number: int) -> Actor:
        place = places[number] if number < len(places) else cluster.anywhere(**amounts)
        own = replace(spec, seed=spec.seed + number)
        arguments = (own, f"worker-{number}", env.target, env.timeout_s, node)
        return Actor(actors.Worker, arguments, place=place, num_calls=1000)

    return make


def _node(home: str) -> actors.Node:
    """The node that this is called on; on the controller's own, servers listen for this machine alone."""
    address = cluster.node_address()
    return actors.Node(id=cluster.node_id(), address="127.0.0.1" if address == home else address)
