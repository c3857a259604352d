"""The seam of environments: what the rollout needs of one, and how a recipe names one.

    class Desk:
        system_prompt = "..."                            # optional
        def reset(self, **row) -> str | None             # the first user message
        def get_reward(self) -> float
        def reply(self, message) -> str | None           # optional: the conversation partner; None ends the episode
        def any_other_public_method(self, order: str)    # a tool, with a docstring; it may be async

`env.target` says which environment, and `env.adapter` how its words become such a class: the built-in adapter "class"
imports one that is written in this shape; another one wraps what was written for another project.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final, Literal, Protocol, TypeAlias, runtime_checkable

from oldlogits.core.registry import Registry
from oldlogits.core.starting_model import ModelOrder

JsonValue: TypeAlias = "bool | int | float | str | list[JsonValue] | dict[str, JsonValue] | None"
Row: TypeAlias = dict[str, JsonValue]
Split = Literal["train", "heldout"]


class Environment(Protocol):
    """What every environment has. Its tools are its other public methods."""

    @property
    def reset(self) -> Callable[..., str | None]:
        """``reset(**row)`` starts an episode and returns the first user message, if there is one."""

    def get_reward(self) -> float:
        """Return the reward of the episode so far."""


class ConversingEnvironment(Environment, Protocol):
    """An environment with a conversation partner."""

    def reply(self, message: str) -> str | None:
        """Return the partner's answer to an agent's message; None ends the episode."""


class ExplainingEnvironment(Environment, Protocol):
    """An environment that says why its reward is what it is; ``oldlogits play`` prints it."""

    def explain_reward(self) -> str:
        """Return the reasons of the reward, in words for a person."""


@runtime_checkable
class RowSource(Protocol):
    """An environment class that makes its own rows."""

    @staticmethod
    def make_row(split: Split, index: int) -> Row:
        """Return row `index` of a split: JSON-able arguments of `reset`, the same for the same arguments."""


@runtime_checkable
class Demonstrated(Protocol):
    """An environment class with demonstrations, on which a model folder can be trained before the run."""

    @staticmethod
    def warm_start(order: ModelOrder) -> Path:
        """Train the model of `order.folder` for `order.steps` steps on demonstrations; return the folder of the result."""


@runtime_checkable
class Scripted(Protocol):
    """An environment class with a scripted agent that makes no mistake; ``oldlogits play`` can watch it."""

    @staticmethod
    def make_oracle() -> Callable[[str], str]:
        """Return an agent for one episode: it is given what the agent reads and returns what the agent writes."""


class EnvironmentAdapter(Protocol):
    """Makes an environment class of what `env.target` says.

    ``ENVIRONMENTS.find(target)`` imports what a target names in Python; an adapter may as well read it as an address or a file.
    """

    def __call__(self, target: str) -> type[Environment]:
        """Return the class that the words of `env.target` say; every instance of it plays one episode.

        Raises:
            ConfigError: The target names nothing that this adapter can find.
            EnvironmentShapeError: What it names cannot become an environment.
        """


ENVIRONMENTS: Final[Registry[object]] = Registry(
    "environment",
    key="env.target",
    builtin={
        "desk": "order_desk.environment:OrderDesk",
        "desk_long": "order_desk.environment:LongOrderDesk",
        "desk_slow": "order_desk.slow:SlowOrderDesk",
    },
)
"""The environments that `env.target` names: those of the example that is installed with this package."""

ADAPTERS: Final[Registry[EnvironmentAdapter]] = Registry(
    "environment adapter", key="env.adapter", builtin={"class": "oldlogits.envs.base:import_environment"}
)
"""What `env.adapter` names."""
