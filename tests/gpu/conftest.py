"""The device that is held against the CPU: a GPU where torch finds one, else the CPU itself, so that no test rots."""

from __future__ import annotations

import os

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    """OLDLOGITS_DEVICE names another: `make gpu DEVICE=cpu` does."""
    name = os.environ.get("OLDLOGITS_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    assert name == "cpu" or torch.cuda.is_available(), f"torch {torch.__version__} finds no GPU"
    if name != "cpu":
        torch.set_float32_matmul_precision("highest")
    return torch.device(name)
