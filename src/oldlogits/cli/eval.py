"""``oldlogits eval MODEL RECIPE``: evaluate any checkpoint on the held-out rows of any recipe, and compare two evaluations."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from oldlogits.cli.main import FAILED, INTERRUPTED
from oldlogits.cli.table import Rows
from oldlogits.core.errors import ConfigError, reading
from oldlogits.record.failures import FailureTally, in_words
from oldlogits.record.intervals import verdict_of
from oldlogits.record.live.conclusion import program_sentences

if TYPE_CHECKING:
    from oldlogits.record.evaluation import Comparison, EvaluatedEpisode, EvaluationSummary


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalOptions:
    """Evaluate MODEL on the held-out rows of RECIPE: its environment or its agent program, parser, limits and engine.

    MODEL is a run folder (its newest checkpoint), RUN/checkpoints/v000040, a model folder, or a starting model. RECIPE is a
    TOML file; of a run, or one of its checkpoints, it is the run's own unless given. Any recipe key is overridden by its dotted
    name, such as `--eval.num-episodes 256` (the number of rows), `--eval.success-at 0.5` or `--engine.precision fp8`.
    """

    out: Path | None = None
    """The folder for summary.json, episodes.jsonl and transcripts.txt: absent or empty. Default: evals/RECIPE-DATE-TIME."""
    repeats: int = 1
    """How often each row is played; intervals are over rows."""
    greedy: bool = False
    """Take the likeliest token instead of sampling at temperature 1."""
    subset: str = ""
    """A field of the rows, by whose values the results are told apart; of a mixture by default who plays the row."""
    compare: tuple[Path, Path] | None = None
    """Instead, compare two evaluations that were written before, row by row: the second minus the first."""


def command(arguments: Sequence[str]) -> int:
    """Evaluate, or compare; returns the exit status."""
    named = [word for word in arguments[:2] if not word.startswith("-")] if arguments[:1] else []
    named = named if named == list(arguments[: len(named)]) else []
    words = list(arguments[len(named) :])
    options, overrides = tyro.cli(EvalOptions, prog="oldlogits eval MODEL [RECIPE]", args=words, return_unknown_args=True)
    console = Console(highlight=False)
    if options.compare is not None:
        return _compare(*options.compare, console)
    if not named or options.repeats < 1:
        got = "no model" if not named else f"--repeats {options.repeats}"
        fix = "oldlogits eval runs/mine, or oldlogits eval MODEL recipes/desk.toml"
        raise ConfigError("there is nothing to evaluate", got=got, allowed="a model, and at least 1 repeat", fix=fix)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    from oldlogits.run.checkpoint import NamedModel
    from oldlogits.run.evaluate import Evaluation

    model, recipe = NamedModel.find(named[0]), Path(named[1]) if len(named) > 1 else None
    config = model.load_recipe(recipe, overrides)
    stem = recipe.stem if recipe is not None else (model.run or Path()).name
    out = options.out or Path("evals") / f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    with _Progress(console) as progress:
        evaluation = Evaluation(
            config,
            out,
            repeats=options.repeats,
            greedy=options.greedy,
            subset=options.subset,
            note=progress.note,
            seen=progress.seen,
        )
        console.print(Text(f"evaluating {model.path}, written to {out}"))
        status = 0
        try:
            evaluation.play()
        except KeyboardInterrupt:
            status = INTERRUPTED
        finally:
            summary = evaluation.conclude()
    _show(summary, out, console)
    return status or (0 if summary.all.num_played else FAILED)


class _Progress:
    """How far an evaluation is: a bar in a terminal, ten lines where there is none; and the first failure of each kind."""

    def __init__(self, console: Console) -> None:
        self._console, self._failures, self._num_failed, self._num_ended, self._sum = console, FailureTally(), 0, 0, 0.0
        shown = (
            TextColumn("{task.completed}/{task.total} episodes"),
            BarColumn(bar_width=None),
            TextColumn("{task.description}"),
        )
        self._bar = Progress(*shown, TimeRemainingColumn(), console=console, disable=not console.is_terminal, expand=True)
        self._task = self._bar.add_task("", total=None)

    def __enter__(self) -> Self:
        """Start drawing."""
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Stop drawing."""
        self._bar.stop()

    def note(self, text: str) -> None:
        """Print a line."""
        self._console.print(Text(text))

    def seen(self, episode: EvaluatedEpisode, num_episodes: int) -> None:
        """Count an episode."""
        self._num_ended += 1
        if episode.reward is None:
            self._num_failed += 1
            if self._failures.add(episode.failure):
                self.note(f"an episode failed: {episode.failure}")
        self._sum += episode.reward or 0.0
        num_played = self._num_ended - self._num_failed
        told = f"mean reward {self._sum / num_played:.3f}" if num_played else "none played"
        told += f", {self._num_failed} failed" if self._num_failed else ""
        self._bar.update(self._task, completed=self._num_ended, total=num_episodes, description=told)
        if not self._console.is_terminal and self._num_ended * 10 // num_episodes > (self._num_ended - 1) * 10 // num_episodes:
            self.note(f"{self._num_ended}/{num_episodes} episodes, {told}")


