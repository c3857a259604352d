"""``oldlogits play``: episodes of an environment as readable transcripts, played by a person, its oracle or a checkpoint.

environment -> what the agent reads -> player -> a call or a message -> environment -> ... -> reward, and its reasons
"""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Final, Literal, TypeVar, cast

import tyro
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from oldlogits.cli.player import EndedEarlyError, Player, Role
from oldlogits.config import config_from_table, read_toml
from oldlogits.config.schema import EnvConfig
from oldlogits.core.environment import (
    ConversingEnvironment,
    Environment,
    ExplainingEnvironment,
    Row,
    RowSource,
    Scripted,
    Split,
)
from oldlogits.core.errors import ConfigError
from oldlogits.core.parser import Malformed, ToolCall
from oldlogits.envs.base import load_environment
from oldlogits.envs.parsers.plain import PlainParser
from oldlogits.envs.tools import bind, render_result, tool_names, tool_schemas
from oldlogits.rollout.environment_runner import ThreadRunner
from oldlogits.rollout.tasks import TaskDataset
from oldlogits.rollout.turns import EnvironmentFailed, only_call

T = TypeVar("T")

_STYLES: Final[Mapping[str, str]] = MappingProxyType({"policy": "dim", "customer": "cyan", "agent": "bold", "tool": "green"})


@dataclass(frozen=True, slots=True, kw_only=True)
class PlayOptions:
    """Act as the agent of an environment, or watch its oracle or a checkpoint."""

    target: Annotated[str, tyro.conf.Positional] = "desk"
    """What env.target says (desk, desk_long, "package.module:Class"), or a recipe."""
    adapter: str = "class"
    """What env.adapter says, where the target is no recipe."""
    mode: Literal["human", "oracle", "checkpoint"] = "human"
    """Who acts."""
    model: Path | None = None
    """With mode checkpoint: a run folder (its latest checkpoint plays) or a model folder."""
    greedy: bool = False
    """With mode checkpoint: take the likeliest token instead of sampling."""
    seed: int = 0
    """With mode checkpoint: the seed of the sampler."""
    split: Split = "heldout"
    """The rows to play."""
    index: int = 0
    """The first row."""
    num_episodes: int = 1
    """How many rows to play, one after the other."""
    row: str = ""
    """The arguments of reset as a JSON object instead; needed where the environment makes no rows."""


def command(arguments: Sequence[str]) -> int:
    """Play the episodes; for several, print the mean reward."""
    options = tyro.cli(PlayOptions, prog="oldlogits play", args=list(arguments))
    console = Console(highlight=False)
    rewards: list[float] = []
    for number in range(options.num_episodes):
        if rewards:
            console.rule()
        rewards.append(play(options, number, console))
    if len(rewards) > 1:
        console.print(Text(f"mean reward of {len(rewards)} episodes: {sum(rewards) / len(rewards):.3f}", style="bold"))
    return 0


def play(options: PlayOptions, number: int, console: Console, read: Callable[[str], str] = input) -> float:
    """Play one episode and print it; return the reward.

    Args:
        options: What to play, and who.
        number: The episode, from 0.
        console: The console to print to.
        read: Asks the person for a line.

    Raises:
        ConfigError: The mode does not fit the environment, or there is no row or no checkpoint.
        EnvironmentShapeError: The class does not have the shape of an environment.
        ModelFolderError: The model folder is missing or incomplete.
    """
    recipe = config_from_table(read_toml(Path(options.target))).env if options.target.endswith(".toml") else None
    env = recipe or EnvConfig(target=options.target, adapter=options.adapter)
    environment_class = load_environment(env.target, env.adapter)
    row = _row(options, number, env, environment_class)
    if options.mode == "checkpoint":
        from oldlogits.cli.play_checkpoint import checkpoint_player

        seed = options.seed + number
        player = checkpoint_player(options.model, environment_class, recipe, greedy=options.greedy, seed=seed)
    else:
        player = _oracle(environment_class) if options.mode == "oracle" else _person(environment_class, read)
    stage = _Stage(console, ThreadRunner(timeout_s=env.timeout_s, latency_s=0.0, seed=0))
    _introduce(environment_class, options.mode, stage)
    environment = stage.run(environment_class)
    try:
        _converse(environment, player, str(stage.run(lambda: environment.reset(**row)) or ""), stage)
    except (EndedEarlyError, EnvironmentFailed) as end:
        if isinstance(end, EndedEarlyError) and end.text:
            stage.say("agent", end.text)
        console.print(Text(f"the episode ended early: {end}", style="yellow"))
    except (EOFError, KeyboardInterrupt):
        console.print(Text("the agent left", style="yellow"))
    return _conclude(environment, stage)


