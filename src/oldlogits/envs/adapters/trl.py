"""Classes that were written for `environment_factory` of TRL's GRPOTrainer, unchanged: the adapter "trl".

What TRL's documentation promises of such a class holds: all public methods but `reset` and `get_reward` are tools; an exception
of a tool is an answer to the agent; the column `prompt` of the row is what the agent reads, followed by what `reset` returns; a
dict of classes is chosen from by the column `environment`; without rows the environment finds its own task.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Final, cast

from oldlogits.core.environment import ENVIRONMENTS, Environment, JsonValue, Row
from oldlogits.core.errors import EnvironmentShapeError
from oldlogits.envs.base import class_of
from oldlogits.envs.delegate import Delegate, Player, own_reward, then
from oldlogits.envs.tools import check_tool, public_names, schemas_of

_NO_TOOLS: Final = ("reset", "get_reward")


class _TrlEnvironment(Delegate):
    """Plays an environment of TRL."""

    tool_errors = (Exception,)

    @classmethod
    def player_of(cls, row: Row) -> tuple[Player | None, Row]:
        """Return who plays a row, and the columns that its `reset` takes: the prompt may be none of them."""
        player, given = super().player_of(row)
        if player is not None and not _takes_prompt(player.environment):
            given = {name: value for name, value in given.items() if name != "prompt"}
        return player, given

    def open(self, given: Row, row: Row) -> object:
        """Begin the episode; the opening is the prompt of the row with what `reset` returns behind it."""
        return then(super().open(given, row), partial(_opening, row.get("prompt")))


def adapt_trl(target: str) -> type[Environment]:
    """Make an environment class of a class for TRL, of a function that makes one, or of a dict of such by their names.

    Raises:
        ConfigError: The target does not exist.
        EnvironmentShapeError: It is none of these.
    """
    found = ENVIRONMENTS.find(target)
    several = found if isinstance(found, Mapping) else {"": found}
    players = {str(name): _player(factory, target) for name, factory in several.items()}
    classes = [player.environment for player in players.values()]
    body: dict[str, object] = {"players": players, "__doc__": inspect.getdoc(classes[0])}
    if any(hasattr(cls, "get_reward") for cls in classes):
        body["get_reward"] = own_reward
    if not isinstance(found, Mapping):
        body |= {"make_row": staticmethod(lambda split, index: {}), "tool_schemas": players[""].tools}
    return type(classes[0].__name__ if len(classes) == 1 else "Environments", (_TrlEnvironment,), body)


def _player(factory: object, target: str) -> Player:
    if not callable(factory):
        raise EnvironmentShapeError(
            f"{target} is no environment factory",
            got=repr(factory),
            allowed="a class, a function that makes an instance of one, or a dict of these by name",
            fix="name what environment_factory is given",
        )
    cls = factory if isinstance(factory, type) else class_of(factory, target)
    if not callable(inspect.getattr_static(cls, "reset", None)):
        raise EnvironmentShapeError(
            f"{cls.__name__} has no method reset",
            got=f"public names {public_names(cls)}",
            allowed="reset(self, **columns) -> str | None",
            fix="define reset",
        )
    names = [name for name in public_names(cls) if name not in _NO_TOOLS and inspect.isfunction(getattr(cls, name))]
    for name in names:
        check_tool(cls, name)
    return Player(environment=cls, make=factory, tools=schemas_of(cls, names))


def _takes_prompt(cls: type) -> bool:
    parameters = inspect.signature(cast("type[Environment]", cls).reset).parameters
    return "prompt" in parameters or any(one.kind is one.VAR_KEYWORD for one in parameters.values())


def _opening(prompt: JsonValue, observation: object) -> object:
    """The messages of the prompt; what `reset` returned is appended to the last one."""
    if prompt is None:
        return observation
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if observation is None or not isinstance(messages, list) or not messages or not isinstance(messages[-1], dict):
        return messages
    content = messages[-1].get("content")
    if isinstance(content, str) and isinstance(observation, str):
        return [*messages[:-1], {**messages[-1], "content": content + observation}]
    return [*messages[:-1], {**messages[-1], "content": [*_blocks(content), *_blocks(observation)]}]


def _blocks(content: object) -> list[object]:
    return list(content) if isinstance(content, list | tuple) else [{"type": "text", "text": content}]
