"""Which kernels are used: numba on the CPU where it can be had, torch operations elsewhere."""

from __future__ import annotations

import functools
import importlib

from torch import Tensor

from oldlogits.versions.patches.kernels_torch import TorchKernels
from oldlogits.versions.patches.streams import Kernels

_TORCH = TorchKernels()
FEW = 1 << 14
"""Values for which starting numba (half a second; some seconds the first time on a machine) is never worth while."""


def kernels_for(values: Tensor) -> Kernels:
    """The fastest kernels for a buffer."""
    if values.device.type != "cpu" or values.numel() < FEW:
        return _TORCH
    return _numba()[0] or _TORCH


def kernels_in_use() -> str:
    """What runs on the CPU, in words: "numba on znver5 (avx512)", or torch operations and the reason."""
    return _numba()[1]


@functools.cache
def _numba() -> tuple[Kernels | None, str]:
    """The numba kernels, compiled when first used, and a description of them."""
    try:
        intrinsics = importlib.import_module("oldlogits.versions.patches.intrinsics")
        kernels = importlib.import_module("oldlogits.versions.patches.kernels")
    except ImportError as error:
        return None, f"torch operations (slow): numba is not available: {error}; pip install 'oldlogits[kernels]'"
    if reason := intrinsics.why_unusable():
        return None, f"torch operations (slow): {reason}"
    return kernels.NumbaKernels(), intrinsics.describe_machine()
