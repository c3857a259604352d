"""PPO's clip with a trust region that closes as a token gets stale: our own, after SAT (arXiv 2607.18722)."""

from __future__ import annotations

import math

import torch

from oldlogits.core.loss import LossInputs, LossTerms, Objective
from oldlogits.core.objective.options import LagClipOptions
from oldlogits.objective.frame import Frame


def lag_clip(tokens: LossInputs, objective: Objective) -> LossTerms:
    """PPO's clip with ``eps / (1 + (s / half_lag)^2)`` in place of both eps, s the token's staleness in versions.

    SAT contracts the bound that the update moves towards for the tokens with the largest ``|log(theta / mu)|`` of a batch, as a
    stand-in for their staleness, which it does not know. Here the staleness is known, and with ``decoupled_exact`` r_s holds
    nothing of the engine; so the kernel, Hill's with the exponent 2, takes the staleness itself. It is not SAT's formula.

    Example:
        eps_high = .28, half_lag = 4: the clip for A > 0 is 1.28 at staleness 0, 1.14 at 4, 1.056 at 8.
    """
    frame, own = Frame.of(tokens, objective), objective.own(LagClipOptions)
    kernel = 1 / (1 + (tokens.staleness.to(frame.log_r_s.dtype) / own.half_lag).square())
    high = torch.log1p(objective.eps_high * kernel)
    low = torch.log1p(-objective.eps_low * kernel)
    log_dual = math.inf if objective.dual_clip is None else math.log(objective.dual_clip)
    positive, negative = frame.advantages > 0, frame.advantages < 0
    log_h = torch.where(positive, torch.minimum(frame.log_r_s, high), frame.log_r_s)
    log_h = torch.where(negative, torch.maximum(log_h, low).clamp(max=log_dual), log_h)
    values = frame.advantages * log_h.exp()
    return frame.terms(values, values, kept=log_h == frame.log_r_s)
