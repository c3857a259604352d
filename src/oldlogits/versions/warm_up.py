"""The compiled loops, made ready beside what a process does before it needs them: no update waits for a compiler."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from oldlogits.versions.patches.kernel_choice import FEW, kernels_in_use
from oldlogits.versions.store import PatchStore


def warm_up(weights: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> threading.Thread | None:
    """Have the loops compiled that store versions of such weights, in a thread; None: they are too few for compiled loops.

    Args:
        weights: The weights whose versions will be stored.
        dtype: The dtype of the store, as of `PatchStore`.
    """
    kinds = _kinds_on_cpu(weights)
    return _beside(lambda: _store_two_versions(kinds, dtype)) if kinds else None


def begin_numba(weights: Mapping[str, Tensor]) -> threading.Thread | None:
    """Have numba started in a thread, for a process that only takes such weights over: another one compiles for it."""
    return _beside(kernels_in_use) if _kinds_on_cpu(weights) else None


def _kinds_on_cpu(weights: Mapping[str, Tensor]) -> set[torch.dtype]:
    """The types of the weights on the CPU, if there are enough for compiled loops."""
    on_cpu = [weight for weight in weights.values() if weight.device.type == "cpu"]
    return {weight.dtype for weight in on_cpu} if sum(weight.numel() for weight in on_cpu) >= FEW else set()


def _beside(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work, name="oldlogits-warm-up", daemon=True)
    thread.start()
    return thread


def _store_two_versions(kinds: set[torch.dtype], dtype: torch.dtype | None) -> None:
    """Publish two versions of other weights, and go back to the first."""
    weights = {str(kind): torch.zeros(FEW, dtype=kind) for kind in kinds}
    store = PatchStore(dtype=dtype)
    store.publish(0, weights)
    for weight in weights.values():
        weight[::3] += 1
    store.publish(1, weights)
    with store.checkout(0):
        pass
