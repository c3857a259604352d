"""Which kernels are used: numba on the CPU where it can be had, torch operations elsewhere."""

from __future__ import annotations

import functools
import importlib

import torch

from oldlogits.versions.kernels_torch import TorchKernels
from oldlogits.versions.streams import Kernels

_TORCH = TorchKernels()


def kernels_for(device: torch.device) -> Kernels:
    """The fastest kernels for tensors on `device`."""
    numba, _ = _numba()
    return numba if numba is not None and device.type == "cpu" else _TORCH


def fast_path() -> str:
    """In words, what runs on the CPU: "numba on znver5 (avx512)", or torch operations and the reason."""
    return _numba()[1]


@functools.cache
def _numba() -> tuple[Kernels | None, str]:
    """The numba kernels, compiled when first used, and what to say about them."""
    try:
        module = importlib.import_module("oldlogits.versions.kernels")
    except ImportError as error:
        return None, f"torch operations (slow): numba is not available: {error}"
    if reason := module.refusal():
        return None, f"torch operations (slow): {reason}"
    kernels: Kernels = module.NumbaKernels()
    return kernels, module.description()
