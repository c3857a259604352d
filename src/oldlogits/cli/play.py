"""``oldlogits play``: episodes of an environment as readable transcripts, played by a person, its oracle or a checkpoint."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, TypeVar, cast

import tyro
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from oldlogits.cli.players import ENDLESS, LEFT, Writer, open_checkpoint
from oldlogits.config.load import config_from_table, read_toml
from oldlogits.config.schema import EnvConfig
from oldlogits.core.engine import RolloutEngine
from oldlogits.core.environment import Environment, ExplainingEnvironment, Row, RowSource, Scripted, Split
from oldlogits.core.errors import ConfigError
from oldlogits.core.trajectory import Sampled, Segment
from oldlogits.envs.rows import row_misfit
from oldlogits.envs.tools import tool_names, tool_schemas
from oldlogits.models.chat.format import ChatFormat
from oldlogits.models.chat.template import ChatTokenizer, Said
from oldlogits.rollout.environment_errors import EnvironmentFailed, Raised, answering
from oldlogits.rollout.environment_runner import ThreadRunner
from oldlogits.rollout.turns import Failure, run_episode
from oldlogits.run.tasks import environment_of, make_agent, rows_of

T = TypeVar("T")


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
    if options.index < 0 or options.num_episodes < 1:
        raise ConfigError(
            "there is no such row",
            got=f"--index {options.index} --num-episodes {options.num_episodes}",
            allowed="an index from 0 on, at least 1 episode",
            fix="correct it, or leave it out",
        )
    console = Console(highlight=False)
    rewards: list[float] = []
    for number in range(options.num_episodes):
        if number:
            console.rule()
        rewards.append(play(options, number, console))
    if len(rewards) > 1:
        console.print(Text(f"mean reward of {len(rewards)} episodes: {sum(rewards) / len(rewards):.3f}", style="bold"))
    return 0


def play(options: PlayOptions, number: int, console: Console, read: Callable[[str], str] = input) -> float:
    """Play one episode and print it; return the reward, 0 where the environment failed.

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
    recipe = config_from_table(read_toml(Path(options.target))) if options.target.endswith(".toml") else None
    env = recipe.env if recipe else EnvConfig(target=options.target, adapter=options.adapter)
    environment_class = environment_of(env)
    row, runner = _row(options, number, env, environment_class), ThreadRunner(timeout_s=env.timeout_s, latency_s=0.0, seed=0)
    made: list[object] = []

    async def run(call: Callable[[], T | Awaitable[T]], *, is_tool: bool = False) -> T:
        made.append(await runner(call, is_tool=is_tool))
        return cast(T, made[-1])

    if options.mode == "checkpoint":
        engine, chat, limits = open_checkpoint(options.model, recipe, environment_class, options.seed + number)
    else:
        write = _oracle(environment_class) if options.mode == "oracle" else lambda seen: read("> ")
        writer = Writer(write, tool_names(environment_class) if options.mode == "human" else ())
        engine, chat, limits = cast(RolloutEngine, writer), ChatFormat(cast(ChatTokenizer, writer)), ENDLESS
    shown = _Shown(chat, console)
    agent = make_agent(limits, engine, cast(ChatFormat, shown), run, temperature=0.0 if options.greedy else 1.0)
    agent = replace(agent, report=shown.report, parser=agent.parser if options.mode == "checkpoint" else writer)
    _introduce(environment_class, options.mode, console)
    with asyncio.Runner() as loop:
        wait = loop.get_loop().run_until_complete  # not loop.run, so that Ctrl-C reaches whoever reads a line
        try:
            played = wait(run_episode(agent, environment_class, row, id="play", group_id="play"))
        except KeyboardInterrupt:
            played = Failure(id="play", group_id="play", reason="interrupted")
        if isinstance(played, Failure):
            console.print(Text(f"the episode ended early: {played.reason}\nreward 0 (failed)", style="yellow"))
            return 0.0
        if played.stop_reason != "done":
            left = "the agent left" if options.mode == "human" else f"the episode ended early: {played.stop_reason}"
            console.print(Text(left, style="yellow"))
        if hasattr(environment_class, "explain_reward"):
            explain = answering(cast(ExplainingEnvironment, made[0]).explain_reward, (NotImplementedError,))
            try:
                reasons = wait(run(explain))
                said = "" if isinstance(reasons, Raised) else str(reasons or "")
            except EnvironmentFailed as failure:
                said = f"explain_reward: {failure}"
            console.print(Text(said, style="red"), end="\n" if said else "")
    console.print(Text(f"reward {played.reward:g}", style="bold green" if played.reward > 0 else "bold red"))
    return played.reward


