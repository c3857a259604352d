"""OPSM: negative sequences that have drifted from the sampler are masked (DeepSeek-V3.2, arXiv 2512.02556)."""

from __future__ import annotations

import torch

from oldlogits.core.loss import LossInputs, LossTerms, Objective
from oldlogits.core.objective.options import OpsmOptions
from oldlogits.objective.frame import Frame
from oldlogits.objective.masks import clip_log_ratio


def opsm(tokens: LossInputs, objective: Objective) -> LossTerms:
    """``S = M A h`` with PPO's clip h; M masks a sequence with A < 0 where ``mean log(mu / theta) > threshold`` (eq. 9).

    MU is the sampler's distribution whatever the variant, so that both engine noise and staleness count as drift.

    Example:
        A = -1, ``log mu - log theta = [.9, .3]``: the mean is .6, and at a threshold of .5 both tokens are masked.
    """
    frame, own = Frame.of(tokens, objective), objective.own(OpsmOptions)
    total, counted = frame.log_total()
    drifted = frame.mean_or_sum(-total, "geometric", counted) > own.threshold
    log_h = clip_log_ratio(frame.log_r_s, frame.advantages, objective.eps_low, objective.eps_high, objective.dual_clip)
    accepted = ~drifted | (frame.advantages >= 0)
    values = torch.where(accepted, frame.advantages * log_h.exp(), 0.0)
    return frame.terms(values, values, kept=accepted & (log_h == frame.log_r_s))
