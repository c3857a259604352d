"""The correction of the mismatch ratio r_d: the band, and what the section ``[correction]`` of a recipe adds to it.

::

    masked_is and the other losses --values without r_d--> corrected --> values with its weight, tokens that it masks

``r_d`` is detached, so the correction is the same function of the tokens for every loss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from oldlogits.core.errors import ConfigError
from oldlogits.core.loss import LossInputs, LossTerms, Objective
from oldlogits.core.objective.shapes import Bool, Float
from oldlogits.core.policies import MU, THETA
from oldlogits.objective.levels import at_level, sums_by_sequence
from oldlogits.objective.masks import band_mask
from oldlogits.objective.surrogate import LARGEST_LOG, with_slope


@dataclass(frozen=True, slots=True, kw_only=True)
class Corrected:
    """What the correction makes of each token.

    Args:
        weight: What multiplies the surrogate; 1 where r_d does not weigh.
        kept: False for a token that is masked because of r_d, its own or that of its sequence.
    """

    weight: Float[Tensor, " token"]
    kept: Bool[Tensor, " token"]


@torch.no_grad()
def correct(log_r_d: Float[Tensor, " token"], tokens: LossInputs, objective: Objective) -> Corrected:
    """Form weight and mask of r_d. Of a sequence's tokens those with a finite r_d count; the others are masked.

    Raises:
        ConfigError: The rejection looks at the total ratio, and THETA or MU is not among the log-probs.

    Example:
        r_d [1.2, 1.5] of one sequence, ``weight_level = "sequence"``, ``weight_high = 1.6``: both weigh
        ``min(1.8, 1.6) = 1.6``.
    """
    own, finite = objective.correction, log_r_d.isfinite()
    kept = finite & band_mask(log_r_d, objective.band) & _within(log_r_d, own.token_low, own.token_high)
    weight = torch.ones_like(log_r_d)
    if objective.mismatch_correction == "weight_and_mask" and not objective.variant.r_d.is_one:
        level = _at_level(log_r_d, own.weight_level, tokens, finite)
        weight = level.clamp(-LARGEST_LOG, LARGEST_LOG).exp().clamp(own.weight_low, own.weight_high)
    if own.rejects:
        kept = kept & _accepted(log_r_d if own.ratio == "mismatch" else _log_total(tokens), tokens, objective)
    return Corrected(weight=weight, kept=kept)


def corrected(
    terms: LossTerms,
    slope: Float[Tensor, " token"],
    tokens: LossInputs,
    objective: Objective,
    log_theta: Float[Tensor, " token"],
) -> LossTerms:
    """Apply the correction to terms without r_d: values and their derivative with respect to `log_theta`, both detached.

    A token that either mask leaves out has a gradient of 0; one that the correction masks, the value 0 as well.
    """
    found = correct(terms.log_r_d, tokens, objective)
    kept = tokens.loss_mask & terms.band_mask & found.kept
    values = torch.where(kept, terms.values * found.weight, 0.0)
    slope = torch.where(kept & terms.clip_mask, slope * found.weight, 0.0)
    return replace(terms, values=with_slope(log_theta, values, slope), band_mask=terms.band_mask & found.kept)


def mean_weight(log_r_d: Float[Tensor, " token"], tokens: LossInputs, objective: Objective) -> Float[Tensor, ""]:
    """Average the weights over the loss tokens of an optimizer step, or over its sequences where they share one; 1 for none.

    A token that token_low or token_high masks counts with a weight of 0, as IcePop's weights do; a rejected sequence as it is.
    """
    found = correct(log_r_d, tokens, objective)
    counted = tokens.loss_mask & log_r_d.isfinite()
    own = objective.correction
    weight = torch.where(_within(log_r_d, own.token_low, own.token_high), found.weight, 0.0)
    share = counted.to(weight.dtype)
    if own.weight_level in ("sequence", "geometric"):
        lengths = sums_by_sequence(share, tokens.sequence_index, tokens.num_sequences)
        share = share / lengths[tokens.sequence_index].clamp(min=1)
    mean = (torch.where(counted, weight, 0.0) * share).sum() / share.sum().clamp(min=1e-9)
    return torch.where(mean > 1e-8, mean, 1.0)


def _accepted(log_ratio: Tensor, tokens: LossInputs, objective: Objective) -> Tensor:
    """Whether each token's sequence is neither rejected nor vetoed."""
    own, counted = objective.correction, tokens.loss_mask & log_ratio.isfinite()
    outside = counted & ~_within(log_ratio, own.veto_low, own.veto_high)
    vetoed = sums_by_sequence(outside.to(log_ratio.dtype), tokens.sequence_index, tokens.num_sequences)[tokens.sequence_index]
    kept = vetoed == 0
    if own.reject == "k3":
        bounded = log_ratio.clamp(-LARGEST_LOG, LARGEST_LOG)
        return kept & (_at_level(bounded.expm1() - bounded, "geometric", tokens, counted) <= own.reject_high)
    if own.reject != "none":
        kept = kept & _within(_at_level(log_ratio, own.reject, tokens, counted), own.reject_low, own.reject_high)
    return kept


def _at_level(values: Tensor, level: object, tokens: LossInputs, counted: Tensor) -> Tensor:
    index, num = tokens.sequence_index, tokens.num_sequences
    return at_level(values, level, counted=counted, sequence_index=index, num_sequences=num)  # type: ignore[arg-type]


def _within(log_ratio: Tensor, low: float, high: float) -> Tensor:
    """Both bounds included, compared in log space; 0 and inf bound nothing."""
    return (log_ratio >= (math.log(low) if low > 0 else -math.inf)) & (log_ratio <= math.log(high))


def _log_total(tokens: LossInputs) -> Tensor:
    if missing := [policy.name for policy in (MU, THETA) if policy not in tokens.logp]:
        raise ConfigError(
            "the rejection looks at theta/mu",
            got=f"no log-probs of {' and '.join(missing)}",
            allowed="those of MU and THETA, or correction.ratio = 'mismatch'",
            fix="remove correction.ratio",
        )
    return tokens.logp[THETA].detach() - tokens.logp[MU].detach()