def _row(options: PlayOptions, number: int, env: EnvConfig, environment_class: type[Environment]) -> Row:
    """Return the row of the command line, of the recipe's file, or of the class."""
    if options.row:
        try:
            row = json.loads(options.row)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            fix = """write '{"key": ...}'"""
            raise ConfigError("--row is no JSON object", got=options.row, allowed="the arguments of reset", fix=fix)
        if misfit := row_misfit(environment_class, row):
            allowed = f"the arguments of {environment_class.__name__}.reset"
            raise ConfigError("--row does not fit the environment", got=misfit, allowed=allowed, fix="correct it")
        return row
    named = env.train_data if options.split == "train" else env.eval_data
    if not env.mixture and not named and not isinstance(environment_class, RowSource):
        raise ConfigError(
            f"{environment_class.__name__} makes no rows",
            got="no row",
            allowed="a row: the arguments of reset as a JSON object",
            fix="play a recipe that names rows, or add --row '{...}', or define make_row(split, index) -> dict",
        )
    files = env if env.mixture else replace(env, train_data=named, eval_data=named)
    dataset, index = rows_of(files, environment_class, seed=0, needs_heldout=True), options.index + number
    return dataset.train(index) if options.split == "train" else dataset.heldout(index + 1)[-1]


def _oracle(environment_class: type[Environment]) -> Callable[[str], str]:
    if isinstance(environment_class, Scripted):
        return environment_class.make_oracle()
    raise ConfigError(
        f"mode 'oracle' cannot play {environment_class.__name__}",
        got="mode = 'oracle'",
        allowed="human and checkpoint (every environment), oracle (one with a static method make_oracle)",
        fix="choose mode 'human', or 'checkpoint'",
    )


class _Shown:
    """A chat format that prints what the agent reads and writes."""

    def __init__(self, chat: ChatFormat, console: Console) -> None:
        self._chat, self._console = chat, console
        self.stop_ids, self.decode, self.most_bytes, self.tokenizer = (
            chat.stop_ids,
            chat.decode,
            chat.most_bytes,
            chat.tokenizer,
        )

    def for_tools(self, tools: Sequence[Row]) -> _Shown:
        return self  # who writes by the template of one's own reads no tools

    def prompt_ids(self, opening: Sequence[Said], system: str | None = None) -> list[int]:
        if system:
            _say(self._console, "system", system)
        for role, content in opening:
            _say(self._console, "agent" if role == "assistant" else role, content)
        return self._chat.prompt_ids(opening, system)

    def continuation_ids(self, said: Sequence[Said]) -> list[int]:
        for role, content in said:
            _say(self._console, role, content)
        return self._chat.continuation_ids(said)

    def report(self, trajectory_id: str, segments: Sequence[Segment]) -> None:
        """Print a turn that was sampled."""
        if isinstance(segments[-1], Sampled) and segments[-1].token_ids != LEFT:
            _say(self._console, "agent", self.decode(segments[-1].token_ids))


def _say(console: Console, who: str, text: str) -> None:
    """Print one turn: a label, and the text beside it."""
    grid = Table.grid(Column(width=8, justify="right"), Column(), padding=(0, 2, 0, 0))
    grid.add_row(who, Text(text))
    console.print(grid, style={"about": "dim", "system": "dim", "user": "cyan", "agent": "bold", "tool": "green"}[who])


def _introduce(environment_class: type[Environment], mode: str, console: Console) -> None:
    _say(console, "about", inspect.getdoc(environment_class) or "")
    if mode == "human":
        table = Table("call", "what it does", box=None, header_style="dim")
        for schema in tool_schemas(environment_class):
            function = cast("dict[str, Row]", schema)["function"]
            arguments = cast("dict[str, Row]", function["parameters"])["properties"]
            table.add_row(Text(" ".join([str(function["name"]), *arguments])), Text(str(function["description"])))
        console.print(table, Text("Write a call, its arguments after it, or a message. Ctrl-D leaves.", style="dim"))
