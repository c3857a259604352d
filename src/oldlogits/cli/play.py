"""``oldlogits play``: episodes of an environment as readable transcripts, played by a person, the oracle or a checkpoint.

environment -> what the agent reads -> player -> a call or a message -> environment -> ... -> verdict
"""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Final, Literal, cast

import tyro
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from oldlogits.core.errors import ConfigError
from oldlogits.envs.desk import OrderDesk, Verdict, judge
from oldlogits.envs.desk_clerk import oracle
from oldlogits.envs.shape import (
    ConversingEnvironment,
    Environment,
    Malformed,
    Parsed,
    Row,
    RowSource,
    Split,
    ToolCall,
    bind,
    load_environment,
    parse_plain,
    render_result,
    tool_names,
    tool_schemas,
)

Mode = Literal["human", "oracle", "checkpoint"]

_STYLES: Final[Mapping[str, str]] = MappingProxyType({"policy": "dim", "customer": "cyan", "agent": "bold", "tool": "green"})


@dataclass(frozen=True, slots=True, kw_only=True)
class PlayOptions:
    """Act as the agent of an environment, or watch the desk's oracle or a checkpoint."""

    target: Annotated[str, tyro.conf.Positional] = "desk"
    """desk, desk_long, desk_slow, or package.module:Class."""
    mode: Mode = "human"
    """Who acts."""
    model: Path | None = None
    """With mode checkpoint: a run folder (its latest checkpoint plays) or a model folder."""
    greedy: bool = False
    """With mode checkpoint: take the likeliest token instead of sampling."""
    seed: int = 0
    """With mode checkpoint: of the sampler."""
    split: Split = "heldout"
    """Of the rows, where the environment makes its own."""
    index: int = 0
    """Of the first row."""
    num_episodes: int = 1
    """How many rows to play, one after the other."""
    row: str = ""
    """The arguments of reset as a JSON object instead; needed where the environment makes no rows."""


def command(arguments: Sequence[str]) -> int:
    """Play the episodes; for several, print the mean reward."""
    options = tyro.cli(PlayOptions, prog="oldlogits play", args=list(arguments))
    console = Console(highlight=False)
    row = _read_row(options.row) if options.row else None
    rewards: list[float] = []
    for index in range(options.index, options.index + options.num_episodes):
        if rewards:
            console.rule()
        rewards.append(
            play(
                options.target,
                options.mode,
                split=options.split,
                index=index,
                row=row,
                model=options.model,
                greedy=options.greedy,
                seed=options.seed + index,
                console=console,
            )
        )
    if len(rewards) > 1:
        console.print(Text(f"mean reward of {len(rewards)} episodes: {sum(rewards) / len(rewards):.3f}", style="bold"))
    return 0


def _read_row(text: str) -> Row:
    try:
        row = json.loads(text)
    except ValueError as error:
        raise ConfigError("--row is no JSON", got=f"{text}: {error}", allowed="a JSON object", fix="quote it") from error
    if not isinstance(row, dict):
        raise ConfigError("--row is no JSON object", got=text, allowed="the arguments of reset", fix="""write '{"key": ...}'""")
    return row


def play(
    target: str,
    mode: Mode,
    *,
    split: Split = "heldout",
    index: int = 0,
    row: Row | None = None,
    model: Path | None = None,
    greedy: bool = False,
    seed: int = 0,
    console: Console,
    read: Callable[[str], str] = input,
) -> float:
    """Play one episode and print it.

    Args:
        target: The environment: "desk", "desk_long", "desk_slow", or "package.module:Class".
        mode: Who acts: "human" (calls such as ``status o17``, or messages, one a line), "oracle" (the desk's), or
            "checkpoint" (a trained agent).
        split: Of the row, where the environment makes its own.
        index: Of the row.
        row: The arguments of `reset` instead; needed where the environment makes no rows.
        model: The checkpoint: a run folder or a model folder.
        greedy: Whether the checkpoint takes the likeliest tokens.
        seed: Of the checkpoint's sampler.
        console: Where to print.
        read: Asks the person for a line.

    Returns:
        The reward.

    Raises:
        ConfigError: The mode does not fit the environment, or there is no row or no checkpoint.
        EnvironmentShapeError: The class does not have the shape of an environment.
        ModelFolderError: The model folder is missing or incomplete.
    """
    environment_class = load_environment(target)
    row = _own_row(environment_class, split, index) if row is None else row
    if mode == "checkpoint":
        return _watch(environment_class, row, model, greedy, seed, console)
    player = _player(mode, environment_class, read)
    environment = environment_class()
    _introduce(environment_class, mode, console)
    seen = environment.reset(**row)
    _say(console, "customer", seen or "")
    try:
        _converse(environment, player, seen or "", console)
    except (EOFError, KeyboardInterrupt):
        console.print(Text("the agent left", style="yellow"))
    return _conclude(environment, console)


