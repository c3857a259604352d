"""The part of Ray that the runtime uses: a connection, actors, values, places. The one file that imports ray."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from oldlogits.backends.local import ignoring_interrupts
from oldlogits.config.systems import RayConfig
from oldlogits.core.errors import ConfigError, OldLogitsError
from oldlogits.rollout.environment_errors import EnvironmentFailed
from oldlogits.rpc.child import BEAT_S

Ref = Any
"""A reference to a value that an actor returns, or that was put into the object store."""


class ClusterError(Exception):
    """What a reference stands for is lost, or cannot be sent."""


class ActorEndedError(ClusterError):
    """An actor has ended."""


class Actor:
    """An actor of a class, at a place of `on_node`, `reserve` or `anywhere`.

    Args:
        watched: Whether a second call, `beat`, may be carried out beside the others; classes with asynchronous methods
            carry out all calls beside each other anyway.
        num_calls: Calls of a class with asynchronous methods that may run beside each other; 0: the default.
    """

    def __init__(
        self, cls: type, arguments: Sequence[object], *, place: Mapping[str, Any], watched: bool = False, num_calls: int = 0
    ) -> None:
        made = ray.remote(concurrency_groups={"watch": 1})(cls) if watched else ray.remote(cls)
        options = {**place, **({"max_concurrency": num_calls} if num_calls else {})}
        self._watched = watched
        self._handle = made.options(**options).remote(*arguments)

    def call(self, method: str, *arguments: object, num_returns: int = 1) -> Ref:
        """Call a method; arguments that are references arrive as their values."""
        return getattr(self._handle, method).options(num_returns=num_returns).remote(*arguments)

    async def watch(self, heartbeat_timeout_s: float) -> None:
        """Wait until it ends or gives no heartbeat for so long, which is an `ActorEndedError`; a frozen one is killed."""
        options = {"concurrency_group": "watch"} if self._watched else {}
        await fetch(self._handle.beat.options(**options).remote())  # the first one waits until the actor has started
        while True:
            beat, silent_s = asyncio.ensure_future(fetch(self._handle.beat.options(**options).remote())), 0.0
            while not (await asyncio.wait({beat}, timeout=BEAT_S))[0]:
                silent_s += BEAT_S  # of waits, not of the clock: where this process was frozen too, that counts as one
                if silent_s >= heartbeat_timeout_s + BEAT_S:
                    self.kill()
                    raise ActorEndedError(f"no heartbeat for {heartbeat_timeout_s:g} s: it is frozen")
            beat.result()

    def kill(self) -> None:
        """End it at once."""
        with contextlib.suppress(ray.exceptions.RayError):
            ray.kill(self._handle)


async def fetch(ref: Ref) -> Any:
    """The value of a reference; a cancellation of the wait does not cancel the call.

    Raises:
        OldLogitsError: The actor raised it.
        EnvironmentFailed: The actor raised it.
        ActorEndedError: The actor that makes it has ended.
        ClusterError: It is lost, or cannot be sent.
    """
    try:
        return await asyncio.wrap_future(ref.future())
    except ray.exceptions.RayActorError as error:
        raise ActorEndedError(str(error).strip().splitlines()[0]) from error
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, OldLogitsError | EnvironmentFailed):
            raise error.cause from error
        raise ClusterError(str(error).strip().splitlines()[-1]) from error  # the end of a traceback
    except ray.exceptions.RayError as error:
        raise ClusterError(str(error).strip().splitlines()[0]) from error


def wait(refs: Sequence[Ref], timeout_s: float) -> None:
    """Wait for values, whatever they are."""
    ray.wait(list(refs), num_returns=len(refs), timeout=timeout_s)


def pack(something: object) -> bytes:
    """Make bytes of whatever Ray could send."""
    packed: bytes = ray.cloudpickle.dumps(something)
    return packed


def put(something: object) -> Ref:
    """Put a value into the object store."""
    return ray.put(something)


def node_id() -> str:
    """Return the id of the node that this is called on."""
    return str(ray.get_runtime_context().get_node_id())


def node_address() -> str:
    """Return the address of the node that this is called on."""
    return str(ray.util.get_node_ip_address())


def anywhere(*, cpus: float, gpus: float) -> Mapping[str, Any]:
    """A place on whatever node has room, nodes with few actors first."""
    return {"num_cpus": cpus, "num_gpus": gpus, "scheduling_strategy": "SPREAD"}


def on_node(node: str) -> Mapping[str, Any]:
    """A place on a node, for what reserves nothing."""
    return {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}


async def reserve(what: str, num: int, *, cpus: float, gpus: float, strategy: str, timeout_s: float) -> list[Mapping[str, Any]]:
    """Return places that are reserved together, as soon as the cluster has given them; no process has started there yet.

    Raises:
        ConfigError: The cluster has no room for `what` they are for.
    """
    bundle = {"CPU": max(cpus, 1e-3), **({"GPU": gpus} if gpus else {})}
    group = placement_group([bundle] * num, strategy=strategy)
    try:
        async with asyncio.timeout(timeout_s):
            await fetch(group.ready())  # `group.wait` would hold a thread, at times beyond its own time limit
    except TimeoutError:
        raise ConfigError(
            f"the cluster gives no place to {what}",
            got=f"{free()} free after {timeout_s:g} s",
            allowed="what ray.num_workers, worker_cpus, worker_gpus, trainer_cpus and trainer_gpus ask for",
            fix="lower them, add nodes, or look for other users of the cluster with `ray status`",
        ) from None
    strategies = [PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=i) for i in range(num)]
    return [{"num_cpus": bundle["CPU"], "num_gpus": gpus, "scheduling_strategy": place} for place in strategies]


def free() -> str:
    """Return what the cluster has free."""
    amounts = ray.available_resources().items()
    return ", ".join(f"{amount:g} {name}" for name, amount in amounts if name in ("CPU", "GPU")) or "nothing"


@contextmanager
def connected(config: RayConfig, *, num_cpus: int) -> Iterator[None]:
    """A connection to the cluster of the recipe, or to one on this machine that lives as long as the connection.

    Such a cluster of its own is said to have `num_cpus`.

    Raises:
        ConfigError: The cluster is not there.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # else the trainer gives way to everything else on its machine
    variables = {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path), "OMP_NUM_THREADS": "1"}
    own = {} if config.address else {"num_cpus": num_cpus, "include_dashboard": False}
    try:
        with ignoring_interrupts():
            ray.init(
                address=config.address or "local",
                runtime_env={"env_vars": variables},
                log_to_driver=False,
                configure_logging=False,
                **own,
            )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError(
            "there is no cluster to run on",
            got=f"ray.address = '{config.address}': {str(error).strip().splitlines()[0]}",
            allowed="the address of a running cluster, or none",
            fix="start it with `ray start --head`, or remove ray.address",
        ) from error
    try:
        yield
    finally:
        ray.shutdown()
