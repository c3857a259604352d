"""The losses' own knobs: what the table ``objective.options`` of a recipe may hold, with ranges, loss by loss."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

from oldlogits.core.objective.correction import Level


@dataclass(frozen=True, slots=True, kw_only=True)
class LevelOptions:
    """The level of a loss over sequences."""

    level: Level = "geometric"
    """geometric: the paper's ratio, the geometric mean over a sequence. sequence: the product. prefix: up to each token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CispoOptions:
    """The bounds of the weight."""

    low: Annotated[float, Ge(0), Le(1)] = 0.0
    """The least weight r_s."""
    high: Annotated[float, Ge(1)] = 5.0
    """The largest weight r_s."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SapoOptions:
    """The temperatures of the gate."""

    tau_positive: Annotated[float, Gt(0), Le(1000)] = 1.0
    """For positive advantages."""
    tau_negative: Annotated[float, Gt(0), Le(1000)] = 1.05
    """For all others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DppoOptions:
    """The trust region, in total variation or in nats."""

    low: Annotated[float, Ge(0)] = 0.2
    """The largest divergence of a token that becomes less probable, A < 0."""
    high: Annotated[float, Ge(0)] = 0.2
    """The largest divergence of a token that becomes more probable, A > 0."""
    cap: Annotated[float, Ge(1)] = 20.0
    """The largest weight r_s of a gradient; inf: none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DppoKlOptions(DppoOptions):
    """The trust region in nats."""

    low: Annotated[float, Ge(0)] = 0.05
    """The largest divergence of a token that becomes less probable, A < 0."""
    high: Annotated[float, Ge(0)] = 0.05
    """The largest divergence of a token that becomes more probable, A > 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GmpoOptions:
    """The clip of each token's log r_s."""

    log_low: Annotated[float, Gt(0)] = 0.4
    """A < 0: log r_s is clipped below -log_low."""
    log_high: Annotated[float, Gt(0)] = 0.4
    """A > 0: log r_s is clipped above log_high."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReinforceOptions:
    """The weight of a gradient, a function of r_s at one level."""

    level: Level | Literal["none"] = "sequence"
    """Which r_s weighs: the token's own, the product or the geometric mean over its sequence, or the product up to it; none: a
    weight of 1."""
    high: Annotated[float, Ge(1)] = 2.0
    """A larger weight is lowered to this; inf: none is."""
    mask_low: Annotated[float, Ge(0), Lt(1)] = 0.0
    """A token with a smaller weight is masked."""
    mask_high: Annotated[float, Gt(1)] = math.inf
    """A token with a larger weight is masked; inf: none is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToprOptions:
    """The taper of negative sequences."""

    level: Literal["sequence", "geometric"] = "sequence"
    """sequence: the paper's ratio of whole sequences. geometric: its geometric mean."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KPopOptions:
    """The trust region."""

    threshold: Annotated[float, Gt(0)] = 0.1
    """The largest binary KL divergence of a token, in nats, in both directions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FlashOptions:
    """The trust region."""

    threshold: Annotated[float, Gt(0)] = 0.005
    """The largest mean binary KL divergence of a sequence, in nats."""


@dataclass(frozen=True, slots=True, kw_only=True)
class M2poOptions:
    """The trust region."""

    threshold: Annotated[float, Gt(0)] = 0.04
    """The second moment of log (X / mu) over the tokens that stay, X the proximal policy, is below this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpsmOptions:
    """The sequence mask."""

    threshold: Annotated[float, Gt(0)] = 0.5
    """A sequence with A < 0 is masked where the mean of log (mu / theta) is above this, in nats."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SatOptions:
    """Which tokens' clip closes, and how far."""

    quantile: Annotated[float, Gt(0), Lt(1)] = 0.9
    """Tokens whose |log r_s| is above this quantile of the micro-batch have a narrower clip."""
    exponent: Annotated[float, Gt(0), Le(100)] = 2.0
    """Of the Hill function by which it narrows."""
