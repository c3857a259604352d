"""Taking a version into the weight average, against copying the same masters.

    python -m benchmarks.ewma [--rounds 25] [--hidden 576] [--layers 30] [--vocabulary 49152] [--device cpu]

Setting: the weights of a model of that shape (135 M by default) in float32. The copy writes every master into a tensor
of its own that is already there: what any route that keeps one version pays at least. Rounds are interleaved; the
median of the ratios of CPU time in one thread (of wall time on an accelerator) counts.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from oldlogits.versions import WeightAverage


def masters(hidden: int, layers: int, vocabulary: int, device: str) -> dict[str, Tensor]:
    shapes = {"embedding": (vocabulary, hidden)}
    for layer in range(layers):
        block = {"q": (hidden, hidden), "k": (hidden // 3, hidden), "v": (hidden // 3, hidden), "o": (hidden, hidden)}
        block |= {"gate": (8 * hidden // 3, hidden), "up": (8 * hidden // 3, hidden), "down": (hidden, 8 * hidden // 3)}
        shapes |= {f"{layer}.{name}": shape for name, shape in block.items()} | {f"{layer}.norm": (2, hidden)}
    torch.manual_seed(0)
    return {name: torch.randn(shape, device=device) for name, shape in shapes.items()}


def measure(work: Callable[[], None], device: str) -> float:
    on_cpu = device == "cpu"
    clock = time.process_time if on_cpu else time.perf_counter
    started = clock()
    work()
    if not on_cpu:
        torch.accelerator.synchronize()
    return clock() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    weights = masters(options.hidden, options.layers, options.vocabulary, options.device)
    average, copies = WeightAverage(weights), {name: weight.clone() for name, weight in weights.items()}

    def copy() -> None:
        for name, weight in weights.items():
            copies[name].copy_(weight)

    works = {"copy": copy, "average": lambda: average.add(weights, 0.8)}
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(options.rounds + 1):
        for name, work in works.items():
            seconds[name].append(measure(work, options.device))
    median = {name: 1000 * statistics.median(values[1:]) for name, values in seconds.items()}
    ratio = statistics.median(a / c for a, c in zip(seconds["average"][1:], seconds["copy"][1:], strict=True))
    print(f"{average.num_bytes / 2**20:,.0f} MiB of masters in {len(weights)} tensors, {options.device}")
    print(f"copy {median['copy']:.2f} ms, average {median['average']:.2f} ms: {ratio:.2f} of the copy (target: at most 1.05)")


if __name__ == "__main__":
    main()
