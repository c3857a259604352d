"""SAPO: a sigmoid in place of the clip (arXiv 2511.20347)."""

from __future__ import annotations

import torch

from oldlogits.core.loss import LossInputs, LossTerms, Objective
from oldlogits.core.objective.options import SapoOptions
from oldlogits.objective.frame import Frame


def sapo(tokens: LossInputs, objective: Objective) -> LossTerms:
    """``S = A f(r_s)``, ``f(x) = (4 / tau) sigmoid(tau (x - 1))``, tau of the advantage's sign.

    ``f'(1) = 1``, so that the gradient at ``r_s = 1`` is that of PPO; it fades on both sides and ends nowhere.

    Example:
        r_s = 1, A = 1, tau = 1: ``S = 4 * .5 = 2``, and ``dS / dlog theta = 4 * .5 * .5 * 1 = 1``.
    """
    frame, own = Frame.of(tokens, objective), objective.own(SapoOptions)
    tau = torch.where(frame.advantages > 0, own.tau_positive, own.tau_negative)
    gate = torch.sigmoid(tau * (frame.r_s - 1))
    values = frame.advantages * gate * 4 / tau
    return frame.terms(values, frame.advantages * 4 * gate * (1 - gate) * frame.r_s)
