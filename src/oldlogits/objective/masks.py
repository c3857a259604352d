"""Which tokens stay active: a symmetric band around ``r_d = 1``, and the sign-aware clip of ``r_s``.

Bounds are compared in log space: ``math.log`` of the bound, rounded to the dtype of the log-ratio. Equality keeps,
so a log-ratio that equals ``log(1 + eps_high)`` in its own dtype is kept.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from oldlogits.core.errors import ConfigError


def band_mask(log_r_d: Float[Tensor, " token"], band: float) -> Bool[Tensor, " token"]:
    """Keep a token where ``1/c <= r_d <= c``, both bounds included: ``|log r_d| <= log c``, ``c = band``.

    `band` is above 1, or ``math.inf`` for no band; a finite band keeps neither NaN nor infinite values.

    Raises:
        ConfigError: `band` is not above 1.

    Example:
        band = 1.5 keeps r_d in [0.667, 1.5]: r_d = 1.5 is kept, r_d = 0.6 is not.
    """
    if not band > 1:
        raise ConfigError(
            "band must be above 1", got=str(band), allowed="a number > 1, or inf for no band", fix="set band = 1.5, for example"
        )
    return log_r_d.abs() <= math.log(band)


def finite_mask(
    log_r_d: Float[Tensor, " token"], log_r_s: Float[Tensor, " token"], advantages: Float[Tensor, " token"]
) -> Bool[Tensor, " token"]:
    """Where both log-ratios and the advantage are finite; a log-prob of NaN or -inf makes its ratio so."""
    return (log_r_d + log_r_s + advantages).abs() < math.inf  # a sum is finite only if each term is; NaN is not below inf


def kept_mask(log_r_d: Float[Tensor, " token"], loss_mask: Bool[Tensor, " token"], band: float) -> Bool[Tensor, " token"]:
    """Loss tokens whose ``r_d`` is finite and inside the band: what "token-mean-kept" counts.

    The clip is left out on purpose: it depends on THETA, and the denominator must be known before the first
    micro-batch's forward pass. (Where the proximal policy is an interpolation, ``r_d`` itself depends on THETA; its values
    must then be scored beforehand.)
    """
    return loss_mask & log_r_d.isfinite() & band_mask(log_r_d, band)


def clip_log_ratio(
    log_r_s: Float[Tensor, " token"],
    advantages: Float[Tensor, " token"],
    eps_low: float,
    eps_high: float,
    dual_clip: float | None,
) -> Float[Tensor, " token"]:
    """``log h``: the staleness ratio after the clip that its advantage calls for.

    ``A > 0: h = min(r_s, 1 + eps_high)``; ``A < 0: h = min(max(r_s, 1 - eps_low), d)``; ``A = 0: h = r_s``
    (PAPER, "The objective, spelled out"). ``eps_low >= 1`` means no lower bound, ``dual_clip = None`` no d.

    Raises:
        ConfigError: An eps is negative, or `dual_clip` is not above 1.

    Example:
        eps_low = .2, eps_high = .28, d = 3: r_s = 1.5 becomes 1.28 for A > 0 and stays for A < 0;
        r_s = .5 stays for A > 0 and becomes .8 for A < 0; r_s = 5 becomes 3 for A < 0.
    """
    _check_clip(eps_low, eps_high, dual_clip)
    log_low = math.log(1 - eps_low) if eps_low < 1 else -math.inf
    log_dual = math.inf if dual_clip is None else math.log(dual_clip)
    positive, negative = advantages > 0, advantages < 0
    unbounded = log_r_s.new_full((), math.inf)
    upper = torch.where(positive, math.log(1 + eps_high), torch.where(negative, log_dual, unbounded))
    lower = torch.where(negative, log_low, -unbounded)
    return log_r_s.clamp(lower, upper)


def truncate_log_ratio(log_r_s: Float[Tensor, " token"], truncation: float) -> Float[Tensor, " token"]:
    """``log min(r_s, c)``: the weight of truncated importance sampling, which caps a token's gradient and masks none.

    ``c = truncation`` is above 1, or ``math.inf`` for no bound. Where the ratio is taken over MU, it is the total ratio.

    Raises:
        ConfigError: `truncation` is not above 1.

    Example:
        truncation = 2: r_s = 5 weighs 2, r_s = 0.1 weighs 0.1.
    """
    if not truncation > 1:
        raise ConfigError(
            "truncation must be above 1", got=str(truncation), allowed="a number > 1, or inf for no bound", fix="set it to 2"
        )
    return log_r_s.clamp(max=math.log(truncation))


def _check_clip(eps_low: float, eps_high: float, dual_clip: float | None) -> None:
    if eps_low >= 0 and eps_high >= 0 and (dual_clip is None or dual_clip > 1):
        return
    raise ConfigError(
        "clip bounds out of range",
        got=f"eps_low = {eps_low}, eps_high = {eps_high}, dual_clip = {dual_clip}",
        allowed="eps_low >= 0, eps_high >= 0, dual_clip > 1 or none",
        fix="eps_low = 0.2, eps_high = 0.28, dual_clip = 3 are common",
    )
