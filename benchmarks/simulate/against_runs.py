"""The simulation against real runs that it was not made with: recipes/desk.toml changed in three ways, runtime local.

python -m benchmarks.simulate.against_runs [--repeats 3] [--out runs/simulate]

Every run is simulated from its own step times. Runs that are there already are not made anew. "load": of the machine, by its
own account, before the run; the run itself adds about 2.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from benchmarks.simulate.fit import MeasuredRun
from benchmarks.simulate.validate import BARS, Comparison, compare
from oldlogits.config.load import load_config
from oldlogits.run.run import run

RECIPE = Path("recipes/desk.toml")
COMMON = "--eval.num-episodes 0 --eval.every 0 --record.checkpoint-every 0 --num-updates"
CHANGES = {
    "d40": "40 --trainer.minibatches-per-update 1 --rollout.prompts-per-update 16 --proximal.source interruption",
    "f40": "40 --proximal.source dedicated --engine.max-num-seqs 64",
    "b20": "20 --trainer.minibatches-per-update 1 --rollout.max-running-groups 6 --env.latency-s 0.5",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/simulate"))
    options = parser.parse_args()
    rows = []
    for repeat in range(1, options.repeats + 1):
        for name, changes in CHANGES.items():
            folder = options.out / f"{name}.{repeat}"
            if not folder.is_dir():
                train(folder, changes)
            load = (options.out / f"{folder.name}.load").read_text(encoding="utf-8").split()[0]
            judged = [row for row in compare(MeasuredRun.read(folder)) if row.bar is not None]
            rows.append((folder.name, load, *map(cell, judged)))
    lines = [("run", "load", *BARS), ("---",) * (2 + len(BARS)), *rows]
    print("\n".join("| " + " | ".join(line) + " |" for line in lines))


def train(folder: Path, changes: str) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    (folder.parent / f"{folder.name}.load").write_text(f"{os.getloadavg()[0]:.1f}\n", encoding="utf-8")
    result = run(load_config(RECIPE, f"{COMMON} {changes}".split()), folder)
    if result.error is not None:
        raise result.error


def cell(row: Comparison) -> str:
    """Predicted, measured, error; bold where it is more than is allowed."""
    is_share = row.bar is not None and row.bar.kind == "absolute"
    error = f"{row.error:+.3f}" if is_share else f"{row.error:+.1%}"
    digits = 3 if is_share else 2
    return f"{row.predicted:.{digits}f}, {row.measured:.{digits}f}: {error if row.passes else f'**{error}**'}"


if __name__ == "__main__":
    main()
