"""Padded, packed and shared micro-batches: tokens read, CPU time and peak memory of forward and backward, on the same batches.

    python -m benchmarks.layout [CASE ...] [--rounds 5]

Each case is a batch of a small Qwen3 of random weights (width 128, 2 layers, 512 words, fp32, one thread), in micro-batches of
8,192 tokens:

    ratio    32 sequences in one micro-batch, whose longest are 4 times their mean: 4 of 512 tokens, 28 of 73
    uniform  65 sequences of 128 to 512 tokens, the longest 4 times the shortest: padded ones are sorted by length
    equal    64 sequences of 150 tokens, no prompt in common: nothing is gained, and nothing may be lost
    desk     16 groups of 8, prompts of 60 to 100 tokens and 40 to 90 sampled ones: the order desk
    tau2     a prompt of 4,314 tokens, 8 members of 64 sampled ones: tau2's airline

Rounds are interleaved, and medians of CPU time are compared; *tokens/s* are trained ones per CPU second. *read* is per trained
token; *MiB* what an update adds to the peak of a process of its own; *log-probs* and *gradient* the largest difference from the
padded ones, that of the gradient as a share of its largest element.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from oldlogits.batch.sequences import Ints, Sequences
from oldlogits.core.scoring import Layout
from oldlogits.models.layout.decoder import lay_out
from oldlogits.models.ranks import ALONE
from oldlogits.models.scorer import action_logps, rank_micro_batches

LAYOUTS: Final[tuple[Layout, ...]] = ("padded", "packed", "shared")
BUDGET: Final = 8192
WORDS: Final = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Groups of sequences: how many members, tokens of the prompt, and sampled ones of each member."""

    groups: list[tuple[int, int, list[int]]]
    budget: int = BUDGET

    def batch(self) -> tuple[Sequences, Ints]:
        """Draw the tokens; return the sequences and the flat indices of what was sampled."""
        draw, lists, sampled = np.random.default_rng(0), [], []
        for members, prompt, tails in self.groups:
            ids = draw.integers(0, WORDS, prompt)
            for member in range(members):
                tail = tails[member % len(tails)]
                lists.append(np.concatenate([ids, draw.integers(0, WORDS, tail)]))
                sampled.append(np.arange(prompt + tail) >= max(prompt, 1))
        starts = np.cumsum([0, *map(len, lists)])
        ids = np.concatenate(lists)
        batch = Sequences(token_ids=ids, temperature=np.ones(len(ids), np.float32), starts=starts)
        return batch, np.flatnonzero(np.concatenate(sampled))


def _cases() -> dict[str, Callable[[], Case]]:
    draw = np.random.default_rng(1)
    desk = [(8, int(draw.integers(60, 101)), draw.integers(40, 91, 8).tolist()) for _ in range(16)]
    return {
        "ratio": lambda: Case(groups=[(1, 20, [492])] * 4 + [(1, 20, [53])] * 28, budget=32 * 512),
        "uniform": lambda: Case(groups=[(1, 20, [108 + 6 * i]) for i in range(65)]),
        "equal": lambda: Case(groups=[(1, 50, [100])] * 64),
        "desk": lambda: Case(groups=desk),
        "tau2": lambda: Case(groups=[(8, 4314, [64])]),
    }


def model_of(layout: Layout) -> PreTrainedModel:
    """Make the model, which reads its micro-batches in a layout."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=WORDS,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=384,
        max_position_embeddings=8192,
    )
    model = Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.03)  # so that every one matters
    why = lay_out(model, layout)
    assert not why, why
    return model


def update(model: PreTrainedModel, batch: Sequences, tokens: Ints, budget: int) -> tuple[Tensor, int]:
    """Form the gradient of the mean log-prob; return the log-probs and the tokens that were read."""
    model.zero_grad(set_to_none=True)
    logps, num_read = torch.zeros(len(tokens)), 0
    for one in rank_micro_batches(model, batch, tokens, budget, ALONE):
        found = action_logps(model, one.micro, head_chunk_tokens=2048)
        (found.sum() / len(tokens)).backward()  # type: ignore[no-untyped-call]
        logps[torch.from_numpy(np.searchsorted(tokens, one.micro.flat.numpy()))] = found.detach()
        num_read += one.micro.num_read
    return logps, num_read


def peak_mib(case: Case, layout: Layout) -> float:
    """Measure an update in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_mib, (case, layout))


def _peak_mib(case: Case, layout: Layout) -> float:
    torch.set_num_threads(1)
    model = model_of(layout)
    update(model, *Case(groups=[(2, 20, [30])]).batch(), BUDGET)
    before = _high_water_kib()
    update(model, *case.batch(), case.budget)
    return (_high_water_kib() - before) / 1024


def _high_water_kib() -> int:
    """Read the peak of this program's memory from Linux; what getrusage gives is that of its parent, if that had more."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def measure(name: str, case: Case, rounds: int) -> list[str]:
    """Compare the layouts on one case; a line for each."""
    batch, tokens = case.batch()
    models = {layout: model_of(layout) for layout in LAYOUTS}
    found = {layout: update(model, batch, tokens, case.budget) for layout, model in models.items()}
    gradients = {
        layout: torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        for layout, model in models.items()
    }
    seconds: dict[Layout, list[float]] = {layout: [] for layout in LAYOUTS}
    for _ in range(rounds):
        for layout, model in models.items():
            started = time.process_time()
            update(model, batch, tokens, case.budget)
            seconds[layout].append(time.process_time() - started)
    lines, expected = [], gradients["padded"]
    base, memory = statistics.median(seconds["padded"]), {layout: peak_mib(case, layout) for layout in LAYOUTS}
    for layout in LAYOUTS:
        logps, num_read = found[layout]
        taken = statistics.median(seconds[layout])
        apart = float((logps - found["padded"][0]).abs().max())
        turned = float((gradients[layout] - expected).abs().max() / expected.abs().max())
        lines.append(
            f"{name:<8} {layout:<7} {num_read / len(tokens):6.2f} {taken / base:6.2f} {len(tokens) / taken:9,.0f} "
            f"{memory[layout]:6,.0f} {apart:10.0e} {turned:9.0e}"
        )
    return lines


def main() -> None:
    """Print the table."""
    known = _cases()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=[*known, []], help="which; all by default")
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'case':<8} {'layout':<7} {'read':>6} {'time':>6} {'tokens/s':>9} {'MiB':>6} {'log-probs':>10} {'gradient':>9}")
    for name in chosen.cases or known:
        print("\n".join(measure(name, known[name](), chosen.rounds)), flush=True)


if __name__ == "__main__":
    main()
