"""What routing replay does to r_d and to the lag-0 error: recipes/desk_moe.toml with model.routing off, recorded and replayed.

    python -m benchmarks.experts [--precisions fp32 int8 fp8] [--seeds 2] [--num-updates 6] [--lags 0 4]

Runs of one precision, lag and seed are played in turns. Their first batches hold the same tokens, which are compared in the
rows "first"; later ones differ, since the updates do. A lag is the largest one of a token (lockstep.max_lag), in versions.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

RECIPE: Final = "recipes/desk_moe.toml"
MODES: Final = ("off", "recorded", "replayed")
BANDS: Final = (1.1, 1.5)


@dataclass(slots=True, kw_only=True)
class Found:
    """What the runs of one kind have given, run after run; `first` is |log r_d| of the tokens of the first update."""

    first: list[NDArray[np.float32]] = field(default_factory=list)
    every: list[NDArray[np.float32]] = field(default_factory=list)
    lag0: list[float] = field(default_factory=list)
    lag0_above: list[float] = field(default_factory=list)
    other_tokens: list[float] = field(default_factory=list)
    other_choices: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    score_s: list[float] = field(default_factory=list)

    def add(self, run: Path) -> None:
        """Read a run folder."""
        tables = [pq.read_table(path, columns=["log_r_d"]) for path in sorted((run / "tokens").glob("*.parquet"))]
        errors = [np.abs(table.column(0).to_numpy()) for table in tables]
        self.first.append(errors[0])
        self.every += errors
        events = [json.loads(line) for line in (run / "events.jsonl").read_text(encoding="utf-8").splitlines()]
        self.lag0.append(json.loads((run / "summary.json").read_text())["consistency_lag0_max_abs_error"])
        for metrics in (event["metrics"] for event in events if event["kind"] == "update"):
            self.lag0_above.append(metrics.get("consistency/num_lag0_above", math.nan))
            self.other_tokens.append(metrics.get("routing/scored_other_tokens", math.nan))
            self.other_choices.append(metrics.get("routing/scored_other_choices", math.nan))
            self.step_s.append(metrics["time/step_s"])
            self.score_s.append(metrics["time/score_s"])


def play(precision: str, lag: int, seed: int, mode: str, num_updates: int, folder: Path) -> None:
    """Train the recipe without evaluations and checkpoints."""
    words = {
        "seed": seed,
        "num-updates": num_updates,
        "engine.precision": precision,
        "lockstep.max-lag": lag,
        "model.routing": mode,
        "model.seed": 0,
        "eval.num-episodes": 0,
        "eval.every": 0,
        "record.checkpoint-every": 0,
        "out": folder,
    }
    arguments = [word for name, value in words.items() for word in (f"--{name}", str(value))]
    subprocess.run([sys.executable, "-m", "oldlogits", "train", RECIPE, *arguments], check=True, stdout=subprocess.DEVNULL)


def row(name: str, errors: NDArray[np.float32]) -> str:
    """One row of the table of r_d."""
    outside = "  ".join(f"{np.mean(errors > math.log(band)):7.3%}" for band in BANDS)
    return f"{name:26} {len(errors):7,} {errors.mean():9.2e} {np.quantile(errors, 0.99):9.2e} {errors.max():9.2e} {outside}"


def show(found: dict[tuple[str, int, str], Found]) -> None:
    """Print both tables."""
    print(f"\n{'|log r_d|':26} {'tokens':>7} {'mean':>9} {'99%':>9} {'max':>9} " + "  ".join(f"out {b:g}" for b in BANDS))
    for (precision, lag, mode), one in found.items():
        print(row(f"{precision} lag {lag} {mode} first", np.concatenate(one.first)))
        print(row(f"{precision} lag {lag} {mode} all", np.concatenate(one.every)))
    print(f"\n{'an update':26} {'lag-0 max':>9} {'above':>6} {'tokens':>8} {'choices':>8} {'score s':>8} {'step s':>8}")
    for (precision, lag, mode), one in found.items():
        shares = " ".join(
            f"{np.mean(all):8.3%}" if mode != "off" else f"{'-':>8}" for all in (one.other_tokens, one.other_choices)
        )
        above = f"{np.sum(one.lag0_above):6.0f}" if mode != "replayed" else f"{'-':>6}"
        times = f"{np.mean(one.score_s):8.2f} {np.mean(one.step_s):8.2f}"
        print(f"{precision + f' lag {lag} {mode}':26} {max(one.lag0):9.1e} {above} {shares} {times}")


def main() -> None:
    """Play all runs; print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precisions", nargs="+", default=["fp32", "int8", "fp8"])
    parser.add_argument("--lags", nargs="+", type=int, default=[0, 4])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--num-updates", type=int, default=6)
    options = parser.parse_args()
    found: dict[tuple[str, int, str], Found] = defaultdict(Found)
    for precision in options.precisions:
        for lag in options.lags:
            for seed in range(options.seeds):
                for mode in MODES:
                    with tempfile.TemporaryDirectory() as folder:
                        play(precision, lag, seed, mode, options.num_updates, Path(folder) / "run")
                        found[precision, lag, mode].add(Path(folder) / "run")
                        errors = np.concatenate(found[precision, lag, mode].every)
                        print(row(f"{precision} lag {lag} {mode}, seed {seed}", errors), flush=True)
    print(f"{RECIPE}, {options.seeds} seeds, {options.num_updates} updates each")
    show(found)


if __name__ == "__main__":
    main()
