"""GMPO: the geometric mean of clipped ratios (arXiv 2507.20673)."""

from __future__ import annotations

import torch

from oldlogits.core.loss import LossInputs, LossTerms, Objective
from oldlogits.core.objective.options import GmpoOptions
from oldlogits.objective.frame import Frame


def gmpo(tokens: LossInputs, objective: Objective) -> LossTerms:
    """``S = A (prod_t r'_t)^(1 / N)``: ``log r' = min(log r_s, log_high)`` for A > 0 and ``max(log r_s, -log_low)`` for A < 0.

    Every token of a sequence has the sequence's value, and a gradient of its own where its ratio is not clipped:
    ``S grad log theta``, which sums up to that of the sequence. The paper averages over sequences: "sequence-mean".

    Example:
        log r_s [.8, .0], A = 1, log_high = .4: clipped to [.4, .0], both have the value ``exp(.2) = 1.22``, and only the
        second has a gradient.
    """
    frame, own = Frame.of(tokens, objective), objective.own(GmpoOptions)
    positive, negative = frame.advantages > 0, frame.advantages < 0
    clipped = torch.where(positive, frame.log_r_s.clamp(max=own.log_high), frame.log_r_s)
    clipped = torch.where(negative, clipped.clamp(min=-own.log_low), clipped)
    mean = frame.mean_or_sum(clipped, "geometric")
    values = torch.where(frame.counted, frame.advantages * mean.exp(), 0.0)
    return frame.terms(values, values, kept=clipped == frame.log_r_s)
