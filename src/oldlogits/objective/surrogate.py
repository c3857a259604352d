"""The surrogate objective of each token, the masks that shape it, and its gradient in closed form.

An active token's surrogate is ``A * exp(log r_s)`` up to detached factors, so its derivative with respect to
``log r_s`` is the value itself; every other token's is 0. Beyond a truncation it goes on as a straight line in
``log r_s``. The backward pass is one product.
"""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from oldlogits.core.errors import ConfigError
from oldlogits.core.loss import LossTerms
from oldlogits.core.objective.shapes import Bool, Float
from oldlogits.objective.masks import band_mask, clip_log_ratio, finite_mask, truncate_log_ratio
from oldlogits.objective.ratios import SplitRatio

LARGEST_LOG: float = 20.0
"""Weights are at most exp(20), so that no product with them overflows; verl and SkyRL bound the log of a ratio by it, too."""

Discrepancy = Literal["weight_and_mask", "mask"]
"""What ``r_d`` does beside masking: multiply the surrogate, or nothing."""


def surrogate(
    split: SplitRatio,
    advantages: Float[Tensor, " token"],
    loss_mask: Bool[Tensor, " token"],
    *,
    band: float,
    eps_low: float | Float[Tensor, " token"],
    eps_high: float | Float[Tensor, " token"],
    dual_clip: float | None,
    discrepancy: Discrepancy,
    truncation: float | None = None,
) -> LossTerms:
    """``S = sg(r_d) * band * A * h`` per token (PAPER, "The objective, spelled out").

    With ``discrepancy = "mask"`` the factor ``sg(r_d)`` is left out. Where ``r_d = X/MU`` is a weight and there is no
    truncation, an active token's gradient is ``A * (theta / mu) * grad log theta`` whatever the proximal policy X.

    With a `truncation` ``c`` (truncated importance sampling) no token is clipped, and ``h`` is the function of ``r_s`` whose
    gradient is ``min(r_s, c) * grad log theta``, whatever the advantage's sign:
    ``h = r_s`` up to ``c``, and ``h = c (1 + log(r_s / c))`` beyond, where the gradient ``A r_d c`` does depend on X.

    A token with a ratio or an advantage that is NaN or infinite is in neither mask, and has the value 0 as those outside of the
    band and context have. No token weighs more than exp(20), so that neither values nor gradients overflow.

    Args:
        split: The two log-ratios; the gradient reaches ``log_r_s``, once (no double backward).
        advantages: Finite; their sign chooses the clip.
        loss_mask: Sampled tokens.
        band: Above 1, or ``math.inf`` for no band.
        eps_low: ``r_s`` is clipped from below at ``1 - eps_low`` where A < 0; one for all tokens, or one a token.
        eps_high: ``r_s`` is clipped from above at ``1 + eps_high`` where A > 0; as `eps_low`.
        dual_clip: ``r_s`` is clipped from above at this where A < 0; None for no such bound.
        discrepancy: Whether ``r_d`` also multiplies.
        truncation: The largest weight ``r_s`` of a gradient, above 1, or ``math.inf``; takes the place of the three clip
            bounds. None: they hold.

    Raises:
        ConfigError: A bound is out of range, or `discrepancy` is unknown.

    Example:
        r_d = 1.1, r_s = 1.2, A = 2, band 1.5, eps 0.2 / 0.28: nothing is clipped, S = 1.1 * 2 * 1.2 = 2.64, and
        dS / dlog theta = 2.64. With r_s = 1.4 the clip holds: S = 1.1 * 2 * 1.28 = 2.816, gradient 0. With truncation = 1.3
        instead, r_s = 1.4 has the gradient 1.1 * 2 * 1.3 = 2.86, and S = 2.86 * (1 + log(1.4 / 1.3)) = 3.072.
    """
    if discrepancy not in ("weight_and_mask", "mask"):
        raise ConfigError(
            "unknown discrepancy", got=repr(discrepancy), allowed="'weight_and_mask', 'mask'", fix="choose one of these"
        )
    log_r_d, log_r_s = split.log_r_d.detach(), split.log_r_s.detach()
    finite = finite_mask(log_r_d, log_r_s, advantages)
    log_h = clip_log_ratio(log_r_s, advantages, eps_low, eps_high, dual_clip)
    in_band = finite & band_mask(log_r_d, band)
    unclipped = finite & (log_h == log_r_s)
    if truncation is not None:
        log_h, unclipped = truncate_log_ratio(log_r_s, truncation), finite
    kept = loss_mask & in_band
    log_weight = log_h + log_r_d if discrepancy == "weight_and_mask" else log_h
    counted = kept & (advantages != 0)  # A = 0 gives exactly 0, however large the ratio
    weight = torch.where(counted, log_weight, 0.0).clamp(max=LARGEST_LOG).exp()  # masked before exp: no inf * 0
    values = torch.where(counted, advantages * weight, 0.0)
    slope = torch.where(kept & unclipped, values, 0.0)
    if truncation is not None:
        values = values * (1 + torch.where(counted, log_r_s - log_h, 0.0))
    return LossTerms(
        values=with_slope(split.log_r_s, values, slope),
        log_r_d=log_r_d,
        log_r_s=log_r_s,
        band_mask=in_band,
        clip_mask=unclipped,
    )


def with_slope(log_r_s: Float[Tensor, " token"], values: Float[Tensor, " token"], slope: Float[Tensor, " token"]) -> Tensor:
    """Give `values`, detached, as a function of `log_r_s` whose derivative is `slope`, whatever the two numbers are.

    Example:
        values 2, slope 3: the result is 2, and its gradient with respect to log_r_s is 3.
    """
    return cast(Tensor, _WithSlope.apply(log_r_s, values.detach(), slope.detach()))  # type: ignore[no-untyped-call]


class _WithSlope(torch.autograd.Function):
    """`values` as a function of ``log_r_s``, whose derivative is `slope`."""

    @staticmethod
    def forward(ctx: FunctionCtx, log_r_s: Tensor, values: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_values: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return grad_values * slope, None, None
