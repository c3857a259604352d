"""REINFORCE with the importance weight of a token, a sequence or a prefix (verl's bypass mode; arXiv 2512.23075)."""

from __future__ import annotations

import torch

from oldlogits.core.loss import LossInputs, LossTerms, Objective
from oldlogits.core.objective.options import ReinforceOptions
from oldlogits.objective.frame import Frame


def reinforce(tokens: LossInputs, objective: Objective) -> LossTerms:
    """``S = sg(w) A log theta``, ``w = min(r, high)`` with r the r_s of a level; 0 where r is not in mask_low .. mask_high.

    With the row ``ppo_clip_train_infer`` r is theta/mu: truncated importance sampling over tokens or sequences (TIS), or with
    the masks IcePop.

    Example:
        theta = .5 and r_s = 1.5 of both tokens of a sequence, A = 1, high = 2: ``w = min(2.25, 2) = 2``, the gradient is 2.
    """
    frame, own = Frame.of(tokens, objective), objective.own(ReinforceOptions)
    log_ratio = torch.zeros_like(frame.log_r_s) if own.level == "none" else frame.at_level(own.level)
    ratio = log_ratio.exp()
    kept = (ratio >= own.mask_low) & (ratio <= own.mask_high)
    slope = frame.advantages * ratio.clamp(max=own.high) * kept
    return frame.terms(slope * frame.log_theta, slope, kept=kept, log_ratio=log_ratio)
