"""From token values to one loss. The denominator is counted once, over the whole optimizer-step batch.

`token_weights` gives each token its share of the loss. Computed over the whole batch and sliced with it, the same
weights serve every micro-batch and every data-parallel rank: the losses of the parts *add up* to the full-batch loss.
"""

from __future__ import annotations

from typing import Literal, TypeVar

import torch
from torch import Tensor

from oldlogits.core.errors import ConfigError
from oldlogits.core.objective.shapes import Bool, Float, Int

Aggregation = Literal["token-mean", "token-mean-kept", "sequence-mean", "constant"]
"""The denominator: N valid tokens; N kept tokens; sequences, each over its own tokens; a constant."""

T = TypeVar("T")


def token_weights(
    loss_mask: Bool[Tensor, " token"],
    *,
    mode: Aggregation,
    sequence_index: Int[Tensor, " token"] | None = None,
    num_sequences: int | None = None,
    kept_mask: Bool[Tensor, " token"] | None = None,
    constant: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, " token"]:
    """Give each token's share ``w``, so that ``loss = -sum_i w_i S_i``; 0 outside `loss_mask`. An empty denominator gives 0.

    - "token-mean": ``1 / N``, N loss tokens.
    - "token-mean-kept": ``1 / N_kept`` on kept tokens, N_kept loss tokens that `kept_mask` keeps. Use
      `objective.kept_mask`: it is known before the forward pass of THETA, and so before the first micro-batch.
    - "sequence-mean": ``1 / (M N_s)`` in sequence s with N_s loss tokens, M of the `num_sequences` sequences having any.
    - "constant": ``1 / constant``, which is above 0.

    Raises:
        ConfigError: The mode is unknown, or what it needs is missing.

    Example:
        loss_mask [1, 1, 0, 1], sequences [0, 0, 1, 1]: "token-mean" [1/3, 1/3, 0, 1/3];
        "sequence-mean" [1/4, 1/4, 0, 1/2].
    """
    mask = loss_mask.to(dtype)
    if mode == "token-mean":
        return mask / loss_mask.sum().clamp(min=1)
    if mode == "token-mean-kept":
        kept = loss_mask & _needed(kept_mask, mode, "kept_mask")
        return kept.to(dtype) / kept.sum().clamp(min=1)
    if mode == "sequence-mean":
        index = _needed(sequence_index, mode, "sequence_index")
        lengths = torch.zeros(_needed(num_sequences, mode, "num_sequences"), dtype=torch.int64, device=loss_mask.device)
        lengths = lengths.index_add(0, index, loss_mask.to(torch.int64))
        return mask / (lengths[index] * (lengths > 0).sum()).clamp(min=1)
    if mode == "constant":
        divisor = _needed(constant, mode, "constant")
        if not divisor > 0:
            raise ConfigError(
                "the constant denominator must be positive", got=str(divisor), allowed="> 0", fix="set it above 0"
            )
        return mask / divisor
    raise ConfigError(
        "unknown denominator",
        got=repr(mode),
        allowed="token-mean, token-mean-kept, sequence-mean, constant",
        fix="choose one of these",
    )


def weighted_loss(values: Float[Tensor, " token"], weights: Float[Tensor, " token"]) -> Float[Tensor, ""]:
    """``-sum_i w_i S_i``: the loss of a micro-batch, its tokens' values with their slice of `token_weights`.

    Example:
        values [2, -1], weights [1/4, 1/4]: -0.25.
    """
    return -(values * weights).sum()


def _needed(value: T | None, mode: str, name: str) -> T:
    if value is None:
        raise ConfigError(f"denominator '{mode}' needs {name}", got="None", allowed=name, fix=f"pass {name}")
    return value
