"""What an agent program costs: trained tokens per second of the order desk as a class, and as a program.

    python -m benchmarks.program [--rounds 3] [--num-updates 12]

The program talks once through the openai client, and once through a plain HTTP client (plain_agent.py): what these two differ
by is the client's, the rest is the gateway's. All are trained in turns, a fresh run each; the first updates, in which the
queue fills, are left out. Needs `pip install 'openai[aiohttp]'`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

PROGRAM = "examples/openai_agent/openai_agent.toml"
RUNS = {
    "class": ["recipes/desk.toml"],
    "openai": [PROGRAM],
    "plain": [PROGRAM, "--env.program", "benchmarks.plain_agent:agent"],
}
"""The words of `oldlogits train` by what is measured."""
SKIPPED = 3
"""Updates at the beginning of a run that are not counted."""


def tokens_per_s(run: list[str], num_updates: int, folder: Path) -> float:
    """Train without evaluations and checkpoints; return its trained tokens per second."""
    words = ["--num-updates", str(num_updates), "--eval.num-episodes", "0", "--eval.every", "0"]
    words += ["--record.checkpoint-every", "0", "--out", str(folder)]
    subprocess.run([sys.executable, "-m", "oldlogits", "train", *run, *words], check=True, stdout=subprocess.DEVNULL)
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    updates = [event for event in events if event["kind"] == "update"][SKIPPED:]
    num_tokens = sum(sum(update["staleness_counts"].values()) for update in updates)
    seconds = [float(u["metrics"]["time/update_s"] + u["metrics"]["time/between_s"]) for u in updates]
    return float(num_tokens / sum(seconds))


def main() -> None:
    """Run the rounds; print every pair, and the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--num-updates", type=int, default=12)
    options = parser.parse_args()
    if options.num_updates <= SKIPPED or options.rounds < 1:
        parser.error(f"at least one round of more than {SKIPPED} updates")
    found: dict[str, list[float]] = {name: [] for name in RUNS}
    for number in range(options.rounds):
        for name, run in RUNS.items():
            with tempfile.TemporaryDirectory() as folder:
                found[name].append(tokens_per_s(run, options.num_updates, Path(folder) / "run"))
        newest = ", ".join(f"{name} {rates[-1]:,.0f}" for name, rates in found.items())
        print(f"round {number + 1}: {newest} trained tokens/s", flush=True)
    for name, rates in found.items():
        ratios = [own / of for of, own in zip(found["class"], rates, strict=True)]
        share = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) of the class"
        print(f"{name:8} median {statistics.median(rates):7,.0f} trained tokens/s, {share}")
    print("the goal of the program over the openai client is 0.70")


if __name__ == "__main__":
    main()
