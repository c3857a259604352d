"""One update on the same batch and model: ours against a plain transformers loop and TRL's GRPO step, and what exactness costs.

    python -m benchmarks.update [--size full|part|smoke] [--rounds 5] [--trl VENV/bin/python] [--only NAME ...]

Setting: a Qwen3 of 20 M with random weights and a vocabulary of 151,936, fp32, one thread of the CPU; 64 trajectories of 200 to
2,000 tokens in groups of 8 that share a prompt, a fifth of them sampled. Ours and the plain loop make the same update:
PPO over the engine's log-probs, without a source, one AdamW step. Each contender is a process of its own; rounds are
interleaved; medians of the CPU time of a process are compared, and peaks of its memory, libraries included.

The full size takes most of an hour on one core, "part", an eighth of the trajectories, some minutes. TRL is asked of another
interpreter, since it may want other versions of what is installed here.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import load_file, save_file

from benchmarks.gpu.models import Shape, make_folder
from benchmarks.machine import this_machine
from benchmarks.update.batch import SIZES, Size, Trajectories
from benchmarks.update.ours import ROUTES

PLAIN_GOAL, MEMORY_GOAL = 6.0, 1 / 3
EXACT_GOALS: Final = {"exact, 1 version": 1.0, "exact, 2 versions": 1.15, "exact, 4 versions": 1.3}


class Contender:
    """A worker, and what it has said."""

    def __init__(self, name: str, python: str, size: str, folder: Path) -> None:
        self.name = name
        self.seconds: list[float] = []
        self.peak_gib = 0.0
        root = Path(__file__).parents[2]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, self._path(python, root)))}
        command = [python, "-m", "benchmarks.update.worker", name, size, str(folder)]
        self._process = subprocess.Popen(command, stdin=-1, stdout=-1, text=True, env=environment, cwd=root)
        self._read()

    @staticmethod
    def _path(python: str, root: Path) -> Sequence[Path | str]:
        """The product is not for another interpreter."""
        own = (root / "src", root / "examples", root)
        return (*own, *filter(None, [os.environ.get("PYTHONPATH")])) if python == sys.executable else (root,)

    def _read(self) -> Mapping[str, float]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                found: Mapping[str, float] = json.loads(line)
                return found
        raise RuntimeError(f"{self.name} has ended with {self._process.wait()}")

    def update(self) -> None:
        """Let it make an update."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        self.seconds.append(self._read()["cpu_s"])

    def end(self) -> None:
        """Let it end, and say the peak of its memory."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self.peak_gib = self._read()["peak_kib"] / 2**20
        self._process.wait()


def make_setting(folder: Path, size: Size) -> Trajectories:
    """Write model and batch; embeddings are so small that every word is about as probable, as the batch's log-probs say."""
    shape = Shape(
        hidden_size=size.width,
        intermediate_size=3 * size.width,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=size.width // 4,
        vocab_size=size.vocabulary,
    )
    make_folder(folder / "model", shape, torch.device("cpu"))
    file = folder / "model" / "model.safetensors"
    weights = load_file(file)
    save_file({name: 0.1 * one if "embed" in name else one for name, one in weights.items()}, file, metadata={"format": "pt"})
    trajectories = Trajectories.drawn(size)
    trajectories.save(folder / "batch.npz")
    million = shape.num_parameters / 1e6
    num, sampled = len(trajectories.token_ids), int(trajectories.is_sampled.sum())
    print(f"Qwen3 of {million:.1f} M, vocabulary {size.vocabulary:,}, fp32, one thread")
    print(f"{len(trajectories.advantages)} trajectories, {num:,} tokens, {sampled:,} of them sampled", flush=True)
    return trajectories


def ratio(above: Contender, below: Contender) -> float:
    """The median over rounds of how many times as long one takes as the other."""
    return statistics.median(a / b for a, b in zip(above.seconds, below.seconds, strict=True))


def table(found: Mapping[str, Contender], num_sampled: int) -> list[str]:
    """The lines of the report, at 80 columns."""
    lines = ["", f"{'':28}{'CPU s':>9}{'tokens/CPU-s':>14}{'peak GiB':>10}"]
    for name, one in found.items():
        seconds = statistics.median(one.seconds)
        lines.append(f"{name:28}{seconds:9.2f}{num_sampled / seconds:14.0f}{one.peak_gib:10.2f}")
    ours = found.get("none")
    for name, label in (("plain", "a plain transformers loop"), ("trl", "TRL's GRPO step")):
        if ours is not None and name in found:
            times, share = ratio(found[name], ours), ours.peak_gib / found[name].peak_gib
            goals = (f"goal >= {PLAIN_GOAL:g}", f"goal <= {MEMORY_GOAL:.2f}") if name == "plain" else ("", "")
            lines += ["", f"against {label}"]
            lines.append(f"  {'trained tokens per CPU-second, times its':48}{times:8.2f}   {goals[0]}".rstrip())
            lines.append(f"  {'peak memory, of its':48}{share:8.2f}   {goals[1]}".rstrip())
    if "arrival" in found:
        lines += ["", "what exactness costs: an update's CPU seconds, of those with arrival"]
        for name in ROUTES:
            if name in found and name != "arrival":
                goal = f"goal <= {EXACT_GOALS[name]:g}" if name in EXACT_GOALS else ""
                lines.append(f"  {name:48}{ratio(found[name], found['arrival']):8.2f}   {goal}".rstrip())
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--smoke", action="store_true", help="a few seconds: does it run? as --size smoke --rounds 1")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--trl", default="", help="an interpreter that has TRL")
    parser.add_argument("--only", nargs="*", default=[], help="contenders: " + ", ".join(["plain", "trl", *ROUTES]))
    args = parser.parse_args()
    if args.smoke:
        args.size, args.rounds = "smoke", 1
    names = [name for name in ("plain", *(["trl"] if args.trl else []), *ROUTES) if name in args.only or not args.only]
    print(this_machine("cpu", f"benchmarks.update --size {args.size} --rounds {args.rounds}"))
    if not args.trl:
        print("TRL is left out: --trl names an interpreter that has it")
    with tempfile.TemporaryDirectory() as folder:
        trajectories = make_setting(Path(folder), SIZES[args.size])
        found = {
            name: Contender(name, args.trl if name == "trl" else sys.executable, args.size, Path(folder)) for name in names
        }
        for number in range(args.rounds):
            for one in found.values():
                one.update()
            took = ", ".join(f"{name} {one.seconds[-1]:.2f}" for name, one in found.items())
            print(f"round {number}: {took}", flush=True)
        for one in found.values():
            one.end()
    print("\n".join(table(found, int(trajectories.is_sampled.sum()))))


if __name__ == "__main__":
    main()
