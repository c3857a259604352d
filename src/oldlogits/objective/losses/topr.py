"""TOPR: negative sequences fade as they become improbable (arXiv 2503.14286)."""

from __future__ import annotations

import torch

from oldlogits.core.loss import LossInputs, LossTerms, Objective
from oldlogits.core.objective.options import ToprOptions
from oldlogits.objective.frame import Frame


def topr(tokens: LossInputs, objective: Objective) -> LossTerms:
    """``S = A log theta`` for A >= 0, and ``sg(min(s, 1)) A log theta`` for A < 0, with ``s = prod_t r_s`` of the sequence.

    Example:
        A = -1 and two tokens with r_s = .5: both have the gradient ``-.25``; with A = 1 it is 1.
    """
    frame, own = Frame.of(tokens, objective), objective.own(ToprOptions)
    taper = frame.at_level(own.level).clamp(max=0).exp()
    slope = frame.advantages * torch.where(frame.advantages < 0, taper, 1.0)
    return frame.terms(slope * frame.log_theta, slope)
