"""``python -m benchmarks.scaling``: trajectories per second with 1, 2, 4, 8 rollout workers, and beside runtime "local"."""

from __future__ import annotations

import contextlib
import math
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import tyro
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.scaling.measure import MOST_CPU_SHARE, Report, Setting, Verdict, Workload, measure, settings
from oldlogits.cli.main import attempt


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingOptions:
    """Measure how trajectories per second grow with rollout workers, on work whose time is latency of tools.

    The exit status is 1 where a bar is missed. While more than 80% of the cores are busy no bar holds.
    """

    workers: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of rollout workers of runtime ray; none: "local" alone."""
    rounds: int = 5
    """Runs of "local" and of Ray with one worker, in turns; the other numbers of workers run once."""
    workload: Workload = field(default_factory=Workload)
    """What each worker does."""
    folder: Path | None = None
    """Where the runs are kept, absent or empty; none: they are deleted."""
    out: Path | None = None
    """Write the figures into this JSON file."""
    markdown: bool = False
    """Print a Markdown table."""


def command(arguments: Sequence[str]) -> int:
    """Measure, show the table, and write the figures; returns 1 where a bar is missed."""
    options = tyro.cli(ScalingOptions, prog="python -m benchmarks.scaling", args=list(arguments))
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)  # a log cuts no column
    order = settings(options.workers, options.rounds)

    def say(number: int, setting: Setting) -> None:
        console.print(Text(f"{number + 1}/{len(order)}  {setting}"))

    with _folder(options.folder) as folder:
        report = measure(options.workload, order, folder, say)
    show(console, report, markdown=options.markdown)
    if options.out is not None:
        report.write(options.out)
        console.print(Text(f"figures   {options.out}"))
    return int(any(verdict.is_met is False for verdict in report.verdicts))


HEADINGS = ("", "runs", "trajectories/s", "smallest .. largest", "of what", "share", "CPU busy", "staleness", "bar")


def show(console: Console, report: Report, *, markdown: bool) -> None:
    """The machine, and a line for each setting."""
    console.print(Text(str(report.machine).partition("\n")[0]), soft_wrap=True)
    rows = [_cells(verdict) for verdict in report.verdicts]
    if markdown:
        lines = [HEADINGS, ("---",) * len(HEADINGS), *rows]
        console.print(Text("\n".join(f"| {' | '.join(cells)} |" for cells in lines)), soft_wrap=True)
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table, soft_wrap=True)


def _cells(verdict: Verdict) -> tuple[str, ...]:
    k, is_compared = verdict.setting.workers, not math.isnan(verdict.share) and verdict.setting.runtime == "ray"
    return (
        str(verdict.setting),
        str(len(verdict.rates)),
        f"{statistics.median(verdict.rates):.2f}",
        f"{min(verdict.rates):.2f} .. {max(verdict.rates):.2f}",
        ("local" if k == 1 else f"{k} x ray, 1 worker") if is_compared else "",
        f"{verdict.share:.2f}" if is_compared else "",
        f"{verdict.cpu_share:.0%}",
        f"{verdict.staleness_mean:.2f}",
        _bar(verdict, is_compared=is_compared),
    )


def _bar(verdict: Verdict, *, is_compared: bool) -> str:
    if verdict.bar is None:
        return f"none: CPU >= {MOST_CPU_SHARE:.0%}" if is_compared else ""
    return f">= {verdict.bar:.1f} {'met' if verdict.is_met else 'missed'}"


@contextlib.contextmanager
def _folder(kept: Path | None) -> Iterator[Path]:
    if kept is not None:
        yield kept
        return
    with tempfile.TemporaryDirectory(prefix="oldlogits-scaling-") as name:
        yield Path(name)


if __name__ == "__main__":
    sys.exit(attempt(command, sys.argv[1:]))
