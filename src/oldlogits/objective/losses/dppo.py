"""DPPO: the trust region is a divergence of probabilities, and not of their ratio (arXiv 2602.04879)."""

from __future__ import annotations

from torch import Tensor

from oldlogits.core.loss import LossInputs, LossTerms, Objective
from oldlogits.core.objective.options import DppoKlOptions, DppoOptions
from oldlogits.objective.frame import Frame
from oldlogits.objective.levels import binary_kl


def dppo_tv(tokens: LossInputs, objective: Objective) -> LossTerms:
    """``S = M A sg(min(r_s, cap)) log theta``; M masks ``theta - X > high`` for A > 0, ``X - theta > low`` for A < 0 (eq. 13).

    X is the variant's proximal policy, MU in the paper: |theta - X| is the total variation over two outcomes, the sampled token
    or any other one. The cap is that of its section 5.4.

    Example:
        theta = .5, X = .25, A = 1, high = .2: .25 above X, so the token is masked; with A = -1 it has the gradient -2.
    """
    frame, own = Frame.of(tokens, objective), objective.own(DppoOptions)
    moved = frame.log_theta.exp() - frame.log_proximal.exp()
    return _masked(frame, own, (moved <= own.high, moved >= -own.low))


def dppo_kl(tokens: LossInputs, objective: Objective) -> LossTerms:
    """`dppo_tv` with the binary KL divergence ``KL(X || theta)`` in place of the total variation (eq. 14), outwards as well.

    Example:
        theta = .5, X = .25, A = 1, high = .05: the divergence is ``.25 log .5 + .75 log 1.5 = .131``, the token is masked.
    """
    frame, own = Frame.of(tokens, objective), objective.own(DppoKlOptions)
    divergence = binary_kl(frame.log_proximal, frame.log_theta)
    rises, falls = frame.log_theta > frame.log_proximal, frame.log_theta < frame.log_proximal
    return _masked(frame, own, ((divergence <= own.high) | ~rises, (divergence <= own.low) | ~falls))


def _masked(frame: Frame, own: DppoOptions, within: tuple[Tensor, Tensor]) -> LossTerms:
    """Mask by the sign of the advantage: within the region for A > 0, and for A < 0; a token with A = 0 is kept."""
    kept = (within[0] | (frame.advantages <= 0)) & (within[1] | (frame.advantages >= 0))
    slope = frame.advantages * frame.r_s.clamp(max=own.cap) * kept
    return frame.terms(slope * frame.log_theta, slope, kept=kept)
