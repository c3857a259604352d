"""Environments that live elsewhere: here is a proxy for each, whose calls are carried out there.

    run_episode --reset, tool, reply, get_reward--> proxy --> place (a worker process)
                                                    |  the place is lost
                                                    '--> another place: a new environment, the same calls again

An environment that answers the recorded calls as before goes on as if nothing had happened. One that answers otherwise is
not the one that the trajectory knows: the trajectory begins again.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import itertools
import random
import threading
import weakref
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Protocol, TypeVar, cast

from oldlogits.core.environment import Environment
from oldlogits.envs.base import REMOTE_PROMPT, ToolErrors, prompt_of
from oldlogits.envs.given import REMOTE_TOOLS, schemas_now
from oldlogits.envs.tools import tool_names
from oldlogits.rollout.environment_errors import EnvironmentFailed, EnvironmentLost, answering, errors_of
from oldlogits.rollout.environment_runner import attempt, close_unbegun

T = TypeVar("T")


class PlaceLostError(Exception):
    """A place ended, with all its environments."""


class Place(Protocol):
    """Where environments live; a call to a place that is gone raises `PlaceLostError`, any other fault `EnvironmentFailed`."""

    async def open(self, id: int) -> None:
        """Make a new environment."""

    async def call(self, id: int, method: str, args: Sequence[object], kwargs: Mapping[str, object]) -> object:
        """Call a method of an environment."""

    def drop(self, id: int) -> None:
        """Forget an environment that nobody needs any more."""


class Places(Protocol):
    """The places there are."""

    async def choose(self) -> Place:
        """Return the one with the fewest environments; waits while there is none, and raises when there will be none."""


class RemoteEnvironment:
    """One environment, wherever it lives now."""

    def __init__(self, places: Places, id: int) -> None:
        self._places, self._id = places, id
        self._place: Place | None = None
        self._answered: list[tuple[str, Sequence[object], Mapping[str, object], object]] = []

    async def call(self, method: str, args: Sequence[object], kwargs: Mapping[str, object]) -> object:
        """Call a method, in another place if the environment's own is lost."""
        while True:
            try:
                place = self._place or await self._move()
                answer = await place.call(self._id, method, args, kwargs)
            except PlaceLostError:
                self._place = None
                continue
            self._answered.append((method, args, kwargs, answer))
            return answer

    async def _move(self) -> Place:
        """A new environment in another place, brought to where the old one was."""
        place = await self._places.choose()
        await place.open(self._id)
        for method, args, kwargs, answered in self._answered:
            try:
                answer = await place.call(self._id, method, args, kwargs)
            except EnvironmentFailed as failure:
                raise EnvironmentLost(f"its worker ended, and {method}, called again, failed: {failure}") from None
            if answer != answered:
                raise EnvironmentLost(f"its worker ended, and {method}, called again, answered otherwise")
        self._place = place
        return place

    def drop(self) -> None:
        """Forget the environment where it lives."""
        if self._place is not None:
            self._place.drop(self._id)


_numbers = itertools.count()


def remote_class(environment_class: type[Environment], places: Places) -> type[Environment]:
    """A class of the same methods, tools and prompts whose instances live in `places`."""

    def init(self: Environment) -> None:
        remote = RemoteEnvironment(places, next(_numbers))
        self._remote = remote  # type: ignore[attr-defined]
        weakref.finalize(self, remote.drop)

    body: dict[str, object] = {"__new__": lambda cls: object.__new__(cls), "__init__": init}
    body[REMOTE_PROMPT], body[REMOTE_TOOLS] = _forwarded(REMOTE_PROMPT, prompt_of), _forwarded(REMOTE_TOOLS, schemas_now)
    tools = tool_names(environment_class)
    for name in dir(environment_class):
        method = inspect.getattr_static(environment_class, name)
        if not name.startswith("_") and (name in tools or inspect.isfunction(method)):
            body[name] = _forwarded(name, method)
    made = type(environment_class.__name__, (environment_class,), body)
    return cast("type[Environment]", made)


def _forwarded(name: str, method: object) -> Callable[..., Awaitable[object]]:
    function = cast("Callable[..., object]", getattr(method, "__func__", method))  # of a static or class method

    @functools.wraps(function)
    async def call(self: Environment, *args: object, **kwargs: object) -> object:
        remote: RemoteEnvironment = self._remote  # type: ignore[attr-defined]
        return await remote.call(name, args, kwargs)

    if isinstance(method, staticmethod):
        signature = inspect.signature(function)
        own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        call.__signature__ = signature.replace(parameters=[own, *signature.parameters.values()])  # type: ignore[attr-defined]
    return call


def call_here(
    environment: object, method: str, args: Sequence[object], kwargs: Mapping[str, object], mode: ToolErrors
) -> object:
    """Carry out a call of a proxy on its environment; what its class or the recipe calls an answer is returned as `Raised`."""
    if method == REMOTE_PROMPT:
        return prompt_of(environment)
    if method == REMOTE_TOOLS:
        return schemas_now(environment)
    call = functools.partial(getattr(environment, method), *args, **kwargs)
    return answering(call, errors_of(cast("type", type(environment)), method, mode))()


class AwaitingRunner:
    """Runs calls of remote environments, whose places have the deadlines; tools take `latency_s` longer in the mean."""

    def __init__(self, *, latency_s: float, seed: int) -> None:
        self._latency_s, self._rng = latency_s, random.Random(seed)

    async def __call__(self, call: Callable[[], T | Awaitable[T]], *, is_tool: bool = False) -> T:
        """Wait for a call; raises `EnvironmentFailed` where it raised or took too long."""
        if is_tool and self._latency_s:
            await asyncio.sleep(self._rng.expovariate(1 / self._latency_s))
        if inspect.iscoroutinefunction(call):  # of a proxy: nothing of it runs here
            return await cast("Awaitable[T]", attempt(call))
        made: list[T | Awaitable[T]] = []
        is_left = threading.Event()

        def make() -> T | Awaitable[T]:
            made.append(attempt(call))
            if is_left.is_set():
                close_unbegun(made[0])
            return made[0]

        try:  # what runs here: the parser, and the types of tools and results
            result = await asyncio.to_thread(make)
        except asyncio.CancelledError:
            is_left.set()  # the thread goes on: whichever of the two comes second closes what it makes
            for one in made:
                close_unbegun(one)
            raise
        return await result if inspect.isawaitable(result) else result
