"""``python -m benchmarks.simulate RUN_FOLDER | FILE.toml | PRESET``: a run or a cluster predicted from step times.

A run folder is simulated and compared with what it did; its exit status says whether every bar is met. The tables of a Markdown
file are made anew, each by the command in the mark above it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Final, Literal

import tyro
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.simulate.cluster import PRESETS, Cluster, load_cluster, with_gpus
from benchmarks.simulate.document import rewrite
from benchmarks.simulate.fit import MeasuredRun
from benchmarks.simulate.forecast import forecast, mean_of
from benchmarks.simulate.validate import Comparison, compare
from oldlogits.cli.main import attempt
from oldlogits.config.load import read_toml

Shown = tuple[Sequence[str], Sequence[Sequence[str]]]
"""A table: headings and rows."""

WIDTH: Final = 190
"""Columns of output that is not a terminal's."""
NARROWEST: Final = 150
"""Columns that the figures of the widest table need; a narrower terminal breaks the lines."""

ROUTES: Final = ("snapshot", "eager", "dedicated", "interruption", "arrival", "none")
"""The routes of a cluster's table, unless others are asked for."""

USAGE: Final = f"""usage: python -m benchmarks.simulate RUN_FOLDER [--against RUN_FOLDER] [--num-seeds N]
       python -m benchmarks.simulate FILE.toml|PRESET [--gpus N ...] [--routes ROUTE ...] [--KEY VALUE ...]
       python -m benchmarks.simulate FILE.md

A run folder: step times and workload of its own updates; its recipe, or that of --against, is simulated.
A TOML file or a preset ({", ".join(PRESETS)}): a model on a cluster; its keys: PRESET --help.
A Markdown file: the tables of the second kind that stand between its marks are made anew."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """Simulate a run from its own step times, and compare with what it did."""

    against: Path | None = None
    """Another run folder: its recipe is simulated, with the step times of the first, and compared with what it did."""
    num_seeds: int = 3
    """Simulations that the prediction is the mean of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterOptions:
    """Simulate a model on clusters of several sizes, by every route."""

    cluster: Annotated[Cluster, tyro.conf.arg(name="")] = field(default_factory=Cluster)
    gpus: tuple[int, ...] = ()
    """Sizes of the cluster; none: that of the key layout.num_gpus."""
    routes: tuple[str, ...] = ROUTES
    """Routes to the old logits."""
    num_seeds: int = 2
    """Simulations that each line is the mean of."""


