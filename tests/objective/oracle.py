"""The objective of one token in plain float64 arithmetic, written from the paper's formulas: no tensors, no log space.

The table of variants is written out again here, so that a wrong row in the package shows.
"""

import math
from dataclasses import dataclass

ROWS = {  # name: (numerator and denominator of r_d, or None for 1; denominator of r_s)
    "ppo_clip": (None, "old"),
    "ppo_clip_train_infer": (None, "mu"),
    "decoupled_exact": (("old", "mu"), "old"),
    "decoupled_async": (("async", "mu"), "async"),
    "linear_prox": (None, "linear"),
    "loglinear_prox": (None, "loglinear"),
    "ppo_ewma": (None, "ewma"),
    "ppo_ewma_train_infer": (("ewma", "mu"), "ewma"),
    "linear_train_infer": (("linear", "mu"), "linear"),
    "loglinear_train_infer": (("loglinear", "mu"), "loglinear"),
    "aged_train_infer": (("aged", "mu"), "aged"),
    "rescore_train_infer": (("rescore", "mu"), "rescore"),
    "mis_balance": (None, "balance"),
}


@dataclass(frozen=True)
class Objective:
    """The knobs."""

    band: float = 1.5
    eps_low: float = 0.2
    eps_high: float = 0.28
    dual_clip: float | None = 3.0
    discrepancy: str = "weight_and_mask"
    truncation: float | None = None


@dataclass(frozen=True)
class Token:
    """What the objective says about one loss token; `gradient` is with respect to log theta."""

    r_d: float
    r_s: float
    band: bool
    clip: bool
    value: float
    gradient: float
    margin: float  # relative distance of a ratio to the nearest bound: below 1e-9 rounding decides

    @property
    def active(self) -> bool:
        return self.band and self.clip


def interpolate(mu: float, theta: float, weight_mu: float) -> dict[str, float]:
    """The two interpolated proximal policies, as probabilities."""
    return {
        "linear": weight_mu * mu + (1 - weight_mu) * theta,
        "loglinear": mu**weight_mu * theta ** (1 - weight_mu),
    }


def token(variant: str, prob: dict[str, float], advantage: float, knobs: Objective) -> Token:
    """`prob`: the probability of the sampled token under each policy."""
    discrepancy, proximal = ROWS[variant]
    r_d = 1.0 if discrepancy is None else prob[discrepancy[0]] / prob[discrepancy[1]]
    r_s = prob["theta"] / prob[proximal]
    high, low = 1 + knobs.eps_high, 1 - knobs.eps_low
    dual = math.inf if knobs.dual_clip is None else knobs.dual_clip

    band = 1 / knobs.band <= r_d <= knobs.band
    if advantage > 0:
        h, clip = min(r_s, high), not r_s > high
    elif advantage < 0:
        h, clip = min(max(r_s, low), dual), not (r_s < low or r_s > dual)
    else:
        h, clip = r_s, True
    slope = r_s if clip else 0.0
    bounds = [(r_d, knobs.band), (r_d, 1 / knobs.band), (r_s, high), (r_s, low), (r_s, dual)]
    if knobs.truncation is not None:
        clip, slope, cap = True, min(r_s, knobs.truncation), knobs.truncation
        h = r_s if r_s <= cap else cap + cap * (math.log(r_s) - math.log(cap))
        bounds = bounds[:2]
    weight = r_d if knobs.discrepancy == "weight_and_mask" else 1.0
    return Token(
        r_d=r_d,
        r_s=r_s,
        band=band,
        clip=clip,
        value=weight * advantage * h if band else 0.0,
        gradient=weight * advantage * slope if band else 0.0,
        margin=min((abs(ratio / bound - 1) for ratio, bound in bounds if 0 < bound < math.inf), default=math.inf),
    )