def _watch(
    environment_class: type[Environment], row: Row, model: Path | None, greedy: bool, seed: int, console: Console
) -> float:
    """Let a checkpoint play."""
    if model is None:
        raise ConfigError(
            "mode 'checkpoint' needs a model",
            got="no --model",
            allowed="a run folder or a model folder",
            fix="add --model runs/...",
        )
    from oldlogits.cli.play_checkpoint import find_player, watch

    player = find_player(model, greedy=greedy, seed=seed)
    _introduce(environment_class, "checkpoint", console)
    played = watch(player, environment_class, row, partial(_say, console))
    if played.stop_reason != "done":
        console.print(Text(f"the episode ended early: {played.stop_reason}", style="yellow"))
    return 0.0 if played.environment is None else _conclude(played.environment, console)


Player = Callable[[str], tuple[str, Parsed]]
"""From what the agent reads to what it writes, and how that is understood."""


def _player(mode: Mode, environment_class: type[Environment], read: Callable[[str], str]) -> Player:
    if mode == "human":
        return lambda seen: _understand(read("> "), environment_class)
    if mode == "oracle" and issubclass(environment_class, OrderDesk):
        clerk = oracle()
        next(clerk)

        def write(seen: str) -> tuple[str, Parsed]:
            text = clerk.send(seen)
            return text, parse_plain(text)

        return write
    raise ConfigError(
        f"mode '{mode}' cannot play {environment_class.__name__}",
        got=f"mode = '{mode}'",
        allowed="human and checkpoint (every environment), oracle (the desk)",
        fix="choose mode 'human', or 'checkpoint'",
    )


def _understand(line: str, environment_class: type[Environment]) -> tuple[str, Parsed]:
    """A line that starts with a tool's name is a call, every other a message."""
    words = line.split()
    if words and words[0] in tool_names(environment_class):
        return line, ToolCall(name=words[0], positional=tuple(words[1:]))
    return line, parse_plain(line)


def _own_row(environment_class: type[Environment], split: Split, index: int) -> Row:
    if inspect.getattr_static(environment_class, "make_row", None) is None:
        raise ConfigError(
            f"{environment_class.__name__} makes no rows",
            got="no row",
            allowed="a row: the arguments of reset as a JSON object",
            fix="give a row, or define a static method make_row(split, index) -> dict",
        )
    return cast(type[RowSource], environment_class).make_row(split, index)


def _introduce(environment_class: type[Environment], mode: Mode, console: Console) -> None:
    _say(console, "policy", inspect.getdoc(environment_class) or "")
    if mode == "human":
        table = Table("call", "what it does", box=None, header_style="dim")
        for schema in tool_schemas(environment_class):
            function = cast("dict[str, Row]", schema)["function"]
            arguments = cast("dict[str, Row]", function["parameters"])["properties"]
            table.add_row(Text(" ".join([str(function["name"]), *arguments])), Text(str(function["description"])))
        console.print(table)
        console.print(Text("Write a call, or a message. Ctrl-D leaves.", style="dim"))


def _converse(environment: Environment, player: Player, seen: str, console: Console) -> None:
    """Turn after turn, until the partner leaves."""
    while True:
        text, parsed = player(seen)
        _say(console, "agent", text)
        if parsed is None:
            if not hasattr(type(environment), "reply"):
                return
            answer = cast(ConversingEnvironment, environment).reply(text)
            if answer is None:
                return
            _say(console, "customer", answer)
        else:
            answer = _run(environment, parsed)
            _say(console, "tool", answer)
        seen = answer


def _run(environment: Environment, parsed: ToolCall | Malformed) -> str:
    """What the agent reads of a call."""
    ready = parsed if isinstance(parsed, Malformed) else bind(environment, parsed)
    if isinstance(ready, Malformed):
        return ready.reason
    result = ready()
    return render_result(asyncio.run(_wait(result)) if inspect.isawaitable(result) else result)


async def _wait(result: Awaitable[object]) -> object:
    return await result


def _say(console: Console, who: str, text: str) -> None:
    """One turn: a label, and the text beside it."""
    grid = Table.grid(Column(width=8, justify="right"), Column(), padding=(0, 2, 0, 0))
    grid.add_row(who, Text(text))
    console.print(grid, style=_STYLES[who])


def _conclude(environment: Environment, console: Console) -> float:
    """Print the reward and, at the desk, its reason."""
    reward = float(environment.get_reward())
    if isinstance(environment, OrderDesk):
        verdict = judge(environment)
        console.print(_explain(verdict))
        for reason in reasons(verdict):
            console.print(Text(reason, style="red"))
    console.print(Text(f"reward {reward:g}", style="bold green" if reward > 0 else "bold red"))
    return reward


def _explain(verdict: Verdict) -> Table:
    table = Table("", "by the policy", "what happened")
    for order, expected, actual in verdict.orders:
        table.add_row(order, expected, Text(actual, style="" if expected == actual else "red"))
    right = verdict.told == verdict.expected_told
    table.add_row("told", ", ".join(verdict.expected_told), Text(", ".join(verdict.told), style="" if right else "red"))
    return table


def reasons(verdict: Verdict) -> list[str]:
    """Why an episode at the desk was not right; empty if it was."""
    found = [f"{order} should be {wanted}, but is {actual}" for order, wanted, actual in verdict.orders if wanted != actual]
    if verdict.complaint:
        found.append(f"the customer left: {verdict.complaint}")
    elif verdict.told != verdict.expected_told:
        told = ", ".join(verdict.told) or "nothing"
        found.append(f"the customer should have been told {', '.join(verdict.expected_told)}, but was told {told}")
    return found
