"""Proposition 1: what the band and the clip mean where the proximal policy interpolates MU and THETA.

Both factors are then non-decreasing functions of the total ratio ``R = theta / mu`` alone (``a = weight_mu``), so every
bound on a factor is a bound on R: one clip, re-parameterised, and nothing of OLD. Proofs: docs/bounds.md.

==========  ==================  =======================
kind        r_d = X / mu        r_s = theta / X
==========  ==================  =======================
linear      ``a + (1 - a) R``   ``R / (a + (1 - a) R)``
loglinear   ``R^(1 - a)``       ``R^a``
==========  ==================  =======================
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Final, Literal

Interpolation = Literal["linear", "loglinear"]
"""How the proximal policy X is formed from MU and THETA: as a weighted mean of probabilities, or of log-probs."""

_LOG_MAX: Final = math.log(sys.float_info.max)


@dataclass(frozen=True, slots=True, kw_only=True)
class EffectiveBounds:
    """The bounds on R of a token: it is active inside the mask and inside the clip of its advantage's sign; equality keeps.

    A lower bound that never binds is 0, an upper one ``math.inf``. The mask comes from the band, ``positive_high`` from
    ``1 + eps_high`` (A > 0), ``negative_low`` from ``1 - eps_low`` and ``negative_high`` from the dual clip (A < 0). All
    enclose 1: no band and no clip makes R = 1 inactive.
    """

    mask_low: float
    mask_high: float
    positive_high: float
    negative_low: float
    negative_high: float


def effective_bounds(
    kind: Interpolation, *, weight_mu: float, band: float, eps_low: float, eps_high: float, dual_clip: float
) -> EffectiveBounds:
    """The bounds on R of ``linear_train_infer`` or ``loglinear_train_infer``; with ``band = math.inf`` of the ``_prox`` rows.

    Values are in the ranges of the recipe (config/schema.py).

    Args:
        kind: How the proximal policy is formed.
        weight_mu: The weight on mu, in [0, 1]. Where it depends on a token's version, so do the bounds.
        band: ``1/c <= r_d <= c``; the rows with ``r_d = 1`` have none: ``math.inf``.
        eps_low: ``r_s >= 1 - eps_low`` where A < 0; at 1 or more there is no lower bound.
        eps_high: ``r_s <= 1 + eps_high`` where A > 0.
        dual_clip: ``r_s <= d`` where A < 0; ``math.inf`` for no such bound.

    Example:
        linear, weight_mu = .5, band = 1.05, eps .2 / .28, d = 3: the mask is .905 <= R <= 1.1; A > 0 is clipped above
        ``1.28 * .5 / (1.28 * .5 - .28) = 1.78`` and A < 0 below ``.8 * .5 / (.8 * .5 + .2) = .667``; d never binds,
        since ``r_s < 1 / (1 - .5) = 2``.
    """
    return EffectiveBounds(
        mask_low=_where_r_d_is(1 / band, kind, weight_mu, never=0.0),
        mask_high=_where_r_d_is(band, kind, weight_mu, never=math.inf),
        positive_high=_where_r_s_is(1 + eps_high, kind, weight_mu, never=math.inf),
        negative_low=_where_r_s_is(1 - eps_low, kind, weight_mu, never=0.0),
        negative_high=_where_r_s_is(dual_clip, kind, weight_mu, never=math.inf),
    )


def supremum_r_s(kind: Interpolation, *, weight_mu: float) -> float:
    """What ``r_s`` stays below whatever R is: linear ``1 / (1 - a)``, log-linear ``inf``; 1, which it is, with ``a = 0``.

    Example:
        >>> [supremum_r_s("linear", weight_mu=a) for a in (0.0, 0.5, 1.0)], supremum_r_s("loglinear", weight_mu=0.5)
        ([1.0, 2.0, inf], inf)
    """
    if weight_mu == 0:
        return 1.0
    return 1 / (1 - weight_mu) if kind == "linear" and weight_mu < 1 else math.inf


def a3po_weight(staleness: int) -> float:
    """A-3PO's weight on mu of a token of that staleness, >= 0: ``1 / s``, and 1 at staleness 0; objective/proximal.py.

    Example:
        >>> [a3po_weight(staleness) for staleness in (0, 1, 2, 4)]
        [1.0, 1.0, 0.5, 0.25]
    """
    return 1 / max(staleness, 1)


def _where_r_d_is(value: float, kind: Interpolation, weight_mu: float, *, never: float) -> float:
    """The R at which r_d reaches `value`, or `never`."""
    if weight_mu == 1:  # r_d is identically 1
        return never
    if kind == "loglinear":
        return _root(value, 1 - weight_mu)
    return max((value - weight_mu) / (1 - weight_mu), 0.0)  # r_d > a, so a lower bound of a or less never binds


def _where_r_s_is(value: float, kind: Interpolation, weight_mu: float, *, never: float) -> float:
    """The R at which r_s reaches `value`, or `never`."""
    if weight_mu == 0 or value <= 0 or value == math.inf:  # r_s is identically 1, positive, finite
        return never
    if kind == "loglinear":
        return _root(value, weight_mu)
    numerator = value * weight_mu
    denominator = numerator - (value - 1)
    return numerator / denominator if denominator > 0 else never  # r_s < 1 / (1 - a)


def _root(value: float, power: float) -> float:
    """``value^(1 / power)``; beyond the range of float64, 0 or inf."""
    exponent = math.log(value) / power if value > 0 else -math.inf
    return math.exp(exponent) if exponent < _LOG_MAX else math.inf
