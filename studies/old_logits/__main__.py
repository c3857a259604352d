"""``python -m studies.old_logits RECIPE``: run a declared study, or show a finished one."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from oldlogits.cli.main import FAILED, INTERRUPTED, attempt
from oldlogits.core.errors import ConfigError
from studies.old_logits.declare.pilot import suggestion
from studies.old_logits.declare.plan import Cell, Stage, read_plan
from studies.old_logits.measure.pool import Done
from studies.old_logits.results import Study
from studies.old_logits.show.document import write_document
from studies.old_logits.show.page import write_page
from studies.old_logits.show.tables import print_tables, tables_of
from studies.old_logits.study import Comparison, read_notes


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareOptions:
    """Run the study of RECIPE, a TOML file, and show what came out; or show a finished one, given its study.json.

    An interrupted study goes on with the same command: what is computed is kept.
    """

    out: Path | None = None
    """The study's folder. Default: runs/RECIPE. With a study.json: where report.html and study.md are written."""
    stages: tuple[Literal["pilot", "learning", "decision", "cost"], ...] = ("learning", "decision", "cost")
    """Which parts to run. The pilot says what to write into the recipe before the rest is run."""
    processes: int = 0
    """Cells that run at the same time; 0: as the recipe says."""
    dry_run: bool = False
    """Check the recipe, count what is to be run, and stop."""


def command(arguments: Sequence[str]) -> int:
    """Parse, run what is missing, and show everything that is there."""
    named = Path(arguments[0]) if arguments and not arguments[0].startswith("-") else None
    options = tyro.cli(CompareOptions, prog="python -m studies.old_logits RECIPE", args=list(arguments[named is not None :]))
    if named is None:
        raise ConfigError(
            "the first word names no recipe",
            got="no recipe",
            allowed="a TOML file of a study, or a study.json",
            fix="python -m studies.old_logits studies/old_logits/recipes/study-small.toml",
        )
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if named.suffix == ".json":
        if not named.is_file():
            raise ConfigError("the study does not exist", got=str(named), allowed="a study.json", fix="look in runs/")
        return _show(Study.read(named), options.out or named.parent)
    return _run(named, options)


def _run(recipe: Path, options: CompareOptions) -> int:
    plan = read_plan(recipe)
    out = options.out or Path("runs") / recipe.stem
    comparison = Comparison(plan, read_notes(plan), out, options.processes or plan.processes)
    if options.dry_run:
        for stage, num in comparison.num_missing(options.stages).items():
            print(f"{stage}: {num} cells to run")
        return 0
    print(f"study folder: {out}", flush=True)
    try:
        with StudyProgress() as view:
            failed = comparison.run(options.stages, view)
    except KeyboardInterrupt:
        print(f"interrupted; the same command goes on: python -m studies.old_logits {recipe} --out {out}", file=sys.stderr)
        return INTERRUPTED
    study = comparison.study()
    study.write(out / "study.json")
    if "pilot" in options.stages:
        print("\nThe pilot's answers, for the [[regimes]] of the recipe:\n\n" + suggestion(plan, study.pilot))
    _show(study, out)
    for done in failed:
        why = done.error.strip().splitlines()[-1]
        print(f"failed: {done.cell.label}: {why} ({out / 'failures' / (done.cell.key + '.txt')})", file=sys.stderr)
    return FAILED if failed else 0


def _show(study: Study, out: Path) -> int:
    """Print the tables, and write page and document."""
    print_tables(tables_of(study))
    write_page(study, out / "report.html")
    write_document(study, out / "study.md")
    print(f"report    {out / 'report.html'}\ndocument  {out / 'study.md'}")
    return 0


class StudyProgress:
    """One bar over the cells of a stage; one line a cell where the output is no terminal."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()
        columns = (
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
        )
        self._progress = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._running: dict[str, str] = {}
        self._task: TaskID | None = None
        self._total = self._num_done = 0
        self._started = time.perf_counter()

    def __enter__(self) -> StudyProgress:
        """Show it."""
        self._progress.start()
        return self

    def __exit__(self, *args: object) -> None:
        """Leave the last state on the screen."""
        self._progress.stop()

    def begin(self, stage: Stage, num_cells: int, num_known: int) -> None:
        """A stage begins."""
        self._running.clear()
        self._total, self._num_done, self._started = num_cells, num_known, time.perf_counter()
        self._task = self._progress.add_task(stage, total=num_cells, completed=num_known)
        self._say(f"{stage}: {num_cells} cells, {num_known} of them known")

    def start(self, cell: Cell) -> None:
        """A cell begins."""
        self._running[cell.key] = cell.label
        self._describe()

    def done(self, done: Done) -> None:
        """A cell has ended."""
        self._running.pop(done.cell.key, None)
        self._num_done += 1
        if self._task is not None:
            self._progress.advance(self._task)
        self._describe()
        how = "FAILED" if done.error else f"{done.wall_s:.0f} s"
        self._say(f"{self._num_done}/{self._total}  {done.cell.label}  {how}")

    def _describe(self) -> None:
        if self._task is not None:
            self._progress.update(self._task, description="\n".join(self._running.values()))

    def _say(self, line: str) -> None:
        if not self._console.is_terminal:
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(attempt(command, sys.argv[1:]))
