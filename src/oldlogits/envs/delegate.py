"""Environments that another one plays behind: several of them in one run by the row, and what adapters are made of."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final, TypeVar, cast

from oldlogits.core.environment import (
    ConversingEnvironment,
    Environment,
    ExplainingEnvironment,
    JsonValue,
    Row,
    SavedEnvironment,
)
from oldlogits.core.parser import Malformed, ToolCall
from oldlogits.envs.given import GivingEnvironment, gives_tools, schemas_now
from oldlogits.envs.tools import bind_method, can_be_saved, tool_schemas

T = TypeVar("T")

BY: Final = "environment"
"""The key of a row that says which environment plays it, where there are several."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Player:
    """An environment that plays behind another one: its class, what makes it, and its tools unless each episode has its own."""

    environment: type[Environment]
    make: Callable[[], object]
    tools: Sequence[Row]


class Delegate:
    """An environment behind which another one plays: one of `players`, where there are several by the key `BY` of the row."""

    players: ClassVar[Mapping[str, Player]]
    tool_schemas: Sequence[Row] = ()
    played: object
    _name: str

    @classmethod
    def player_of(cls, row: Row) -> tuple[Player | None, Row]:
        """Return who plays a row, and what of the row its `reset` is given."""
        if len(cls.players) == 1:
            return next(iter(cls.players.values())), row
        return cls.players.get(str(row.get(BY))), {key: value for key, value in row.items() if key != BY}

    def reset(self, **row: JsonValue) -> object:
        """Begin the episode of a row."""
        self._name = str(row.get(BY)) if len(self.players) > 1 else next(iter(self.players))
        player, given = self.player_of(row)
        if player is None:
            raise LookupError(f"no environment {self._name}; there are {', '.join(self.players)}")
        self.played = player.make()
        return then(self.open(given, row), self._opened)

    def open(self, given: Row, row: Row) -> object:
        """Begin the episode of the environment that plays."""
        return cast(Environment, self.played).reset(**given)

    def _opened(self, opening: T) -> T:
        gives = gives_tools(type(self.played))
        self.tool_schemas = schemas_now(self.played) if gives else self.players[self._name].tools
        return opening

    def call_tool(self, name: str, arguments: Row) -> object:
        """Carry out a call, whose arguments are checked and converted as those of any tool."""
        if gives_tools(type(self.played)):
            return cast(GivingEnvironment, self.played).call_tool(name, arguments)
        ready = bind_method(self.played, ToolCall(name=name, named=arguments))
        return ready.reason if isinstance(ready, Malformed) else ready()


def mixture_of(classes: Mapping[str, type[Environment]]) -> type[Environment]:
    """Return an environment class that plays each row as the class that the row names by the key `BY`."""
    players = {name: Player(environment=c, make=c, tools=tool_schemas(c)) for name, c in classes.items()}
    errors = [getattr(c, "tool_errors", ()) for c in classes.values()]
    body: dict[str, object] = {
        "__doc__": f"Several environments: {', '.join(players)}.",
        "players": players,
        "tool_errors": tuple({one for each in errors for one in (each if isinstance(each, tuple) else (each,))}),
        "get_reward": own_reward,
        "reply": _reply,
        "system_prompt": property(_prompt),
    }
    if any(hasattr(c, "explain_reward") for c in classes.values()):
        body["explain_reward"] = _explain
    if all(map(can_be_saved, classes.values())):
        body |= {"save_state": _save_state, "load_state": _load_state}
    return type("Mixture", (Delegate,), body)


def players_of(environment: type[Environment]) -> dict[str, type[Environment]]:
    """Return the classes that play behind a class, by name; the class itself where none does."""
    if not issubclass(environment, Delegate):
        return {"": environment}
    return {name: player.environment for name, player in environment.players.items()}


def toolsets_of(environment: type[Environment]) -> list[Sequence[Row]]:
    """Return the tools of each class that plays behind a class, or its own, as far as they are known before an episode."""
    if not issubclass(environment, Delegate):
        return [tool_schemas(environment)]
    return [player.tools for player in environment.players.values()]


def then(value: object, do: Callable[..., T]) -> T:
    """Return what `do` makes of a value; of one that is awaited, an awaitable of that."""
    if not inspect.isawaitable(value):
        return do(value)

    async def later() -> object:
        result = do(await cast("Awaitable[object]", value))
        return await result if inspect.isawaitable(result) else result

    return cast(T, later())


def own_reward(self: Delegate) -> object:
    """The environment's own reward; None where it has none."""
    own = getattr(self.played, "get_reward", None)
    return None if own is None else cast("Callable[[], object]", own)()


def _reply(self: Delegate, message: str) -> object:
    """The answer of the partner; there is none where the environment has no `reply`."""
    if not hasattr(self.played, "reply"):
        raise NotImplementedError
    return cast(ConversingEnvironment, self.played).reply(message)


def _explain(self: Delegate) -> str:
    if not hasattr(self.played, "explain_reward"):
        raise NotImplementedError
    return cast(ExplainingEnvironment, self.played).explain_reward()


def _prompt(self: Delegate) -> object:
    written = getattr(self.played, "system_prompt", "")
    return written() if callable(written) else written


def _save_state(self: Delegate) -> object:
    state = cast(SavedEnvironment, self.played).save_state()
    return then(state, lambda saved: {BY: self._name, "state": saved})


def _load_state(self: Delegate, state: JsonValue) -> object:
    saved = cast(Row, state)
    self._name = str(saved[BY])
    self.played = self.players[self._name].make()
    load: Callable[[JsonValue], object] = cast(SavedEnvironment, self.played).load_state
    return then(load(saved["state"]), self._opened)
