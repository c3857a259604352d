"""CISPO: the weight is clipped, and no token is masked (arXiv 2506.13585)."""

from __future__ import annotations

from oldlogits.core.loss import LossInputs, LossTerms, Objective
from oldlogits.core.objective.options import CispoOptions
from oldlogits.objective.frame import Frame


def cispo(tokens: LossInputs, objective: Objective) -> LossTerms:
    """``S = sg(clip(r_s, low, high)) A log theta`` (eq. 4-5): every token has the gradient of a bounded weight.

    Example:
        theta = .5, r_s = 8, A = 2, high = 5: ``S = 5 * 2 * log .5 = -6.93``, and ``dS / dlog theta = 10``.
    """
    frame, own = Frame.of(tokens, objective), objective.own(CispoOptions)
    slope = frame.advantages * frame.r_s.clamp(own.low, own.high)
    return frame.terms(slope * frame.log_theta, slope)
