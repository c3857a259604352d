"""A loss from outside: GSPO (arXiv 2507.18071), whose ratio belongs to a sequence and not to a token."""

import math

import torch
from torch import Tensor

from oldlogits.core.loss import LossInputs, LossTerms, Objective
from oldlogits.core.policies import THETA


def gspo(tokens: LossInputs, objective: Objective) -> LossTerms:
    """``min(s A, clip(s) A)`` with ``s`` the geometric mean of the ratios of a sequence's tokens."""
    log_ratio = tokens.logp[THETA] - tokens.logp[objective.variant.proximal]
    log_s = mean_by_sequence(log_ratio, tokens)[tokens.sequence_index]
    low, high = math.log(1 - objective.eps_low), math.log(1 + objective.eps_high)
    positive, negative = tokens.advantages > 0, tokens.advantages < 0
    clipped = (positive & (log_s > high)) | (negative & (log_s < low))
    bounded = torch.where(clipped, log_s.detach().clamp(low, high), log_s)
    return LossTerms(
        values=tokens.advantages * bounded.exp(),
        log_r_d=torch.zeros_like(log_s, requires_grad=False),
        log_r_s=log_s.detach(),
        band_mask=tokens.loss_mask,
        clip_mask=~clipped,
    )


def mean_by_sequence(values: Tensor, tokens: LossInputs) -> Tensor:
    """The mean over the tokens of each sequence; NaN for a sequence that is in another micro-batch."""
    zeros = values.new_zeros(tokens.num_sequences)
    total = zeros.index_add(0, tokens.sequence_index, values)
    return total / zeros.index_add(0, tokens.sequence_index, torch.ones_like(values))
