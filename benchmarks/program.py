"""What an agent program costs: trained tokens per second of the order desk as a class and as a program over the openai client.

    python -m benchmarks.program [--rounds 3] [--num-updates 12]

Both are trained in turns, a fresh run each; the first updates, in which the queue fills, are left out. Needs
`pip install openai`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

RECIPES = {"class": "recipes/desk.toml", "program": "examples/openai_agent/openai_agent.toml"}
SKIPPED = 3
"""Updates at the beginning of a run that are not counted."""


def tokens_per_s(recipe: str, num_updates: int, folder: Path) -> float:
    """Train a recipe without evaluations and checkpoints; return its trained tokens per second."""
    words = ["--num-updates", str(num_updates), "--eval.num-episodes", "0", "--eval.every", "0"]
    words += ["--record.checkpoint-every", "0", "--out", str(folder)]
    subprocess.run([sys.executable, "-m", "oldlogits", "train", recipe, *words], check=True, stdout=subprocess.DEVNULL)
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
    found: dict[str, list[float]] = {name: [] for name in RECIPES}
    for number in range(options.rounds):
        for name, recipe in RECIPES.items():
            with tempfile.TemporaryDirectory() as folder:
                found[name].append(tokens_per_s(recipe, options.num_updates, Path(folder) / "run"))
        of_class, of_program = (rates[-1] for rates in found.values())
        print(f"round {number + 1}: class {of_class:,.0f}, program {of_program:,.0f} trained tokens/s", flush=True)
    ratios = [program / of for of, program in zip(found["class"], found["program"], strict=True)]
    medians = {name: statistics.median(rates) for name, rates in found.items()}
    print(f"medians of {options.rounds}: class {medians['class']:,.0f}, program {medians['program']:,.0f} trained tokens/s")
    print(f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}); the goal is 0.70")


if __name__ == "__main__":
    main()
