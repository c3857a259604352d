"""Strike every kind of process of a run, again and again: does it go on, end clearly, and lose nothing?

python -m benchmarks.kills [--num 200] [--seed 0] [--kinds trainer engine ...] [--moments publish ...] [--jobs 2] [--out FOLDER]
python -m benchmarks.kills --read FILE ...

A run of a small desk agent is killed, frozen, or finds its disk full; what ends is resumed, and struck again, four times; then
it is played to its end. It must never hang, leave a process behind, train a token twice or lose what was ready; its old logits
must be exact and its account must balance. Linux only.

With --out every trial is a line of FOLDER/seed-SEED.jsonl, and the folder of a run with a failed trial stays; the same command
again plays what is missing. --read prints the summary of such files.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from benchmarks.kills.chain import Chain
from benchmarks.kills.results import Result, append, missing, read
from benchmarks.kills.trials import KINDS, MOMENTS, plans

MOST_LOST = 0.01
"""The share of sampled tokens that may be lost."""


def main() -> int:
    """Run the trials, one line each; 1 if one of them failed or too much was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=200, help="trials")
    parser.add_argument("--seed", type=int, default=0, help="of kinds, moments and delays")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--moments", nargs="+", choices=MOMENTS, default=list(MOMENTS))
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--out", type=Path, default=None, help="keep results, and the folders of what fails, here")
    parser.add_argument("--read", nargs="+", type=Path, default=[], help="only print the summary of these files")
    options = parser.parse_args()
    if options.read:
        return conclude([result for path in options.read for result in read(path)])
    os.environ["OMP_NUM_THREADS"] = "1"  # of all runs, before they are imported
    planned = plans(options.num, options.seed, options.kinds, options.moments)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
    kept = None if options.out is None else options.out / f"seed-{options.seed}.jsonl"
    results = [] if kept is None else read(kept)
    runs = missing(planned, results)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(options.jobs) as pool:
        folder = options.out / f"seed-{options.seed}" if options.out else Path(temporary)
        chains = [
            Chain(i, planned[i], folder / f"{i:03d}-{planned[i].setup}", keeps_failed=options.out is not None) for i in runs
        ]
        try:
            for done in as_completed([pool.submit(chain.play) for chain in chains]):
                found = done.result()
                if kept is not None:
                    append(kept, found)
                for result in found:
                    results.append(result)
                    print(line(len(results), options.num, result), flush=True)
        except BaseException:  # nothing is left running
            pool.shutdown(wait=False, cancel_futures=True)
            for chain in chains:
                chain.close()
            raise
    return conclude(results) or int(len(results) < options.num)


def conclude(results: Sequence[Result]) -> int:
    """Print what came of all trials; returns the exit status."""
    print()
    print("\n".join(table(results)))
    failed, share, apart = sum(bool(result.wrong) for result in results), share_lost(results), share_restarted(results)
    print(f"{failed} of {len(results)} trials failed")
    print(f"{share:.2%} of the sampled tokens were lost (at most {MOST_LOST:.0%})")
    print(f"{apart:.2%} more were those of episodes whose environment nobody can carry on")
    print(f"{sum(result.seconds_s for result in results) / max(len(results), 1):.1f} s a trial, without the end of its run")
    return 1 if failed or share >= MOST_LOST else 0


def line(number: int, num: int, result: Result) -> str:
    """A trial in a line, with a further one for each fault."""
    verdict, trial = "FAILED" if result.wrong else "ok", result.trial
    lost = f"{result.loss.num:4d} of {result.loss.num_sampled:5d}"
    found = f"{number:4d}/{num} {verdict:6} {trial.kind:20} {trial.moment:10} {result.came:11} {lost} {result.seconds_s:3.0f} s"
    return "\n".join([found, *(f"       {wrong}" for wrong in result.wrong)])


def table(results: Sequence[Result]) -> list[str]:
    """Trials, what came of them and what they lost, by kind and by moment."""
    columns = f"{'trials':>6}{'went on':>8}{'resumed':>8}{'anew':>6}{'known':>7}{'half':>6}{'share':>7}{'apart':>7}"
    lines = [f"{'':22}{columns}"]
    sections: list[tuple[Sequence[str], Callable[[Result], str]]] = [
        (list(KINDS), lambda result: result.trial.kind),
        (MOMENTS, lambda result: result.trial.moment),
        (["all"], lambda result: "all"),
    ]
    for names, key in sections:
        for name in names:
            if of := [result for result in results if key(result) == name]:
                came = [sum(result.came == what for result in of) for what in ("went on", "resumed", "began again")]
                known, half = sum(r.loss.num_known for r in of), sum(r.loss.num_half_turns for r in of)
                figures = f"{len(of):6d}{came[0]:8d}{came[1]:8d}{came[2]:6d}{known:7d}{half:6d}{share_lost(of):7.2%}"
                lines.append(f"{name:22}{figures}{sum(r.loss.num_restarted for r in of):7d}")
        lines.append("")
    return lines


def share_lost(results: Sequence[Result]) -> float:
    """The tokens that strikes cost, as a share of those that their runs had sampled."""
    return sum(result.loss.num for result in results) / max(sum(result.loss.num_sampled for result in results), 1)


def share_restarted(results: Sequence[Result]) -> float:
    """The same share of the tokens of episodes whose environment could not be carried on."""
    return sum(result.loss.num_restarted for result in results) / max(sum(result.loss.num_sampled for result in results), 1)


if __name__ == "__main__":
    sys.exit(main())
