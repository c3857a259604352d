"""Which tokens stay active: a symmetric band around ``r_d = 1``, and the sign-aware clip of ``r_s``.

Bounds are compared in log space: ``math.log`` of the bound, rounded to the dtype of the log-ratio. Equality keeps,
so a log-ratio that equals ``log(1 + eps_high)`` in its own dtype is kept.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from oldlogits.core.errors import ConfigError
from oldlogits.core.objective.shapes import Bool, Float, Int


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
    eps_low: float | Float[Tensor, " token"],
    eps_high: float | Float[Tensor, " token"],
    dual_clip: float | None,
) -> Float[Tensor, " token"]:
    """``log h``: the staleness ratio after the clip that its advantage calls for.

    ``A > 0: h = min(r_s, 1 + eps_high)``; ``A < 0: h = min(max(r_s, 1 - eps_low), d)``; ``A = 0: h = r_s``
    (PAPER, "The objective, spelled out"). ``eps_low >= 1`` means no lower bound, ``dual_clip = None`` no d. A token may have an
    eps of its own.

    Raises:
        ConfigError: An eps is negative, or `dual_clip` is not above 1.

    Example:
        eps_low = .2, eps_high = .28, d = 3: r_s = 1.5 becomes 1.28 for A > 0 and stays for A < 0;
        r_s = .5 stays for A > 0 and becomes .8 for A < 0; r_s = 5 becomes 3 for A < 0.
    """
    _check_clip(eps_low, eps_high, dual_clip)
    log_low, log_high = _log_above(-eps_low, log_r_s), _log_above(eps_high, log_r_s)
    log_dual = math.inf if dual_clip is None else math.log(dual_clip)
    positive, negative = advantages > 0, advantages < 0
    unbounded = log_r_s.new_full((), math.inf)
    upper = torch.where(positive, log_high, torch.where(negative, log_dual, unbounded))
    lower = torch.where(negative, log_low, -unbounded)
    return log_r_s.clamp(lower, upper)


def eps_at_lag(
    eps: float, staleness: Int[Tensor, " token"], rule: Literal["none", "inverse", "inverse-sqrt"]
) -> float | Float[Tensor, " token"]:
    """Give the clip's eps at each token's staleness s, float64: ``eps / (1 + s)``, or ``eps / sqrt(1 + s)``.

    "none" gives eps itself, for all tokens. A fresh token has eps in any case; the older a token, the less its ratio may move
    before it is clipped.

    Example:
        eps = 0.2 at staleness 0, 1, 3: "inverse" 0.2, 0.1, 0.05; "inverse-sqrt" 0.2, 0.141, 0.1.
    """
    if rule == "none":
        return eps
    age = 1 + staleness.clamp(min=0).double()
    return eps / (age if rule == "inverse" else age.sqrt())


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


def _log_above(eps: float | Tensor, like: Tensor) -> float | Tensor:
    """Give ``log(1 + eps)``, -inf where that has none; in the dtype of a log-ratio where each token has its own eps."""
    if isinstance(eps, Tensor):
        return torch.log1p(eps.clamp(min=-1)).to(like.dtype)
    return math.log(1 + eps) if eps > -1 else -math.inf


def _check_clip(eps_low: float | Tensor, eps_high: float | Tensor, dual_clip: float | None) -> None:
    in_range = all(isinstance(eps, Tensor) or eps >= 0 for eps in (eps_low, eps_high))
    if in_range and (dual_clip is None or dual_clip > 1):
        return
    raise ConfigError(
        "clip bounds out of range",
        got=f"eps_low = {eps_low}, eps_high = {eps_high}, dual_clip = {dual_clip}",
        allowed="eps_low >= 0, eps_high >= 0, dual_clip > 1 or none",
        fix="eps_low = 0.2, eps_high = 0.28, dual_clip = 3 are common",
    )