def command(arguments: Sequence[str]) -> int:
    """Predict, and show the tables; returns 1 where a run's prediction misses a bar."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    target = Path(arguments[0])
    if target.suffix == ".md":
        rewrite(target, lambda words: "\n".join(map(markdown, cluster_tables(words))))
    elif target.is_dir():
        options = tyro.cli(RunOptions, prog=f"python -m benchmarks.simulate {target}", args=list(arguments[1:]))
        against = None if options.against is None else MeasuredRun.read(options.against)
        return show_comparison(compare(MeasuredRun.read(target), against=against, num_seeds=options.num_seeds))
    else:
        for shown in cluster_tables(arguments):
            print_table(shown)
    return 0


def show_comparison(rows: Sequence[Comparison]) -> int:
    """Predicted beside measured; returns 1 where a bar is missed."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, heading in enumerate(("figure", "predicted", "of the seeds", "measured", "error", "allowed", "")):
        table.add_column(heading, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        is_share = row.bar is not None and row.bar.kind == "absolute"
        table.add_row(
            row.name,
            f"{row.predicted:.3f}",
            f"{row.low:.3f} .. {row.high:.3f}",
            f"{row.measured:.3f}",
            f"{row.error:+.3f}" if is_share else f"{row.error:+.1%}",
            "" if row.bar is None else f"{row.bar.allowed:.2f}" if is_share else f"{row.bar.allowed:.0%}",
            {None: "", True: "[green]pass[/]", False: "[bold red]FAIL[/]"}[row.passes],
        )
    _console().print(table)
    return int(any(row.passes is False for row in rows))


def cluster_tables(words: Sequence[str]) -> Iterator[Shown]:
    """What a version costs in bytes, and what each route makes of the cluster, size by size.

    Args:
        words: Of the command: a TOML file or a preset, and options.
    """
    target = Path(words[0])
    cluster = load_cluster(words[0], read_toml(target) if target.suffix == ".toml" else None)
    options = tyro.cli(
        ClusterOptions,
        prog=f"python -m benchmarks.simulate {target}",
        args=list(words[1:]),
        default=ClusterOptions(cluster=cluster),
    )
    clusters = [with_gpus(options.cluster, size) for size in options.gpus or (options.cluster.layout.num_gpus,)]
    yield BYTES_HEADINGS, [_bytes(cluster, kind) for cluster in clusters for kind in ("full", "patch")]
    if options.routes:
        lines = [(cluster, route) for cluster in clusters for route in options.routes]
        console = Console(stderr=True)
        shown = track(lines, "lines of the table", console=console, disable=not console.is_terminal, transient=True)
        yield HEADINGS, [_cells(cluster, route, options.num_seeds) for cluster, route in shown]


HEADINGS: Final = (
    "GPUs",
    "route",
    "engines, trainer, scorer",
    "trajectories/s",
    "tokens/s/GPU",
    "engine idle",
    "trainer idle",
    "staleness: mean, max",
    "route's share of the step",
    "forwards",
    "stall s",
    "update s",
    "waits s",
)
"""Of the routes' table."""


def _cells(cluster: Cluster, route: str, num_seeds: int) -> tuple[str, ...]:
    found = mean_of([forecast(replace(cluster, seed=cluster.seed + i).scenario(route)) for i in range(num_seeds)])
    trainer, scorer = cluster.num_learning_gpus(route)
    return (
        str(cluster.layout.num_gpus),
        route,
        f"{cluster.num_engines * cluster.layout.engine_gpus}, {trainer}, {scorer}",
        f"{found.trajectories_per_s:.2f}",
        f"{found.tokens_per_s / cluster.layout.num_gpus:,.0f}",
        f"{found.engine_idle_share:.2f}",
        f"{found.trainer_idle_share:.2f}",
        f"{found.staleness_mean:.1f}, {found.staleness_max:.0f}",
        f"{found.score_share:.2f}",
        f"{found.reads_per_token:.2f}",
        f"{found.stall_s:.1f}",
        f"{found.update_s:.0f}",
        f"{found.wait_s:.0f}",
    )


BYTES_HEADINGS: Final = (
    "GPUs",
    "a version travels as",
    "to a node of engines",
    "to all of them",
    "load s",
    "store, versions",
    "store, all hosts",
    "a trainer GPU's part",
)
"""Of the table of bytes."""


def _bytes(cluster: Cluster, kind: Literal["full", "patch"]) -> tuple[str, ...]:
    """By arithmetic: what a version weighs on the wire and in the store."""
    cluster = replace(cluster, sync=replace(cluster.sync, weights=kind))
    layout = cluster.layout
    num_nodes = math.ceil(cluster.num_engines * layout.engine_gpus / cluster.hardware.gpus_per_node)
    trainer, _ = cluster.num_learning_gpus("snapshot")
    return (
        str(layout.num_gpus),
        "a copy" if kind == "full" else f"a patch of {cluster.sync.patch_share:.0%}",
        _giga(cluster.sync_bytes),
        _giga(cluster.sync_bytes * num_nodes),
        f"{cluster.load_s:.2f}",
        str(cluster.num_versions),
        _giga(cluster.store_bytes),
        _giga(cluster.store_bytes / trainer),
    )


def _giga(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.2f} GB"


def _console() -> Console:
    """As wide as the terminal, but wide enough for all figures; elsewhere as the tables need."""
    console = Console(highlight=False)
    return Console(highlight=False, width=max(console.width, NARROWEST) if console.is_terminal else WIDTH)


def print_table(shown: Shown) -> None:
    """On the terminal."""
    headings, rows = shown
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, heading in enumerate(headings):
        table.add_column(heading.replace(" ", "\n"), justify="left" if i == 1 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    _console().print(table)


def markdown(shown: Shown) -> str:
    """As a Markdown table."""
    headings, rows = shown
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


if __name__ == "__main__":
    sys.exit(attempt(command, sys.argv[1:]))
