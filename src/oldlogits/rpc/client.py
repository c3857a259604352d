"""A typed client made from a Protocol, and what carries out its calls.

Nothing but the methods of the Protocol can be called.

    class TrainerCalls(Protocol):                 written once: the asynchronous face of an object
        async def train(self, scored): ...

    trainer = client(TrainerCalls, transport)     has the methods of the Protocol, for mypy and for "go to definition"
    await trainer.train(scored)
        -> transport.call("train", (scored,))     inline, a pipe, a Ray actor
        -> Dispatcher(TrainerCalls, target).call  calls target.train(scored), which is an ordinary method
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar, cast

from oldlogits.core.errors import UnknownCallError

T = TypeVar("T")

CarryOut = Callable[[str, tuple[object, ...]], object]
"""Carries out a call: the name of a method, and its arguments."""


class Transport(Protocol):
    """Brings calls to where they are carried out."""

    async def call(self, method: str, arguments: tuple[object, ...]) -> object:
        """Call a method; returns its value, or raises its error."""


class Inline:
    """A transport within this process: `carry_out`, such as `Dispatcher.call`, has done a call before anything else goes on."""

    def __init__(self, carry_out: CarryOut) -> None:
        self._carry_out = carry_out

    async def call(self, method: str, arguments: tuple[object, ...]) -> object:
        """Call a method here and now."""
        return self._carry_out(method, arguments)


class Client:
    """The base of all clients: it has the values of the Protocol's properties, and counts the calls that are in progress."""

    def __init__(self, transport: Transport, **attributes: object) -> None:
        self._transport, self._num_calls = transport, 0
        vars(self).update(attributes)

    @property
    def is_idle(self) -> bool:
        """Whether no call is being carried out."""
        return self._num_calls == 0

    async def _call(self, method: str, arguments: tuple[object, ...]) -> object:
        self._num_calls += 1
        try:
            return await self._transport.call(method, arguments)
        finally:
            self._num_calls -= 1


def client(protocol: type[T], transport: Transport, **attributes: object) -> T:
    """Make a client of a Protocol.

    Args:
        protocol: Its coroutine methods become calls; their parameters are positional.
        transport: Brings the calls to where they are carried out.
        attributes: A value for each property of the Protocol, but for `is_idle`, which a client has by itself.

    Example:
        >>> import asyncio
        >>> class Adds(Protocol):
        ...     async def add(self, a: int, b: int = 1) -> int: ...
        >>> asyncio.run(client(Adds, Inline(lambda method, arguments: sum(arguments))).add(2))
        3
    """
    unset = _members(protocol) - calls_of(protocol) - set(attributes) - set(dir(Client))
    assert not unset, f"{protocol.__name__} wants a value of {', '.join(sorted(unset))}"
    return cast(T, _client_class(protocol)(transport, **attributes))


def calls_of(protocol: type) -> frozenset[str]:
    """The names of a Protocol's coroutine methods: what a client may call."""
    return frozenset(name for name in _members(protocol) if inspect.iscoroutinefunction(getattr(protocol, name)))


class Dispatcher:
    """Carries out the calls of a Protocol on ordinary objects; of two that have the same method, the first is called."""

    def __init__(self, protocol: type, *targets: object) -> None:
        self._owners = {name: next((t for t in targets if hasattr(t, name)), None) for name in calls_of(protocol)}
        lacking = sorted(name for name, owner in self._owners.items() if owner is None)
        assert not lacking, f"nobody has {', '.join(lacking)} of {protocol.__name__}"

    def call(self, method: str, arguments: tuple[object, ...]) -> object:
        """Call a method of the Protocol; another one is an `UnknownCallError`."""
        if method not in self._owners:
            raise UnknownCallError(
                "a process was asked for a call that it does not offer",
                got=repr(method),
                allowed=", ".join(sorted(self._owners)),
                fix="the two sides are of different versions of this package: install the same one everywhere",
            )
        return getattr(self._owners[method], method)(*arguments)


def _members(protocol: type) -> frozenset[str]:
    return frozenset(name for name in dir(protocol) if not name.startswith("_"))


def _client_class(protocol: type) -> type[Client]:
    methods = {name: _forwarder(name, getattr(protocol, name)) for name in calls_of(protocol)}
    return type(f"{protocol.__name__}Client", (Client,), {"__doc__": protocol.__doc__, **methods})


def _forwarder(name: str, method: Callable[..., object]) -> Callable[..., Awaitable[object]]:
    signature = inspect.signature(method)
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    assert kinds == {inspect.Parameter.POSITIONAL_OR_KEYWORD}, f"the parameters of {name} are positional"

    @functools.wraps(method)
    async def call(self: Client, *arguments: object, **named: object) -> object:
        bound = signature.bind(self, *arguments, **named)
        bound.apply_defaults()
        return await self._call(name, bound.args[1:])

    return call
