"""The trainer and the dedicated scorer as actors: the Ray transport of their calls.

Weights stay in the object store: those of an argument are passed by reference, and those of a reply are handed on by reference.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from oldlogits.backends.packed import Aside, put_back, set_aside
from oldlogits.backends.ray import actors
from oldlogits.backends.ray.cluster import Actor, ActorEndedError, fetch
from oldlogits.backends.ray.weights import ClusterWeights
from oldlogits.core.errors import ConfigError, WorkerDiedError
from oldlogits.rpc.child import READY
from oldlogits.rpc.client import CarryOut
from oldlogits.train.reports import PublishedVersion


class ActorCalls:
    """Starts an actor that carries out calls, which `build` makes there, and is their transport."""

    def __init__(
        self,
        name: str,
        build: Callable[..., CarryOut],
        arguments: tuple[object, ...],
        *,
        weights: ClusterWeights,
        place: Mapping[str, Any],
        heartbeat_timeout_s: float = 60.0,
    ) -> None:
        self._name, self._weights, self._heartbeat_timeout_s = name, weights, heartbeat_timeout_s
        self._actor = Actor(actors.Calls, (name, build, arguments), place=place, watched=True)

    async def ready(self, start_s: float) -> None:
        """Wait until it is built; raises why it cannot be, or `ConfigError` where it takes longer than `start_s`."""
        try:
            async with asyncio.timeout(start_s):
                await self.call(READY, ())
        except TimeoutError:
            raise ConfigError(
                f"the {self._name} has its place on the cluster and is still starting",
                got=f"it is not ready after {start_s:g} s",
                allowed="a process that has loaded its packages and the model within ray.start_timeout_s",
                fix="raise ray.start_timeout_s, or look for what else keeps its node busy",
            ) from None

    async def call(self, method: str, arguments: tuple[object, ...]) -> object:
        """Carry out a call, after those that were made before."""
        parted = [set_aside(argument) for argument in arguments]
        rest = tuple(argument for argument, _ in parted)
        beside = next((self._weights.reference(update) for _, update in parted if update is not None), None)
        answered, weights = self._actor.call("call", method, rest, beside, num_returns=2)
        try:
            value: object = await fetch(answered)
        except ActorEndedError as error:
            raise self._died(error) from error
        return put_back(value, await self._weights.sent(weights)) if isinstance(value, Aside | PublishedVersion) else value

    async def watch(self) -> None:
        """Wait until it ends by itself or is frozen, which is a `WorkerDiedError`."""
        try:
            await self._actor.watch(self._heartbeat_timeout_s)
        except ActorEndedError as error:
            raise self._died(error) from error

    def _died(self, error: Exception) -> WorkerDiedError:
        return WorkerDiedError(
            f"the {self._name} actor ended",
            got=str(error).strip().splitlines()[0],
            allowed=f"a {self._name} that runs until the end of the run",
            fix="look for an out-of-memory kill or a lost node; go on with --resume from the last checkpoint",
        )
