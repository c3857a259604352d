"""The head's log-probs and their gradient against the naive way: time, and peak memory beyond hidden states and weights.

    python -m benchmarks.head [--tokens 1024] [--words 151936] [--width 128] [--rounds 5] [--smoke]

Setting: fp32, one thread of the CPU, random hidden states. The naive way forms logits, divides them by the temperature, and
takes ``log_softmax`` and ``gather``; ours gives the entropy as well. Each runs in a process of its own, rounds are interleaved,
and medians of CPU time are compared. Memory is the peak of the process less what it held before, gradients of hidden states and
weights included. The naive way takes 2.4 MB a token at a vocabulary of 151,936: `--naive-tokens` gives it fewer tokens, and
its peak is then scaled.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.machine import this_machine
from oldlogits.models.head.logits import LogitForm
from oldlogits.models.head.logps import HeadWork, token_logps

MEMORY_GOAL = 1 / 16
FP32 = torch.float32
FORM = LogitForm(weights=FP32, factors=FP32, sums=FP32, gradients=FP32)


def naive(rows: Tensor, weight: Tensor, targets: Tensor, temperature: Tensor) -> Tensor:
    logits = (rows @ weight.t()) / temperature[:, None]
    return torch.log_softmax(logits, 1).gather(1, targets[:, None]).squeeze(1)


def ours(rows: Tensor, weight: Tensor, targets: Tensor, temperature: Tensor) -> Tensor:
    work = HeadWork(form=FORM, tokens_at_once=1024, entropy=torch.empty(len(rows)))
    return token_logps(rows, weight, None, targets, temperature, work)


def peak_kib() -> int:
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))
    return int(found[1]) if found else 0


def worker(link: Connection, name: str, tokens: int, words: int, width: int) -> None:
    """Answer each call with the CPU seconds of a forward and backward pass, and the peak so far in GiB."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    compute: Callable[..., Tensor] = {"naive": naive, "ours": ours}[name]
    rows, weight = torch.randn(tokens, width, requires_grad=True), torch.randn(words, width).mul_(0.02).requires_grad_()
    targets, temperature, gradient = torch.randint(words, (tokens,)), torch.ones(tokens), torch.randn(tokens)
    before = peak_kib()
    while link.recv():
        rows.grad = weight.grad = None
        started = time.process_time()
        torch.autograd.backward(compute(rows, weight, targets, temperature), gradient)
        link.send((time.process_time() - started, (peak_kib() - before) / 2**20))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--naive-tokens", type=int, default=0, help="0: as many as ours")
    parser.add_argument("--words", type=int, default=151_936)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="a few seconds: does it run?")
    args = parser.parse_args()
    if args.smoke:
        args.tokens, args.words, args.width, args.rounds = 64, 4096, 16, 1
    of = {"naive": args.naive_tokens or args.tokens, "ours": args.tokens}
    print(this_machine("cpu", " ".join(sys.argv[1:])))
    context, links = get_context("spawn"), {}
    for name, tokens in of.items():
        links[name], other = context.Pipe()
        context.Process(target=worker, args=(other, name, tokens, args.words, args.width), daemon=True).start()
    seconds: dict[str, list[float]] = {name: [] for name in of}
    peaks = dict.fromkeys(of, 0.0)
    for _ in range(args.rounds):
        for name, link in links.items():
            link.send(True)
            took, peaks[name] = link.recv()
            seconds[name].append(took / of[name])
    for link in links.values():
        link.send(False)
    for name, tokens in of.items():
        cost = 1e6 * statistics.median(seconds[name])
        print(f"{name:6} {tokens:7,} tokens {cost:10.1f} CPU-us a token {peaks[name]:8.3f} GiB")
    times = statistics.median(a / b for a, b in zip(seconds["naive"], seconds["ours"], strict=True))
    share = peaks["ours"] / (peaks["naive"] * of["ours"] / of["naive"])
    print(f"tokens per CPU-second, times the naive way's: {times:.2f}")
    print(f"peak memory, of the naive way's at {args.tokens:,} tokens: {share:.4f} (goal <= {MEMORY_GOAL:.4f})")


if __name__ == "__main__":
    main()
