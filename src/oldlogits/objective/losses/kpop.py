"""KPop: a trust region of the binary KL divergence in both directions (arXiv 2606.15079)."""

from __future__ import annotations

from oldlogits.core.loss import LossInputs, LossTerms, Objective
from oldlogits.core.objective.options import KPopOptions
from oldlogits.objective.frame import Frame
from oldlogits.objective.levels import binary_kl


def kpop(tokens: LossInputs, objective: Objective) -> LossTerms:
    """``S = M A r_s``; M keeps a token where ``KL(theta || X) <= threshold`` and ``KL(X || theta) <= threshold``.

    The divergences are over two outcomes, the sampled token or any other one; X is the variant's proximal policy, MU in the
    paper. Whatever the advantage's sign; a kept ratio has no bound.

    Example:
        theta = .5, X = .25: .144 and .131 nats, so that the token is masked at a threshold of .14 and kept at .15.
    """
    frame, own = Frame.of(tokens, objective), objective.own(KPopOptions)
    theta, proximal = frame.log_theta, frame.log_proximal
    kept = (binary_kl(theta, proximal) <= own.threshold) & (binary_kl(proximal, theta) <= own.threshold)
    values = frame.advantages * frame.r_s * kept
    return frame.terms(values, values, kept=kept)
