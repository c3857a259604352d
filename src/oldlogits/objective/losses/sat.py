"""SAT: PPO's clip, which closes for the tokens whose ratio has moved furthest (arXiv 2607.18722)."""

from __future__ import annotations

import torch

from oldlogits.core.loss import LossInputs, LossTerms, Objective
from oldlogits.core.objective.options import SatOptions
from oldlogits.objective.frame import Frame
from oldlogits.objective.masks import clip_log_ratio


def sat(tokens: LossInputs, objective: Objective) -> LossTerms:
    """``S = A h`` with PPO's clip h, whose bound on the side that r_s has moved to is ``c eps``.

    With ``d = |log r_s|`` and q the quantile of d over the micro-batch, ``c = 1`` where ``d <= q`` and
    ``c = 1 / (1 + (d / q)^exponent)`` beyond, a Hill function; with q = 0 no bound moves. The paper takes d for a token's
    staleness, over theta/mu (row ``ppo_clip_train_infer``), where engine noise counts as staleness; over theta/old it is the
    staleness alone. The kernel is named, and not written out, in what we have read of the paper.

    Example:
        ``d = [.1, .1, .1, .3]``, A = 1, eps_high = .28: the 0.9 quantile is .24, c of the last token is
        ``1 / (1 + 1.25^2) = .39``, its bound 1.109 instead of 1.28, and its ``r_s = 1.35`` is clipped there.
    """
    frame, own = Frame.of(tokens, objective), objective.own(SatOptions)
    moved = frame.log_r_s.abs()
    closing = torch.ones_like(moved)
    if moved.numel():
        q = torch.where(frame.counted, moved, torch.nan).nanquantile(own.quantile)
        closing = torch.where((moved > q) & (q > 0), 1 / (1 + (moved / q) ** own.exponent), closing)
    low = objective.eps_low * torch.where(frame.log_r_s < 0, closing, 1.0)
    high = objective.eps_high * torch.where(frame.log_r_s > 0, closing, 1.0)
    log_h = clip_log_ratio(frame.log_r_s, frame.advantages, low, high, objective.dual_clip)
    values = frame.advantages * log_h.exp()
    return frame.terms(values, values, kept=log_h == frame.log_r_s)
