"""The products of experts: groups of rows, each with a matrix of its own."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


def grouped_mm(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Multiply ``rows[ends[e - 1] : ends[e]]`` by ``weights[e]``, for all e."""
    return F.grouped_mm(rows, weights, offs=ends) if rows.device.type == "cpu" else _by_group(rows, weights, ends)


def _by_group(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """The same, group by group: torch's kernel for GPUs takes bf16 alone. Waits for the device."""
    groups = rows.tensor_split(ends[:-1].tolist())
    return torch.cat([group @ weight for group, weight in zip(groups, weights, strict=True)])
