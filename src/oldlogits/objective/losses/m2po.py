"""M2PO: the tokens with the largest ratios are masked until their second moment is small (arXiv 2510.01161)."""

from __future__ import annotations

import torch
from torch import Tensor

from oldlogits.core.errors import ConfigError
from oldlogits.core.loss import LossInputs, LossTerms, Objective
from oldlogits.core.objective.options import M2poOptions
from oldlogits.core.policies import MU
from oldlogits.objective.frame import Frame


def m2po(tokens: LossInputs, objective: Objective) -> LossTerms:
    """``S = M A r_s`` without a clip; M is `small_second_moment` of the whole optimizer step.

    Raises:
        ConfigError: The mask of the step was not passed.
    """
    if tokens.step_mask is None:
        raise ConfigError(
            "m2po compares the tokens of a whole optimizer step",
            got="no step_mask",
            allowed="small_second_moment of all tokens of the step",
            fix="form it before the first micro-batch, and pass each its part",
        )
    frame = Frame.of(tokens, objective)
    values = frame.advantages * frame.r_s * tokens.step_mask
    return frame.terms(values, values, kept=tokens.step_mask)


@torch.no_grad()
def small_second_moment(tokens: LossInputs, objective: Objective) -> Tensor:
    """Keep all loss tokens but those with the largest ``m = log(X / mu)^2``, until the mean of m over the rest is small.

    X is the variant's proximal policy, and "small" is below ``options.threshold``; where no rest is, the least m alone stays.
    The paper's ratio is that of THETA at the beginning of the step, which is X in ``decoupled_async``: so the mask is known
    before the first micro-batch, and is the same for each. A token whose m is not finite is masked and does not count.

    Example:
        ``m = [.09, .01, .05]``, threshold .04: the mean is .05; without .09 it is .03, so the last two stay.
    """
    log_ratio = tokens.logp[objective.variant.proximal] - tokens.logp[MU]
    counted = tokens.loss_mask & log_ratio.isfinite()
    moment = torch.where(counted, log_ratio.double().square(), torch.inf)
    order = moment.argsort(stable=True)
    ordered = moment[order]
    means = ordered.cumsum(0) / torch.arange(1, len(order) + 1, device=order.device)
    stay = (means < objective.own(M2poOptions).threshold).sum().clamp(min=1)  # the mean of the smallest n rises with n
    kept = torch.empty_like(counted).index_put((order,), torch.arange(len(order), device=order.device) < stay)
    return kept & counted
