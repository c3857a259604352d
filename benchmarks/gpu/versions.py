"""Exact versions on a device: a switch, an encoding, and taking a version into the average, held to docs/versions.md."""

from __future__ import annotations

import statistics

import torch

from benchmarks.gpu.clock import Budget
from benchmarks.gpu.rows import Row, Rows
from benchmarks.gpu.training import memory_of
from benchmarks.versions.bars import ANY, BY_NAME, GPU_PARAMS, SLOW
from oldlogits.bench.chains import SyntheticModel
from oldlogits.bench.lab import Lab, time_busy
from oldlogits.versions import WeightAverage

BYTES_OF_A_PARAMETER = 30
"""Masters, gradient, moments and random numbers in fp32, four copies in bf16, and what the kernels need."""


def measure_versions(device: torch.device, rows: Rows, budget: Budget) -> None:
    """Versions of a random model with AdamW steps at 1e-6, then the average; fewer parameters where memory is short."""
    most = GPU_PARAMS if device.type == "cuda" else 2_000_000
    num = min(most, int(memory_of(device) / BYTES_OF_A_PARAMETER) if device.type == "cuda" else most)
    chain = SyntheticModel(num_params=num, lr=SLOW, device=device.type)
    lab = Lab(chain)
    for _ in range(4):
        lab.round()
        if budget.left_s < 30:
            break
    num = sum(weight.numel() for weight in chain.masters.values())
    note = f"{num / 1e9:.3g} B parameters, AdamW at 1e-6, {lab.values['share.changed'][-1]:.2%} of the values changed"
    for name, key, said in (("switch of versions", "switch", note), ("encode, cast included", "encode", "")):
        bar = BY_NAME[f"ms.{key}"].bar("gpu", SLOW, num) if device.type == "cuda" else None
        value = 1000 * statistics.median(lab.times[key][1:] or lab.times[key])
        rows.add(Row(name=name, value=value, unit="ms", most=bar, note=said))
    copy_ms = 1000 * statistics.median(lab.times["memcpy"])
    rows.add(Row(name="copy of all bf16 weights", value=copy_ms, unit="ms"))
    del lab, chain
    measure_average(device, num, rows)


def measure_average(device: torch.device, num: int, rows: Rows) -> None:
    """Take fp32 masters into the average."""
    masters = {"all": torch.randn(num, device=device)}
    average = WeightAverage(masters)
    seconds = [time_busy(lambda: average.add(masters, 0.8), device)[1] for _ in range(5)]
    bar = BY_NAME["ms.ewma"].bar("gpu", ANY, num) if device.type == "cuda" else None
    rows.add(Row(name="EWMA update", value=1000 * statistics.median(seconds[1:]), unit="ms", most=bar))
