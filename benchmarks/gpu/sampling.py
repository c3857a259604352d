"""Tokens per second of the embedded engine: prefill, and decoding with and without CUDA graphs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from benchmarks.gpu.clock import Budget, seconds_of
from benchmarks.gpu.rows import Row, Rows
from benchmarks.gpu.training import memory_of
from oldlogits.core.engine import EngineSpec, Sampling
from oldlogits.engines.embedded.engine import EngineCore


def measure_engine(label: str, folder: Path, device: torch.device, rows: Rows, budget: Budget) -> None:
    """Sample many sequences at once: first to warm up, then twice, each time with prompts of its own."""
    on_gpu = device.type == "cuda"
    prompt, new = (512, 256) if on_gpu else (32, 16)
    slots = (128 if memory_of(device) > 100 * 2**30 else 32) if on_gpu else 8
    spec = EngineSpec(
        model_path=str(folder), max_num_seqs=slots, max_context=1024 if on_gpu else 64, device="cuda" if on_gpu else "cpu"
    )
    core = EngineCore(spec)
    _play(core, 0, slots, prompt, new, device)
    named = {"with CUDA graphs": True, "without": False} if on_gpu else {"on the CPU": False}
    for round_number, (how, is_captured) in enumerate(named.items(), start=1):
        core.decode_step.is_captured = is_captured
        before = core.stats
        seconds = _play(core, round_number, slots, prompt, new, device)
        decode, prefill = (
            (line.size - then.size) / (line.s - then.s)
            for line, then in ((core.stats.decode, before.decode), (core.stats.prefill, before.prefill))
        )
        note = f"fp32, {slots} sequences, prompts of {prompt}, {new} new tokens each, {seconds:.1f} s"
        rows.add(Row(name=f"decode {label}, {how}", value=decode, unit="tokens/s", note=note))
        if round_number == 1:
            rows.add(Row(name=f"prefill {label}", value=prefill, unit="tokens/s"))
        if budget.left_s < 2 * seconds:
            break


def _play(core: EngineCore, seed: int, slots: int, prompt: int, new: int, device: torch.device) -> float:
    rng = np.random.default_rng(seed)
    for i in range(slots):
        core.add(f"{seed}/{i}", rng.integers(3, 250, prompt).tolist(), Sampling(max_tokens=new))

    def run() -> None:
        while not core.idle:
            core.step()

    return seconds_of(run, device)
