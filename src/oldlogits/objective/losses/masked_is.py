"""Masked importance sampling: the one frame of all variants of the paper's table, token by token."""

from __future__ import annotations

from oldlogits.core.loss import LossInputs, LossTerms, Objective
from oldlogits.objective.masks import eps_at_lag
from oldlogits.objective.ratios import split_ratio
from oldlogits.objective.surrogate import surrogate


def masked_is(tokens: LossInputs, objective: Objective) -> LossTerms:
    """``S = sg(r_d) * band * A * h`` per token (PAPER, "The objective, spelled out"): `split_ratio`, then `surrogate`."""
    return surrogate(
        split_ratio(objective.variant, tokens.logp),
        tokens.advantages,
        tokens.loss_mask,
        band=objective.band,
        eps_low=eps_at_lag(objective.eps_low, tokens.staleness, objective.clip_by_lag),
        eps_high=eps_at_lag(objective.eps_high, tokens.staleness, objective.clip_by_lag),
        dual_clip=objective.dual_clip,
        discrepancy=objective.mismatch_correction,
        truncation=objective.is_cap,
    )