def _row(options: PlayOptions, number: int, env: EnvConfig, environment_class: type[Environment]) -> Row:
    """Return the row of the command line, of the recipe's file, or of the class."""
    if options.row:
        try:
            row = json.loads(options.row)
        except ValueError as error:
            got = f"{options.row}: {error}"
            raise ConfigError("--row is no JSON", got=got, allowed="a JSON object", fix="quote it") from error
        if not isinstance(row, dict):
            fix = """write '{"key": ...}'"""
            raise ConfigError("--row is no JSON object", got=options.row, allowed="the arguments of reset", fix=fix)
        return row
    named = env.train_data if options.split == "train" else env.eval_data
    if not named and not isinstance(environment_class, RowSource):
        raise ConfigError(
            f"{environment_class.__name__} makes no rows",
            got="no row",
            allowed="a row: the arguments of reset as a JSON object",
            fix="add --row '{...}', or define a static method make_row(split, index) -> dict",
        )
    dataset, index = TaskDataset(environment_class, seed=0, train_data=named, eval_data=named), options.index + number
    return dataset.train(index) if options.split == "train" else dataset.heldout(index + 1)[-1]


def _oracle(environment_class: type[Environment]) -> Player:
    if not isinstance(environment_class, Scripted):
        raise ConfigError(
            f"mode 'oracle' cannot play {environment_class.__name__}",
            got="mode = 'oracle'",
            allowed="human and checkpoint (every environment), oracle (one with a static method make_oracle)",
            fix="choose mode 'human', or 'checkpoint'",
        )
    write = environment_class.make_oracle()
    return lambda role, seen: ((text := write(seen)), PlainParser().parse(text))


def _person(environment_class: type[Environment], read: Callable[[str], str]) -> Player:
    """Ask a person: a line that starts with a tool's name is a call, every other a message."""

    def ask(role: Role, seen: str) -> tuple[str, Sequence[ToolCall | Malformed]]:
        line = read("> ")
        name, *words = line.split() or [""]
        is_call = name in tool_names(environment_class)
        return line, [ToolCall(name=name, positional=tuple(words))] if is_call else PlainParser().parse(line)

    return ask


class _Stage:
    """Runs the environment's code, and prints who says what."""

    def __init__(self, console: Console, runner: ThreadRunner) -> None:
        self.console, self._runner = console, runner

    def run(self, call: Callable[[], T | Awaitable[T]]) -> T:
        """Run environment code, with its deadline.

        Raises:
            EnvironmentFailed: It raised or took too long.
        """
        return asyncio.run(self._runner(call))

    def say(self, who: str, text: str) -> None:
        """Print one turn: a label, and the text beside it."""
        grid = Table.grid(Column(width=8, justify="right"), Column(), padding=(0, 2, 0, 0))
        grid.add_row(who, Text(text))
        self.console.print(grid, style=_STYLES[who])


def _introduce(environment_class: type[Environment], mode: str, stage: _Stage) -> None:
    stage.say("policy", inspect.getdoc(environment_class) or "")
    if mode == "human":
        table = Table("call", "what it does", box=None, header_style="dim")
        for schema in tool_schemas(environment_class):
            function = cast("dict[str, Row]", schema)["function"]
            arguments = cast("dict[str, Row]", function["parameters"])["properties"]
            table.add_row(Text(" ".join([str(function["name"]), *arguments])), Text(str(function["description"])))
        stage.console.print(table)
        stage.console.print(Text("Write a call, or a message. Ctrl-D leaves.", style="dim"))


def _converse(environment: Environment, player: Player, seen: str, stage: _Stage) -> None:
    """Turn after turn, until the partner leaves."""
    role: Role = "user"
    stage.say("customer", seen)
    while True:
        text, calls = player(role, seen)
        stage.say("agent", text)
        if calls:
            call = only_call(calls)
            ready = call if isinstance(call, Malformed) else bind(environment, call)
            role, seen = "tool", ready.reason if isinstance(ready, Malformed) else render_result(stage.run(ready))
            stage.say("tool", seen)
            continue
        if not hasattr(type(environment), "reply"):
            return
        partner = cast(ConversingEnvironment, environment)
        answer = stage.run(lambda: partner.reply(text))  # noqa: B023 - it is run at once
        if answer is None:
            return
        role, seen = "user", answer
        stage.say("customer", seen)


def _conclude(environment: Environment, stage: _Stage) -> float:
    """Print the reward and, where the environment tells them, its reasons."""
    reward = float(stage.run(environment.get_reward))
    if hasattr(type(environment), "explain_reward"):
        reasons = stage.run(cast(ExplainingEnvironment, environment).explain_reward)
        if reasons:
            stage.console.print(Text(reasons, style="red"))
    stage.console.print(Text(f"reward {reward:g}", style="bold green" if reward > 0 else "bold red"))
    return reward
