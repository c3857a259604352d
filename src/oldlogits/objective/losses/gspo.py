"""GSPO: the clip of a ratio that belongs to a sequence (arXiv 2507.18071)."""

from __future__ import annotations

import torch

from oldlogits.core.loss import LossInputs, LossTerms, Objective
from oldlogits.core.objective.options import LevelOptions
from oldlogits.objective.frame import Frame
from oldlogits.objective.masks import clip_log_ratio


def gspo(tokens: LossInputs, objective: Objective) -> LossTerms:
    """``S = min(s A, clip(s, 1 - eps_low, 1 + eps_high) A)`` with ``s = (prod_t r_s)^(1 / N)`` of the token's sequence.

    A token's gradient is ``A s grad log theta`` where the clip leaves s: the form per token of eq. 14-15, which for one
    advantage a sequence is that of the sequence. The paper averages over a sequence's tokens and then over sequences:
    ``objective.loss_aggregation = "sequence-mean"``. With ``options.level`` s is the product of the ratios instead, or the
    product of those up to the token (the prefix ratio of arXiv 2605.07331).

    Example:
        r_s [1.21, 1.0], A = 1: ``s = 1.1``; with eps_high = .05 both tokens have the value 1.05 and no gradient.
    """
    frame, level = Frame.of(tokens, objective), objective.own(LevelOptions).level
    log_s = frame.at_level(level)
    log_h = clip_log_ratio(log_s, frame.advantages, objective.eps_low, objective.eps_high, None)
    values = torch.where(frame.counted, frame.advantages * log_h.exp(), 0.0)
    return frame.terms(values, values, kept=log_h == log_s, log_ratio=log_s)
