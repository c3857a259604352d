"""DIS, the loss of SAO: a double-sided mask on theta over mu (arXiv 2607.07508)."""

from __future__ import annotations

from oldlogits.core.loss import LossInputs, LossTerms, Objective
from oldlogits.objective.frame import Frame


def dis(tokens: LossInputs, objective: Objective) -> LossTerms:
    """``S = sg(f(r_s)) A log theta``, ``f(x) = x`` for ``1 - eps_low < x < 1 + eps_high`` and 0 elsewhere (eq. 1-3).

    Unlike PPO's clip it masks whatever the advantage's sign, and its bounds are outside. With the paper's row
    ``ppo_clip_train_infer`` r_s is theta/mu. Its values: eps_low = 0.3, eps_high = 5 with tools, 0.8 and 3 for code.

    Example:
        theta = .5, r_s = 1.25, A = 2, eps_high = .28: ``S = 1.25 * 2 * log .5 = -1.733``; with r_s = 1.3 it is 0.
    """
    frame = Frame.of(tokens, objective)
    r_s = frame.r_s
    kept = (r_s > 1 - objective.eps_low) & (r_s < 1 + objective.eps_high)
    slope = frame.advantages * r_s * kept
    return frame.terms(slope * frame.log_theta, slope, kept=kept)
