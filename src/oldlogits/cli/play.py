"""``oldlogits play``: episodes of an environment as readable transcripts, played by a person, its oracle or a checkpoint."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal, cast

import tyro
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from oldlogits.cli.main import FAILED
from oldlogits.config.episodes import EnvConfig
from oldlogits.config.load import config_from_table, read_toml
from oldlogits.config.schema import RunConfig
from oldlogits.core.engine import RolloutEngine
from oldlogits.core.environment import Environment, ExplainingEnvironment, Row, RowSource, Scripted, Split
from oldlogits.core.errors import ConfigError
from oldlogits.core.trajectory import Sampled, Segment
from oldlogits.envs.delegate import toolsets_of
from oldlogits.envs.given import names_of
from oldlogits.envs.rows import row_misfit
from oldlogits.models.chat.format import ChatFormat
from oldlogits.models.chat.template import ChatTokenizer, Said
from oldlogits.record.folder import RunFolder
from oldlogits.rollout.environment_errors import EnvironmentFailed, Raised, answering
from oldlogits.rollout.environment_runner import ThreadRunner
from oldlogits.rollout.turns import Failure, run_episode
from oldlogits.run.acting import ENDLESS, LEFT, Writer, open_checkpoint
from oldlogits.run.tasks import environment_of, make_agent, rows_of

if TYPE_CHECKING:
    from oldlogits.run.checkpoint import NamedModel


_HELP: Final = frozenset({"", "?", "help"})
"""What a person writes who does not know what to write; one that is a tool's name is a call."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlayOptions:
    """Act as the agent of an environment, or watch its oracle or a checkpoint."""

    target: Annotated[str, tyro.conf.Positional] = "desk"
    """What env.target says (desk, desk_long, "package.module:Class"), a recipe, or a run folder, which means its recipe."""
    adapter: str = "class"
    """What env.adapter says, where the target is no recipe."""
    mode: Literal["auto", "human", "oracle", "checkpoint"] = "auto"
    """Who acts; auto: the model that --model names, else a person."""
    model: str = ""
    """A run folder (its newest checkpoint plays), RUN/checkpoints/v000040, a model folder, or the name of a starting model.
    Parser, limits and chat options are those of the target's recipe; without one, those of the model's run."""
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
    played: list[Played] = []
    for number in range(options.num_episodes):
        if number:
            console.rule()
        played.append(play(options, number, console))
    num_failed, num = sum(bool(one.failure) for one in played), len(played)
    if num > 1:
        failed = f"; {num_failed} of them failed" if num_failed else ""
        console.print(
            Text(f"mean reward of {num} episodes: {sum(one.reward for one in played) / num:.3f}{failed}", style="bold")
        )
    return FAILED if num_failed else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """What came of an episode: its reward, which is 0 where the environment failed, and why that was."""

    reward: float
    failure: str = ""