def _show(summary: EvaluationSummary, out: Path, console: Console) -> None:
    """Print what an evaluation came to."""
    k = summary.repeats
    rows = [
        (
            name,
            str(one.success or "-"),
            *([str(one.pass_at.get(str(k), "-"))] if k > 1 else []),
            one.reward.plain if one.reward else "-",
            str(one.num_played),
            str(one.num_failed),
        )
        for name, one in {"all": summary.all, **summary.subsets}.items()
    ]
    repeats = f" x {k}" if k > 1 else ""
    successes = (f"success, avg@{k} [95%]", f"pass@{k} [95%]") if k > 1 else ("success [95%]",)
    console.print(Text(f"\n{summary.target}, {summary.mode}, {summary.num_rows} rows{repeats}"))
    console.print(Rows((summary.subset, *successes, "mean reward [95%]", "played", "failed"), rows))
    if not summary.all.num_played:
        console.print(Text("no episode was played to its end: there is nothing to say of the model"))
    elif k > 1 and summary.all.num_whole < summary.num_rows:
        console.print(Text(f"pass@{k} is over the {summary.all.num_whole} rows that were played {k} times"))
    if missing := summary.num_episodes - summary.all.num_played - summary.all.num_failed:
        console.print(Text(f"{missing} of {summary.num_episodes} episodes were not played"))
    if summary.failures:
        console.print(Text(f"failed: {in_words(summary.failures)}"))
    for line in program_sentences(summary.gateway):
        console.print(Text(line))
    console.print(Text(f"a success is a reward of {summary.success_at:g} or more; transcripts: {out / 'transcripts.txt'}"))


def _compare(first: Path, second: Path, console: Console) -> int:
    from oldlogits.record.evaluation import compare
    from oldlogits.record.jsonl import RecordError

    fix = "name what was given as --out"
    try:
        with reading(RecordError, "no evaluations", got=f"{first}, {second}", allowed="two evaluations", fix=fix):
            found = compare(first, second)
    except RecordError as error:  # the command is wrong: it names something else
        raise ConfigError(error.what, got=error.got, allowed=error.allowed, fix=error.fix) from error
    console.print(Text(f"second  {second}\nminus   {first}"), soft_wrap=True)
    _show_comparison(found, console)
    return 0


def _show_comparison(found: Mapping[str, Comparison], console: Console) -> None:
    rows = [(name, one.success.points, one.reward.change, str(one.success.num_episodes)) for name, one in found.items()]
    console.print(Rows(("", "success, points [95%]", "mean reward [95%]", "rows"), rows))
    every = found["all"]
    console.print(Text(f"success      {verdict_of(every.success)}\nmean reward  {verdict_of(every.reward)}"))
    if every.num_left_out:
        console.print(Text(f"left out     {every.num_left_out} rows that only one of them played"))
