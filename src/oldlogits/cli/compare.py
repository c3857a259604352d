"""``oldlogits compare RECIPE...``: recipes under the same seeds, side by side."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro
from rich.console import Console

from oldlogits.cli.main import FAILED, INTERRUPTED
from oldlogits.compare.pool import Outcome, run_jobs
from oldlogits.compare.runs import PlannedRun, perform, plan_runs, read_figures
from oldlogits.compare.table import legend, markdown, rows_of, terminal
from oldlogits.core.errors import ConfigError
from oldlogits.record.folder import write_atomic
from oldlogits.record.jsonl import encode


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareOptions:
    """Run each RECIPE under each seed, and compare what it gained and cost; differences are paired by seed.

    Runs that are done are kept: the same command goes on where it stopped. Any recipe key is overridden for all runs by its
    dotted name, and varied by --vary: `oldlogits compare recipes/desk.toml --vary trainer.lr=1e-4,5e-4 --num-updates 20`.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    """The seeds themselves, such as `--seeds 0 1`, not how many; each has a starting model of its own without model.seed."""
    vary: tuple[str, ...] = ()
    """KEY=VALUE,VALUE ...: every recipe with each of these values; several keys multiply."""
    out: Path | None = None
    """The folder of the comparison: a run folder for each run, compare.json, compare.md. Default: runs/compare-RECIPE."""
    processes: int = 1
    """How many runs go on at the same time."""
    dry_run: bool = False
    """Check every recipe, say which runs are missing, and stop."""


def command(arguments: Sequence[str]) -> int:
    """Run what is missing, and show the table of all runs that are done; returns 1 where a run failed."""
    num_named = next((i for i, word in enumerate(arguments) if word.startswith("-")), len(arguments))
    recipes, words = [Path(word) for word in arguments[:num_named]], list(arguments[num_named:])
    options, overrides = tyro.cli(CompareOptions, prog="oldlogits compare RECIPE...", args=words, return_unknown_args=True)
    if not recipes or not options.seeds or options.processes < 1:
        raise ConfigError(
            "there is nothing to compare",
            got=f"{len(recipes)} recipes, {len(options.seeds)} seeds, {options.processes} processes",
            allowed="at least one of each",
            fix="oldlogits compare recipes/desk_lockstep.toml --vary trainer.lr=1e-4,5e-4 --seeds 0 1 2",
        )
    out = options.out or Path("runs") / f"compare-{recipes[0].stem}"
    planned = plan_runs(recipes, overrides, options.vary, options.seeds, out)
    missing = [run for run in planned if not run.is_done]
    console = Console(highlight=False)
    if options.dry_run:
        console.print("\n".join([f"{len(missing)} of {len(planned)} runs are missing", *(run.label for run in missing)]))
        return 0
    out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    console.print(f"{out}: {len(planned)} runs, {len(planned) - len(missing)} of them done")
    failed: list[Outcome[PlannedRun, None]] = []

    def told(outcome: Outcome[PlannedRun, None]) -> None:
        failed.extend([outcome] if outcome.error else [])
        console.print(f"{outcome.job.label}: {'FAILED' if outcome.error else f'{outcome.wall_s:.0f} s'}")

    try:
        run_jobs(missing, perform, processes=options.processes, log=out / "log.txt", on_done=told)
    except KeyboardInterrupt:
        console.print("interrupted; the same command goes on")
        return INTERRUPTED
    figures = [read_figures(run) for run in planned if run.is_done]
    rows = rows_of(figures)
    plain = {name: {metric: asdict(mean) for metric, mean in means.items()} for name, means in rows.items()}
    write_atomic(out / "compare.json", encode({"rows": plain, "runs": [asdict(one) for one in figures]}) + "\n")
    write_atomic(out / "compare.md", markdown(rows, figures))
    console.print(legend(figures), terminal(rows), sep="\n")
    for outcome in failed:
        console.print(f"failed: {outcome.job.label}: {outcome.error.strip().splitlines()[-1]} (see {out / 'log.txt'})")
    return FAILED if failed else 0
