"""The backend "ray": trainer, dedicated scorer, rollout workers and the store of weights as actors of a Ray cluster.

Workers that end are started again within `engine.max_restarts`; `oldlogits workers` changes how many there are. The end of the
trainer or the scorer ends the run. Nothing here waits without a deadline or a watch on who is waited for.

    controller (this process, no model)
        |--calls--> trainer actor --update--> object store --once a node--> NodeWeightCache --> servers of the node
        |--calls--> scorer actor  <---------------'                             ^
        |--HTTP---> server of a worker: samples                                 '-- store: for those behind, or new
        '--calls--> environments of a worker
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from oldlogits.backends.local import cancel
from oldlogits.backends.processes import build_scorer, build_trainer, scorer_client
from oldlogits.backends.ray import actors, cluster
from oldlogits.backends.ray.calls import ActorCalls
from oldlogits.backends.ray.cluster import Actor
from oldlogits.backends.ray.remote_environments import AwaitingRunner, remote_class
from oldlogits.backends.ray.weights import ClusterWeights
from oldlogits.backends.ray.workers import Workers
from oldlogits.config.guard import Caution
from oldlogits.core.engine import ServerOptions
from oldlogits.core.engine_stats import Incident
from oldlogits.core.server import LaunchSpec
from oldlogits.engines.http.engine import HttpEngine
from oldlogits.loop.backend import Backend, BackendSpec
from oldlogits.rpc.client import client
from oldlogits.train.calls import TrainerCalls

Place = Mapping[str, Any]


@asynccontextmanager
async def open_ray(spec: BackendSpec) -> AsyncIterator[Backend]:
    """Join or start a cluster and its actors; on leaving none of them stays behind, whatever happened."""
    async with AsyncExitStack() as stack:
        stack.enter_context(cluster.connected(spec.ray, num_cpus=_needed_cpus(spec)))
        weights = ClusterWeights()
        model_places, worker_places = await _reserve(spec)
        trainer, scorer = _models(spec, weights, model_places)
        models = [trainer] if scorer is None else [trainer, scorer]
        for model in models:
            await model.ready(spec.ray.start_timeout_s)
        servers = _servers(spec)
        workers = Workers(
            _maker(spec, servers, worker_places),
            spec.folder,
            weights,
            num_workers=spec.ray.num_workers,
            environment_timeout_s=spec.env.timeout_s,
            servers=servers,
        )
        engine = HttpEngine(workers.replicas, spec.sampler, servers.timeouts, weights)
        workers.fleet = engine.fleet
        stack.push_async_callback(engine.close)
        await engine.start()
        watched = tuple(map(asyncio.create_task, [engine.supervise(), workers.follow(), *(model.watch() for model in models)]))
        stack.push_async_callback(cancel, watched)

        def listen(hear: Callable[[Incident | Caution], None]) -> None:
            engine.fleet.listen = workers.warn = hear

        yield Backend(
            engine=engine,
            trainer=client(TrainerCalls, trainer),  # type: ignore[type-abstract]
            run_environment=AwaitingRunner(latency_s=spec.env.latency_s, seed=spec.sampler.seed),
            scorer=scorer_client(spec.scorer, scorer),
            workers=watched,
            listen=listen,
            host_environment=partial(remote_class, places=workers),
        )


def _models(spec: BackendSpec, weights: ClusterWeights, places: Sequence[Place]) -> tuple[ActorCalls, ActorCalls | None]:
    """Start the actors that hold a model: the trainer, and the dedicated scorer where the source asks one."""
    where = (spec.model_folder.resolve(), spec.probe_ids)
    start = partial(ActorCalls, weights=weights, heartbeat_timeout_s=spec.runtime.heartbeat_timeout_s)
    trainer = start("trainer", build_trainer, (spec.trainer, *where), place=places[0])
    if spec.scorer is None:
        return trainer, None
    return trainer, start("scorer", build_scorer, (spec.scorer, *where), place=places[1])


def _servers(spec: BackendSpec) -> ServerOptions:
    """What the workers' servers are: the engine's own, or those that offer an engine without servers."""
    own = spec.servers.protocol if spec.engine.has_servers else spec.engine.served_by
    timeouts = replace(spec.servers.timeouts, start_s=spec.ray.start_timeout_s)
    return replace(spec.servers, protocol=own, log_folder=spec.servers.log_folder.resolve(), timeouts=timeouts)


def _needed_cpus(spec: BackendSpec) -> int:
    """CPUs that a cluster of this run alone is said to have: its actors share those that there are."""
    r = spec.ray
    models = r.trainer_cpus * (1 if spec.scorer is None else 2)
    return math.ceil(models + 4 * max(r.num_workers, 2) * r.worker_cpus) + 1


async def _reserve(spec: BackendSpec) -> tuple[list[Place], list[Place]]:
    """Reserve the places of models and workers before anything starts: what has no room is known before a model is loaded."""
    r = spec.ray
    of_model = partial(cluster.reserve, num=1, cpus=r.trainer_cpus, gpus=r.trainer_gpus, strategy="PACK")
    names = ["the trainer"] if spec.scorer is None else ["the trainer", "the scorer"]
    models = [place for name in names for place in await of_model(name, timeout_s=r.start_timeout_s)]
    workers = await cluster.reserve(
        f"{r.num_workers} workers ({r.placement})",
        r.num_workers,
        cpus=r.worker_cpus,
        gpus=r.worker_gpus,
        strategy=r.placement,
        timeout_s=r.start_timeout_s,
    )
    return models, workers


def _maker(spec: BackendSpec, servers: ServerOptions, places: Sequence[Place]) -> Callable[[int], Actor]:
    """Return what makes the actor of a worker: the first ones in the places that are reserved, later ones anywhere."""
    r, sampler = spec.ray, spec.sampler
    anywhere = partial(cluster.anywhere, cpus=r.worker_cpus, gpus=r.worker_gpus)
    node = partial(_node, cluster.node_address())

    def make(number: int) -> Actor:
        place = places[number] if number < len(places) else anywhere()
        launch = LaunchSpec(engine=replace(sampler, seed=sampler.seed + number), servers=servers)
        arguments = (launch, f"worker-{number}", spec.env, node, cluster.pack)
        return Actor(actors.Worker, arguments, place=place, num_calls=1000)

    return make


def _node(home: str) -> tuple[str, str]:
    """The node that this is called on, and its address; on the controller's own, servers listen for this machine alone."""
    address = cluster.node_address()
    return cluster.node_id(), "127.0.0.1" if address == home else address
