"""Where a proximal policy decides otherwise than OLD: which tokens are active under one and not under the other.

Where r_d is a weight and r_s is clipped (`clip = "ppo"`), the proximal policy acts through the active set alone (PAPER,
"Identity"), so these are its whole effect on one update. Under a truncation they are not: the capped gradient of an active
token depends on the proximal policy too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from oldlogits.core.objective.shapes import Bool, Float, Int
from oldlogits.core.policies import MU, OLD, ONE, THETA, Variant


@dataclass(frozen=True, slots=True, kw_only=True)
class DecisionSums:
    """Sums over the loss tokens of each staleness, so that those of several batches add up. ``R = theta / mu``.

    Args:
        num_tokens: Loss tokens.
        num_nonzero: Loss tokens with A != 0.
        num_compared: Loss tokens whose proximal policy and OLD are both finite.
        logp_error: ``sum |log X - log OLD|`` over the compared tokens, nats.
        wrongly_kept: Tokens that are active under the proximal policy and not under OLD.
        wrongly_masked: Tokens that are active under OLD and not under the proximal policy.
        wrongly_kept_nonzero: Wrongly kept tokens with A != 0.
        wrongly_masked_nonzero: Wrongly masked tokens with A != 0.
        weight: ``sum |R A|`` over the tokens that are active under OLD.
        weight_wrongly_kept: ``sum |R A|`` over the wrongly kept tokens.
        weight_wrongly_masked: ``sum |R A|`` over the wrongly masked tokens.
    """

    num_tokens: Int[Tensor, " staleness"]
    num_nonzero: Int[Tensor, " staleness"]
    num_compared: Int[Tensor, " staleness"]
    logp_error: Float[Tensor, " staleness"]
    wrongly_kept: Int[Tensor, " staleness"]
    wrongly_masked: Int[Tensor, " staleness"]
    wrongly_kept_nonzero: Int[Tensor, " staleness"]
    wrongly_masked_nonzero: Int[Tensor, " staleness"]
    weight: Float[Tensor, " staleness"]
    weight_wrongly_kept: Float[Tensor, " staleness"]
    weight_wrongly_masked: Float[Tensor, " staleness"]


def exact_variant(variant: Variant) -> Variant:
    """Give the exact row of `variant`: OLD in place of its proximal policy, the mismatch corrected or not as there.

    Example:
        ``ppo_ewma_train_infer`` and ``ppo_clip_train_infer`` (r_d = MU/MU) for ``decoupled_exact``; ``ppo_ewma`` for
        ``ppo_clip``.
    """
    return Variant(r_d=OLD / MU if variant.corrects_mismatch else ONE, r_s=THETA / OLD)


@torch.no_grad()
def decision_sums(
    logp_proximal: Float[Tensor, " token"],
    logp_old: Float[Tensor, " token"],
    log_total: Float[Tensor, " token"],
    advantages: Float[Tensor, " token"],
    *,
    active_mask: Bool[Tensor, " token"],
    exact_active_mask: Bool[Tensor, " token"],
    loss_mask: Bool[Tensor, " token"],
    staleness: Int[Tensor, " token"],
    num_staleness: int,
) -> DecisionSums:
    """Compare the active sets of a proximal policy and of OLD, under the same THETA.

    Args:
        logp_proximal: Log-probs of the proximal policy X.
        logp_old: Log-probs of OLD.
        log_total: ``log R = log theta - log mu``, whatever the variant.
        advantages: ``A``.
        active_mask: `LossTerms.active_mask` with the proximal policy.
        exact_active_mask: `LossTerms.active_mask` of `exact_variant`.
        loss_mask: Sampled tokens.
        staleness: Trainer version minus behaviour version, in [0, num_staleness) where `loss_mask` holds.
        num_staleness: The length of the result.

    Example:
        Three tokens, R = 1, A = 2, -1, 0; active under X: 1, 0, 1, under OLD: 1, 1, 0: one wrongly masked of weight 1
        (and A != 0), one wrongly kept of weight 0, and 3 is the weight of the exact active set.
    """
    kept, masked = active_mask & ~exact_active_mask, exact_active_mask & ~active_mask
    nonzero = advantages != 0
    error = (logp_proximal - logp_old).double().abs()
    weight = log_total.double().exp() * advantages.abs()
    index = torch.where(loss_mask, staleness, num_staleness)

    def total(values: Tensor, mask: Tensor) -> Tensor:
        selected = torch.where(mask & values.isfinite(), values, 0)
        return selected.new_zeros(num_staleness + 1).index_add(0, index, selected)[:-1]

    def count(mask: Tensor) -> Tensor:
        return total(mask.long(), mask)

    return DecisionSums(
        num_tokens=count(loss_mask),
        num_nonzero=count(nonzero),
        num_compared=count(error < math.inf),
        logp_error=total(error, loss_mask),
        wrongly_kept=count(kept),
        wrongly_masked=count(masked),
        wrongly_kept_nonzero=count(kept & nonzero),
        wrongly_masked_nonzero=count(masked & nonzero),
        weight=total(weight, exact_active_mask),
        weight_wrongly_kept=total(weight, kept),
        weight_wrongly_masked=total(weight, masked),
    )
