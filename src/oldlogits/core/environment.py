"""The seams of environments and starting models: what a run needs of them, and how a recipe names them.

The shape of an environment class, whose public methods are its tools, is described in docs/environments.md. `env.target` says
which environment, and `env.adapter` how its words become such a class: the built-in adapter "class" imports one that is
written in this shape; another one wraps what was written for another project.

`model.path` is a folder, a built-in name of `MODELS`, or "package.module:function". A function is enough; an object that is
called may say more about its model (`DescribedModel`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Final, Literal, Protocol, TypeAlias, runtime_checkable

from annotated_types import Ge, Le

from oldlogits.core.registry import Registry

JsonValue: TypeAlias = "bool | int | float | str | list[JsonValue] | dict[str, JsonValue] | None"
Row: TypeAlias = dict[str, JsonValue]
Split = Literal["train", "heldout"]


class Environment(Protocol):
    """What every environment has. Its tools are its other public methods."""

    @property
    def reset(self) -> Callable[..., object]:
        """``reset(**row)`` starts an episode and returns the first user message, if there is one, or a list of messages."""

    def get_reward(self) -> float:
        """Return the reward of the episode so far."""


class ConversingEnvironment(Environment, Protocol):
    """An environment with a conversation partner."""

    def reply(self, message: str) -> str | None:
        """Return the partner's answer to an agent's message; None ends the episode."""


class TurnRewardingEnvironment(Environment, Protocol):
    """An environment with a reward for every turn, besides that of the episode."""

    def get_turn_reward(self) -> float:
        """Return the reward of the turn that was just answered."""


class SavedEnvironment(Environment, Protocol):
    """An environment that can be saved in mid-episode, so that a run that was ended goes on with it."""

    def save_state(self) -> JsonValue:
        """Return everything that the episode has changed, as JSON can write it."""

    def load_state(self, state: JsonValue) -> None:
        """Be as the environment was that returned `state`; called on a new instance in place of `reset`."""


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
    "environment adapter",
    key="env.adapter",
    builtin={
        "class": "oldlogits.envs.base:import_environment",
        "trl": "oldlogits.envs.adapters.trl:adapt_trl",
        "mcp": "oldlogits.envs.mcp.environment:adapt",
        "tau2": "oldlogits.envs.tau2.checkout:adapt",
        "vitabench": "oldlogits.envs.vitabench:adapt",
        "verifiers": "oldlogits.envs.adapters.verifiers:adapt",
    },
)
"""What `env.adapter` names."""

Program = Callable[..., object]
"""``function(base_url, api_key, row)``, which may be asynchronous: it plays an episode, and returns its reward."""


@runtime_checkable
class ProgramSource(Protocol):
    """An environment class whose episodes a program of its own plays; its rows are the ones that the program takes."""

    program: ClassVar[Program]


@runtime_checkable
class FiniteRowSource(Protocol):
    """An environment class that has the rows of each split."""

    rows: ClassVar[Mapping[Split, list[Row]]]


@runtime_checkable
class ServedProgram(Protocol):
    """A program that shares something among its episodes, such as servers."""

    def serving(self) -> AbstractAsyncContextManager[None]:
        """Hold it; the program is called meanwhile."""


PROGRAMS: Final[Registry[Program]] = Registry("agent program", key="env.program", builtin={})
"""What `env.program` names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class McpServer:
    """A server of the Model Context Protocol: one that is started for every episode, or one that runs.

    Args:
        command: The program that is started, with its arguments; it talks over its standard input and output.
        url: The address of a server that runs, which is talked to over streamable HTTP.
        env: Variables for `command`, beside those that every program needs.
        cwd: The folder in which `command` is started.
        headers: HTTP headers for `url`.
        tools: The tools that the model is offered; empty: all of them.
        reset_tool: The tool that begins an episode; it is called with the row, and not offered to the model.
        spare: Sessions that are opened ahead, so that an episode does not wait for the start of `command`.
    """

    command: tuple[str, ...] = ()
    url: str = ""
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    tools: tuple[str, ...] = ()
    reset_tool: str = ""
    spare: Annotated[int, Ge(0), Le(1024)] = 0


Progress = Callable[[int, int, float], None]
"""A function that is called after every training step with the steps done, all steps, and the loss in nats per token."""

_IMPORT_PATH: Final = re.compile(r"[\w.]+:[\w.]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatOptions:
    """How conversations are written.

    Args:
        tools_in: The place where tools are described. "template": the chat template does it. "system", "user": in the system
            message, or at the beginning of the first user message together with the system prompt, for templates without
            tools or without a system role; results of tools are then user messages.
        call_format: How a call is written, which is told with the tools where the template does not describe them.
        template_kwargs: Further variables of the template, such as ``enable_thinking``.
        eos_ids: Tokens besides the tokenizer's own eos that end a turn, as ``generation_config.json`` lists them.
    """

    tools_in: Literal["template", "system", "user"] = "template"
    call_format: str = ""
    template_kwargs: Mapping[str, object] = field(default_factory=dict)
    eos_ids: tuple[int, ...] = ()


AS_IT_IS: Final = ChatOptions()
"""The template writes everything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOrder:
    """What is known of a run before its model folder exists.

    Args:
        steps: Supervised steps before the run (`model.warm_start_steps`); "auto" leaves the number to the maker.
        parser: Name of the tool-call parser that will read the model's turns.
        chat: How the model's conversations will be written.
        folder: The model folder to begin with; empty where the maker begins with a model of its own.
        cache: The folder for folders that are kept from run to run.
        note: Called with a line of text before a part of the work that takes time.
    """

    seed: int
    steps: int | Literal["auto"]
    environment: type
    parser: str
    chat: ChatOptions = AS_IT_IS
    folder: str = ""
    cache: Path
    progress: Progress = lambda step, num_steps, loss: None
    note: Callable[[str], None] = lambda said: None


class StartingModel(Protocol):
    """Makes a model folder."""

    def __call__(self, order: ModelOrder) -> Path:
        """Make the folder, or find it in the cache; return its path."""


@runtime_checkable
class DescribedModel(Protocol):
    """A starting model that says before it is made which environment it fits and how large it will be."""

    @property
    def only_environment(self) -> type:
        """The environment class whose words the model knows; it can play this class and its subclasses."""

    def architecture(self) -> object:
        """Return the Hugging Face config of the model, for the estimate of bytes."""


MODELS: Final[Registry[StartingModel]] = Registry(
    "starting model",
    key="model.path",
    builtin={
        "tiny": "order_desk.starting_models:tiny",
        "tiny-moe": "order_desk.starting_models:tiny_moe",
        "smollm2": "order_desk.smollm2:smollm2",
    },
)
"""The starting models that `model.path` names."""


def is_model_folder(path: str) -> bool:
    """Return whether `model.path` names a folder, and not something that makes one."""
    return path not in MODELS.names and not _IMPORT_PATH.fullmatch(path)
