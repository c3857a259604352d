"""What a replay tells of each update, and in the end: figures, and how far they are from the record."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from oldlogits.train.step import UpdateResult

Columns = Mapping[str, NDArray[np.generic]]

COMPARED: Final = ("logp_proximal", "logp_theta", "log_r_d", "log_r_s", "band_mask", "clip_mask", "active_mask")
"""Columns of a run's token tables that a replay under the same recipe repeats."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What another recipe did with the batch of an update, beside the recorded one.

    Args:
        loss: Its loss.
        gradient_norm: The norm of its gradient before clipping, the mean of the optimizer steps.
        gradient_cosine: The cosine between both gradients, each the sum over the steps; NaN where one is 0.
        num_active: The tokens that it left active.
        num_gained: Those that the recorded recipe had masked.
        num_lost: Tokens that the recorded recipe had left active, and this one masked.
        num_band: Tokens whose band decided otherwise.
        num_clip: Tokens whose clip decided otherwise.
        weight_share: ``sum |R A|`` over gained and lost tokens, over that of the recorded active set; ``R = theta / mu``.
        logp_theta_mean_abs: The mean difference of THETA's log-probs, nats.
    """

    loss: float
    gradient_norm: float
    gradient_cosine: float
    num_active: int
    num_gained: int
    num_lost: int
    num_band: int
    num_clip: int
    weight_share: float
    logp_theta_mean_abs: float


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateFigures:
    """One update of a replay.

    Args:
        version: The version that it made.
        num_tokens: The tokens that it trained.
        loss: The loss under the recorded recipe; of a neutral table under the only one.
        gradient_norm: The norm of the gradient before clipping, the mean of the optimizer steps.
        num_active: The tokens that band and clip left active.
        num_unlike: Tokens of which some recorded value has other bits here.
        logp_unlike_max: The largest difference of a recorded THETA, nats; NaN: none was recorded.
        checkpoint_unlike: The largest difference from the weights of the run's checkpoint of this version; NaN: there is none.
        change: What the other recipe did; None: there is none.
    """

    version: int
    num_tokens: int
    loss: float
    gradient_norm: float
    num_active: int
    num_unlike: int
    logp_unlike_max: float
    checkpoint_unlike: float
    change: Change | None


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsApart:
    """How far the weights of two recipes are apart after the same batches.

    Args:
        distance: The L2 norm of their difference.
        moved: The L2 norm of what the recorded recipe moved them by.
        cosine: The cosine between what the two have moved them by.
    """

    distance: float
    moved: float
    cosine: float


def unlike(recorded: Columns, found: Columns) -> tuple[int, float]:
    """Count the tokens of which a recorded value has other bits, and give THETA's largest difference, NaN without a record."""
    differs = np.zeros(len(found["token_id"]), np.bool_)
    for name in COMPARED:
        if name in recorded:
            differs |= recorded[name].view(_bits(recorded[name])) != found[name].view(_bits(found[name]))
    if "logp_theta" not in recorded:
        return int(differs.sum()), math.nan
    return int(differs.sum()), largest(recorded["logp_theta"], found["logp_theta"])


def largest(one: NDArray[np.generic], other: NDArray[np.generic]) -> float:
    """Give the largest difference of two columns of log-probs where both are finite, nats."""
    errors = np.abs(np.asarray(one, np.float64) - np.asarray(other, np.float64))
    return float(np.max(errors, where=np.isfinite(errors), initial=0.0))


def change(recorded: UpdateResult, other: UpdateResult, gradients: tuple[Sequence[Tensor], Sequence[Tensor]]) -> Change:
    """Compare what two recipes made of one batch."""
    old, new = recorded.table, other.table
    was, now = np.asarray(old["active_mask"], np.bool_), np.asarray(new["active_mask"], np.bool_)
    log_total = np.asarray(old["logp_theta"], np.float64) - np.asarray(old["logp_mu"], np.float64)
    weight = np.nan_to_num(np.exp(log_total) * np.abs(np.asarray(old["advantage"], np.float64)))
    apart = np.abs(np.asarray(old["logp_theta"], np.float64) - np.asarray(new["logp_theta"], np.float64))
    return Change(
        loss=other.metrics["loss/value"],
        gradient_norm=other.metrics["grad/norm"],
        gradient_cosine=cosine(*gradients),
        num_active=int(now.sum()),
        num_gained=int((now & ~was).sum()),
        num_lost=int((was & ~now).sum()),
        num_band=int((old["band_mask"] != new["band_mask"]).sum()),
        num_clip=int((old["clip_mask"] != new["clip_mask"]).sum()),
        weight_share=float(weight[was != now].sum() / total) if (total := weight[was].sum()) else math.nan,
        logp_theta_mean_abs=float(np.mean(apart)),
    )


def weights_apart(start: Sequence[Tensor], recorded: Sequence[Tensor], other: Sequence[Tensor]) -> WeightsApart:
    """Compare the weights that two recipes have moved from one start."""
    moved = [_apart(a, b) for a, b in zip(recorded, start, strict=True)]
    other_moved = [_apart(a, b) for a, b in zip(other, start, strict=True)]
    distance = norm(_apart(a, b) for a, b in zip(recorded, other, strict=True))
    return WeightsApart(distance=distance, moved=norm(moved), cosine=cosine(moved, other_moved))


def cosine(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Give the cosine between two gradients, in float64; NaN where one is 0 or absent."""
    dot = sum(float((a.double() * b.double()).sum()) for a, b in zip(one, other, strict=True))
    size = norm(one) * norm(other)
    return dot / size if size else math.nan


def norm(tensors: Iterable[Tensor]) -> float:
    """Give the L2 norm of tensors together, in float64."""
    return math.sqrt(sum(float(one.double().square().sum()) for one in tensors))


@torch.no_grad()
def _apart(one: Tensor, other: Tensor) -> Tensor:
    return one.detach().double() - other.detach().double()


def _bits(column: NDArray[np.generic]) -> np.dtype[np.generic]:
    return np.dtype(f"u{column.itemsize}")