def play(options: PlayOptions, number: int, console: Console, read: Callable[[str], str] = input) -> Played:
    """Play one episode and print it.

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
    mode = options.mode if options.mode != "auto" else "checkpoint" if options.model else "human"
    recipe = _recipe(options.target)
    env = recipe.env if recipe else EnvConfig(target=options.target, adapter=options.adapter)
    environment_class = environment_of(env)
    row, run = _row(options, number, env, environment_class), ThreadRunner(timeout_s=env.timeout_s, latency_s=0.0, seed=0)
    made: list[Environment] = []

    def make() -> Environment:
        made.append(environment_class())
        return made[0]

    if mode == "checkpoint":
        engine, chat, limits = open_checkpoint(_model(options), recipe, environment_class, options.seed + number)
    else:
        names = [name for tools in toolsets_of(environment_class) for name in names_of(tools)]
        helped = _HELP - set(names)
        person = _asking(read, helped, lambda: _introduce(environment_class, mode, console))
        write = _oracle(environment_class) if mode == "oracle" else person
        writer = Writer(write, names if mode == "human" else ())
        engine, chat, limits = cast(RolloutEngine, writer), ChatFormat(cast(ChatTokenizer, writer)), ENDLESS
    shown = _Shown(chat, console, reads_tools=mode == "checkpoint")
    agent = make_agent(limits, engine, cast(ChatFormat, shown), run, temperature=0.0 if options.greedy else 1.0)
    agent = replace(agent, report=shown.report, parser=agent.parser if mode == "checkpoint" else writer)
    _introduce(environment_class, mode, console)
    with asyncio.Runner() as loop:
        wait = loop.get_loop().run_until_complete  # not loop.run, so that Ctrl-C reaches whoever reads a line
        try:
            played = wait(run_episode(agent, make, row, id="play", group_id="play"))
        except KeyboardInterrupt:
            played = Failure(id="play", group_id="play", reason="interrupted")
        if isinstance(played, Failure):
            console.print(Text(f"the episode ended early: {played.reason}\nreward 0 (failed)", style="yellow"))
            return Played(reward=0.0, failure=played.reason)
        if played.stop_reason != "done":
            left = "the agent left" if mode == "human" else f"the episode ended early: {played.stop_reason}"
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
    return Played(reward=played.reward)


def _recipe(target: str) -> RunConfig | None:
    """The recipe that a target names, as a file or as a run folder; None: it is the name of an environment."""
    run = RunFolder(path=Path(target)).config
    if not target.endswith(".toml") and not run.is_file():
        return None
    recipe = config_from_table(read_toml(run if run.is_file() else Path(target)))
    if recipe.env.is_program:
        raise ConfigError(
            "an agent program talks to a server, and cannot be played turn by turn",
            got=f"env.program or env.command in {target}",
            allowed="a recipe whose episodes are an environment class's",
            fix=f"oldlogits eval MODEL {target}, or name the environment of its rows: oldlogits play {recipe.env.target}",
        )
    return recipe


def _model(options: PlayOptions) -> NamedModel:
    from oldlogits.run.checkpoint import NamedModel  # torch, which a person does without

    word = options.model or (options.target if RunFolder(path=Path(options.target)).config.is_file() else "")
    if not word:
        allowed = "a run folder, a checkpoint, a model folder or a starting model"
        raise ConfigError("mode 'checkpoint' needs a model", got="no --model", allowed=allowed, fix="add --model runs/...")
    return NamedModel.find(word)


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


def _asking(read: Callable[[str], str], helped: Set[str], introduce: Callable[[], None]) -> Callable[[str], str]:
    """Return what asks a person for a line, and helps as often as they ask for help or write nothing."""

    def write(seen: str) -> str:
        while (line := read("> ")).strip().lower() in helped:
            introduce()
        return line

    return write


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

    def __init__(self, chat: ChatFormat, console: Console, *, reads_tools: bool) -> None:
        self._chat, self._console, self._reads_tools = chat, console, reads_tools
        self.stop_ids, self.decode, self.most_bytes, self.tokenizer = (
            chat.stop_ids,
            chat.decode,
            chat.most_bytes,
            chat.tokenizer,
        )

    def for_tools(self, tools: Sequence[Row]) -> _Shown:
        return _Shown(self._chat.for_tools(tools), self._console, reads_tools=True) if self._reads_tools else self

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
            _say(self._console, "agent", self.decode(tuple(segments[-1].token_ids)))


def _say(console: Console, who: str, text: str) -> None:
    """Print one turn: a label, and the text beside it."""
    grid = Table.grid(Column(width=8, justify="right"), Column(), padding=(0, 2, 0, 0))
    grid.add_row(who, Text(text))
    console.print(grid, style={"about": "dim", "system": "dim", "user": "cyan", "agent": "bold", "tool": "green"}[who])


def _introduce(environment_class: type[Environment], mode: str, console: Console) -> None:
    _say(console, "about", inspect.getdoc(environment_class) or "")
    if mode == "human":
        table = Table("call", "what it does", box=None, header_style="dim")
        for schema in chain.from_iterable(toolsets_of(environment_class)):
            function = cast("dict[str, Row]", schema)["function"]
            arguments = cast("dict[str, Row]", function["parameters"])["properties"]
            table.add_row(Text(" ".join([str(function["name"]), *arguments])), Text(str(function["description"])))
        console.print(
            table,
            Text(
                "Write a call, its arguments after it, or a message. Enter or ? shows this again, Ctrl-D leaves.", style="dim"
            ),
        )
