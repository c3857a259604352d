"""Masked importance sampling: the one frame of all variants of the paper's table, token by token."""

from __future__ import annotations

import math

from oldlogits.core.loss import LossInputs, LossTerms, Objective
from oldlogits.core.objective.correction import BAND_ALONE
from oldlogits.objective.correct import corrected
from oldlogits.objective.masks import eps_at_lag
from oldlogits.objective.ratios import SplitRatio, split_ratio
from oldlogits.objective.surrogate import Discrepancy, surrogate


def masked_is(tokens: LossInputs, objective: Objective) -> LossTerms:
    """``S = sg(r_d) * band * A * h`` per token (PAPER, "The objective, spelled out"): `split_ratio`, then `surrogate`.

    What the recipe's ``[correction]`` adds to the band is applied to the same surrogate without r_d.
    """
    split = split_ratio(objective.variant, tokens.logp)
    if objective.correction == BAND_ALONE:
        return _surrogate(split, tokens, objective, band=objective.band, discrepancy=objective.mismatch_correction)
    terms = _surrogate(split, tokens, objective, band=math.inf, discrepancy="mask")
    cap = math.inf if objective.is_cap is None else objective.is_cap
    slope = terms.values.detach()
    if objective.is_cap is not None:  # beyond the cap the surrogate is A c (1 + log(r_s / c)), and its derivative A c
        slope = slope / (1 + (terms.log_r_s - math.log(cap)).clamp(min=0))
    return corrected(terms, slope, tokens, objective, split.log_r_s)


def _surrogate(
    split: SplitRatio, tokens: LossInputs, objective: Objective, *, band: float, discrepancy: Discrepancy
) -> LossTerms:
    return surrogate(
        split,
        tokens.advantages,
        tokens.loss_mask,
        band=band,
        eps_low=eps_at_lag(objective.eps_low, tokens.staleness, objective.clip_by_lag),
        eps_high=eps_at_lag(objective.eps_high, tokens.staleness, objective.clip_by_lag),
        dual_clip=objective.dual_clip,
        discrepancy=discrepancy,
        truncation=objective.is_cap,
    )
