"""Proposition 1 on tensors: which tokens the effective bounds of config/bounds.py keep, from the total ratio alone."""

from __future__ import annotations

import math

from jaxtyping import Bool, Float
from torch import Tensor

from oldlogits.config.bounds import EffectiveBounds


def active(
    total_log_ratio: Float[Tensor, " token"], advantages: Float[Tensor, " token"], bounds: EffectiveBounds
) -> Bool[Tensor, " token"]:
    """Which tokens are inside `bounds`: what `surrogate` calls active, from the total ratio alone.

    Bounds are compared in log space, in the dtype of the ratio. A = 0 meets the mask only; a token whose ratio or
    advantage is not finite is not active.

    Args:
        total_log_ratio: ``log R = log theta - log mu``, natural log.
        advantages: Their sign chooses the clip.
        bounds: From `effective_bounds`.

    Example:
        With the bounds of the example of `effective_bounds`, R = 1.05 is active and R = 1.2 is not, whatever the advantage.
    """

    def within(low: float, high: float) -> Tensor:
        return (total_log_ratio >= (math.log(low) if low > 0 else -math.inf)) & (total_log_ratio <= math.log(high))

    finite = total_log_ratio.isfinite() & advantages.isfinite()
    unmasked = within(bounds.mask_low, bounds.mask_high)
    unclipped_positive = (advantages <= 0) | within(0.0, bounds.positive_high)
    unclipped_negative = (advantages >= 0) | within(bounds.negative_low, bounds.negative_high)
    return finite & unmasked & unclipped_positive & unclipped_negative
