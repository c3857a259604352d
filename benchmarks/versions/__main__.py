"""``python -m benchmarks.versions``: what exact versions cost on this machine."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from benchmarks.versions.bars import QUANTITIES, figure, rate
from oldlogits.cli.main import attempt

if TYPE_CHECKING:
    from benchmarks.versions.rows import Report, Row


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionsOptions:
    """Measure what exact versions cost: bytes, switches, encoding; against a copy, an average and what others send.

    Times are CPU time of one thread (on an accelerator, device time), in units of the memcpy of all weights in the same round.
    """

    smoke: bool = False
    """A smaller model, fewer rounds and no real model: under a minute. Its ratios of times are not those of the full run."""
    device: str = "cpu"
    """cpu, or cuda."""
    out: Path | None = None
    """Write the figures to this JSON file."""
    document: Path | None = None
    """Write the tables into this Markdown file, between its marks, as into docs/versions.md."""
    params: int | None = None
    """Parameters of the synthetic model. Default: 128 million; 24 million with --smoke; 4 billion on an accelerator."""


def command(arguments: Sequence[str]) -> int:
    """Measure, show the table, and write the figures."""
    options = tyro.cli(VersionsOptions, prog="python -m benchmarks.versions", args=list(arguments))
    from benchmarks.versions.document import split_at_marks, write_into
    from benchmarks.versions.measure import Plan, measure

    plan = Plan.of(is_smoke=options.smoke, device=options.device, num_params=options.params)
    if options.document is not None:
        split_at_marks(options.document)  # refused before the measurement, not after it
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)  # a log cuts no column
    with _shown(console) as progress:
        report = measure(plan, progress)
    shown = (Text(str(report.machine)), Text(remark(report), style="bold"), compared(report), held(report))
    console.print(*shown, sep="\n", soft_wrap=True)
    if options.out is not None:
        report.write(options.out)
        console.print(Text(f"figures   {options.out}"))
    if options.document is not None:
        write_into(options.document, report)
        console.print(Text(f"document  {options.document}"))
    return 0


def remark(report: Report) -> str:
    """What to know before reading the table."""
    num_bars = sum(row.is_met is not None for row in report.rows)
    verdict = f"{num_bars - len(report.missed)} of {num_bars} bars met, {report.took_s:.0f} s"
    return f"{verdict}; a short run: small model, few rounds, no real model" if report.is_smoke else verdict


def held(report: Report) -> Table:
    """The figures that are held to a bar, one a line."""
    shown = _table("held to a bar", "bar", "")
    for row in _in_order(report):
        if row.bar is not None:
            verdict = Text("met", style="green") if row.is_met else Text("missed", style="bold red")
            shown.add_row(*_cells(row), f"<= {figure(row.bar, row.of.unit)}", verdict)
    return shown


def compared(report: Report) -> Table:
    """The other figures, for comparison."""
    shown = _table("for comparison")
    for row in _in_order(report):
        if row.bar is None:
            shown.add_row(*_cells(row))
    return shown


def _in_order(report: Report) -> list[Row]:
    return sorted(report.rows, key=lambda row: QUANTITIES.index(row.of))


def _table(title: str, *more: str) -> Table:
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column(title, no_wrap=True)
    shown.add_column("model", no_wrap=True)
    for heading in ("lr", "median", "quartiles", "wall", "n", *more):
        shown.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    return shown


def _cells(row: Row) -> tuple[str, ...]:
    unit = row.of.unit
    return (
        row.of.label,
        f"{row.model} {row.num_params / 1e6:,.0f} M",
        rate(row.lr),
        figure(row.median, unit),
        "" if row.num_samples == 1 else f"{figure(row.low, unit)} .. {figure(row.high, unit)}",
        "" if row.wall is None else figure(row.wall, unit),
        str(row.num_samples),
    )


@contextmanager
def _shown(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A bar on a terminal; elsewhere a line for each part of the run."""
    columns = (BarColumn(), TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task, parts = bar.add_task("", total=None), [""]

        def show(doing: str, done: int, total: int) -> None:
            bar.update(task, description=doing, completed=done, total=total)
            if doing != parts[-1] and not console.is_terminal:
                console.print(Text(f"{done}/{total}  {doing}"))
            parts.append(doing)

        yield show


if __name__ == "__main__":
    sys.exit(attempt(command, sys.argv[1:]))
