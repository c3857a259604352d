"""The peak of a device in dense bf16 matrix products."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch

from benchmarks.gpu.clock import seconds_of

BF16_TFLOPS: Final[Mapping[str, float]] = {
    "B200": 2250.0,
    "GH200": 989.4,
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.4,
    "H800": 989.4,
    "A100": 312.0,
    "A800": 312.0,
    "A40": 149.7,
    "A30": 165.0,
    "A10": 125.0,
    "L40S": 362.0,
    "L4": 121.0,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
}
"""Dense bf16 TFLOP/s with fp32 accumulation, by a part of the device's name: of NVIDIA's data sheets (RTX: of the white
papers); where these give a figure with sparsity, half of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Peak:
    """Floating-point operations in a second, and where the figure comes from."""

    flops: float
    source: str


def named_peak(name: str) -> Peak | None:
    """The peak of a device by its name, of the longest part that fits; None: it is not in the table."""
    words = f" {name} ".replace("-", " ")
    found = [part for part in BF16_TFLOPS if f" {part} " in words]
    if not found:
        return None
    part = max(found, key=len)
    return Peak(flops=BF16_TFLOPS[part] * 1e12, source=f"dense bf16 of an {part}, data sheet")


def peak_of(device: torch.device) -> Peak:
    """The peak of a device: of the table, else that of a large matrix product, as measured."""
    known = named_peak(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if known is not None:
        return known
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)  # bf16 is slow on many CPUs
    flops = measured_flops(device, size, dtype)
    return Peak(flops=flops, source=f"unknown device: a product of {size} x {size} in {str(dtype)[6:]}, as measured")


def measured_flops(device: torch.device, size: int, dtype: torch.dtype) -> float:
    """What a product of two square random matrices reaches: the best of five after one that warms up."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    left @ right
    return 2 * size**3 / min(seconds_of(lambda: left @ right, device) for _ in range(5))
