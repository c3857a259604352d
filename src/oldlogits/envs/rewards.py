"""Rewards beside the environment class: functions that a recipe names, of one episode or of a whole group."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Final, Protocol, cast

from oldlogits.core.environment import Environment, Row
from oldlogits.core.errors import EnvironmentShapeError
from oldlogits.core.registry import Registry
from oldlogits.envs.delegate import Delegate, then

Messages = Sequence[Mapping[str, str]]
"""``{"role": ..., "content": ...}`` each, after the first prompt: the agent's turns and what it read."""


class EpisodeReward(Protocol):
    """The reward of one episode; it may be asynchronous."""

    def __call__(self, **of: object) -> object:
        """Return a number for ``(environment, **row)``, and `messages` if it has that parameter.

        A function without a parameter `environment` is one of TRL's: given `prompts`, `completions`, `environments` and the
        columns of the row as lists of one, it returns a list of one.
        """


class GroupReward(Protocol):
    """The rewards of a whole group: all episodes of one row."""

    def __call__(self, *, row: Row, messages: Sequence[Messages], rewards: Sequence[float]) -> Sequence[float]:
        """Return the reward of every episode, given its messages and its own reward."""


REWARDS: Final[Registry[EpisodeReward]] = Registry("reward function", key="env.reward", builtin={})
"""What `env.reward` names."""

GROUP_REWARDS: Final[Registry[GroupReward]] = Registry("group reward", key="env.group_reward", builtin={})
"""What `env.group_reward` names."""


@functools.cache
def takes_messages(environment: type) -> bool:
    """Return whether `get_reward` of a class wants the messages of the episode: it has a parameter of that name."""
    return "messages" in inspect.signature(environment.get_reward).parameters  # type: ignore[attr-defined]


def with_reward(environment: type, name: str) -> type[Environment]:
    """Return the same environment whose reward is that of a function, added to its own where it has one.

    Args:
        environment: A class, with or without `get_reward`.
        name: "package.module:function".

    Raises:
        ConfigError: There is no such function.
    """
    reward, inner = REWARDS.find(name), cast("type[Environment]", environment)
    parameters = inspect.signature(reward).parameters
    has_own, is_plain = hasattr(environment, "get_reward"), "environment" in parameters

    def said(messages: Messages) -> dict[str, object]:
        return {"messages": list(messages)} if "messages" in parameters else {}

    @functools.wraps(inner.reset)
    def reset(self: Environment, **row: object) -> object:
        def opened(opening: object) -> object:
            self._oldlogits_asked = (row, opening)  # type: ignore[attr-defined]
            return opening

        return then(inner.reset(self, **row), opened)

    def get_reward(self: Environment, messages: Messages) -> object:
        row, opening = self._oldlogits_asked  # type: ignore[attr-defined]
        played = self.played if isinstance(self, Delegate) else self
        ask: Callable[..., object] = inner.get_reward if has_own else lambda self: None
        owned = ask(self, messages=messages) if has_own and takes_messages(inner) else ask(self)
        if is_plain:
            given = reward(**row | said(messages) | {"environment": played})
        else:
            given = reward(**_as_trl(played, row, opening, messages))
        return then(owned, lambda own: then(given, partial(_summed, own, is_listed=not is_plain)))

    body = {"reset": reset, "get_reward": get_reward, "__doc__": environment.__doc__, "__module__": environment.__module__}
    return type(environment.__name__, (environment,), body)


def load_group_reward(environment: type, name: str) -> GroupReward | None:
    """Return what makes the rewards of a group: the function of the recipe, else `get_group_rewards` of the class, else None.

    Raises:
        ConfigError: There is no such function.
        EnvironmentShapeError: The method of the class is no static method.
    """
    if name:
        return GROUP_REWARDS.find(name)
    written = inspect.getattr_static(environment, "get_group_rewards", None)
    if written is not None and not isinstance(written, staticmethod):
        raise EnvironmentShapeError(
            f"{environment.__name__}.get_group_rewards is no static method",
            got=type(written).__name__,
            allowed="@staticmethod get_group_rewards(*, row, messages, rewards) -> list of numbers",
            fix="write @staticmethod above it",
        )
    return None if written is None else cast(GroupReward, written.__func__)


def _as_trl(played: object, row: Mapping[str, object], opening: object, messages: Messages) -> dict[str, object]:
    """The arguments of a reward function of TRL, for a batch of one episode."""
    prompt = opening if isinstance(opening, list) else [{"role": "user", "content": opening or ""}]
    columns = {name: [value] for name, value in row.items() if name not in ("prompt", "completion", "completion_ids")}
    return {
        **columns,
        "prompts": [prompt],
        "completions": [list(messages)],
        "completion_ids": [[]],
        "environments": [played],
        "trainer_state": None,
        "log_extra": lambda column, values: None,
        "log_metric": lambda name, value: None,
    }


def _summed(owned: object, given: object, *, is_listed: bool) -> float:
    """The sum of an environment's own reward and that of a function, which says None where it does not apply."""
    if is_listed:
        if not isinstance(given, list | tuple) or len(given) != 1:
            raise ValueError(f"the reward function returned {given!r:.200} for one episode, not a list of one number")
        given = given[0]
    parts = [cast(float, part) for part in (owned, given) if part is not None]
    return sum(parts[1:], parts[0]) if parts else cast(float, None)
