"""A recipe under several seeds, each with its own warm start: what is learned, as a table.

python -m benchmarks.seeds recipes/desk_lockstep.toml --seeds 0,1,2,3,4 [--out runs/seeds] [any recipe override]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import fmean

from oldlogits.config.load import load_config
from oldlogits.record.intervals import Interval
from oldlogits.record.summary import Summary
from oldlogits.run.run import run

COLUMNS = ("seed", "sampled before", "sampled after", "greedy before", "greedy after", "gain", "several versions", "train s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--out", type=Path, default=Path("runs/seeds"))
    options, overrides = parser.parse_known_args()
    summaries = []
    for seed in options.seeds.split(","):
        config = load_config(options.recipe, [*overrides, "--seed", seed])
        result = run(config, options.out / f"seed{seed}")
        if result.error is not None:
            raise result.error
        summaries.append(result.summary)
    print(table(summaries))


def table(summaries: list[Summary]) -> str:
    lines = [COLUMNS, ("---",) * len(COLUMNS), *map(row, summaries)]
    after = [s.success_after.mean for s in summaries if s.success_after]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{text}\n\nsampled after: mean {fmean(after):.3f}, worst {min(after):.3f}, {len(after)} seeds"


def row(s: Summary) -> tuple[str, ...]:
    several = s.num_multi_version_trajectories / max(s.num_trajectories, 1)
    measured = map(shown, (s.success_before, s.success_after, s.greedy_before, s.greedy_after, s.gain))
    return (str(s.seed), *measured, f"{several:.0%}", f"{s.train_wall_s:.0f}")


def shown(interval: Interval | None) -> str:
    return "-" if interval is None else f"{interval.mean:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


if __name__ == "__main__":
    main()
