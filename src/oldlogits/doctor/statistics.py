"""Estimates with intervals, for tokens that are not independent of each other: errors are clustered."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
Bools = NDArray[np.bool_]
Ints = NDArray[np.integer]

Z: Final = 5.0
"""Standard errors that a finding is away from what healthy data have: one false alarm in a million comparisons."""

FEWEST: Final = 40
"""Clusters below which there is no standard error."""

RESOLUTION: Final = 1e-5
"""Nats that two float32 forward passes of the same weights differ by: below it nothing is compared."""

_BINS: Final = 24


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean or a difference of means, and its clustered standard error; inf: there are too few clusters."""

    value: float
    error: float

    @property
    def low(self) -> float:
        """The lower end of its interval."""
        return self.value - Z * self.error

    @property
    def high(self) -> float:
        """The upper end."""
        return self.value + Z * self.error

    def exceeds(self, margin: float) -> bool:
        """Whether it is above 0 beyond chance, and above a margin below which nobody cares."""
        return self.low > 0 and self.value > margin

    def differs(self, margin: float) -> bool:
        """Whether it is other than 0 beyond chance, and by more than a margin."""
        return self.is_known and abs(self.value) > max(margin, Z * self.error)

    @property
    def is_known(self) -> bool:
        """Whether there is an interval."""
        return math.isfinite(self.error) and math.isfinite(self.value)

    def __str__(self) -> str:
        return f"{self.value:.4g} +- {self.error:.2g}"


def mean(values: Floats, clusters: Ints) -> Estimate:
    """The mean of values [token], and its standard error over clusters [token]."""
    if not len(values):
        return Estimate(math.nan, math.inf)
    values = values.astype(np.float64)
    average = float(values.mean())
    return Estimate(average, _error((values - average) / len(values), clusters))


def difference(values: Floats, chosen: Bools, clusters: Ints) -> Estimate:
    """The mean of the chosen values less that of the others, and its standard error over clusters."""
    num, others = int(chosen.sum()), int((~chosen).sum())
    if not num or not others:
        return Estimate(math.nan, math.inf)
    values = values.astype(np.float64)
    above, below = float(values[chosen].mean()), float(values[~chosen].mean())
    parts = np.where(chosen, (values - above) / num, (below - values) / others)
    if min(len(np.unique(clusters[chosen])), len(np.unique(clusters[~chosen]))) < FEWEST // 2:
        return Estimate(above - below, math.inf)
    return Estimate(above - below, _error(parts, clusters))


def _error(parts: Floats, clusters: Ints) -> float:
    """The standard error of a sum of parts [token] that has mean 0."""
    sums = np.bincount(clusters, weights=parts)[np.unique(clusters)]
    num = len(sums)
    return math.sqrt(float((sums**2).sum()) * num / (num - 1)) if num >= FEWEST else math.inf


def log_size(differences: Floats, logp: Floats) -> Floats:
    """How large differences of log-probs are for tokens as likely as these: ``log |d|`` less its mean in bins of `logp`.

    Numerics and drift move the log-prob of an unlikely token further than that of a likely one; without this a comparison of
    two sets of tokens would compare how certain they were.
    """
    sizes = np.log(np.abs(differences).astype(np.float64) + RESOLUTION)
    edges = np.quantile(logp, np.linspace(0, 1, _BINS + 1)[1:-1]) if len(logp) else np.zeros(1)
    bins = np.searchsorted(edges, logp)
    counts = np.maximum(np.bincount(bins, minlength=_BINS), 1)
    centred: Floats = sizes - (np.bincount(bins, weights=sizes, minlength=_BINS) / counts)[bins]
    return centred


def is_more(num: int, of: int, share: float) -> bool:
    """Whether `num` of `of` are more than a share of them beyond chance, however few they are.

    Chernoff's bound on the binomial's tail, ``exp(-of KL(num / of || share))``, is below that of a normal one at `Z`.
    """
    if num <= share * of:
        return False
    rest = (of - num) * math.log((of - num) / (of * (1 - share))) if num < of else 0.0
    return num * math.log(num / (of * share)) + rest > Z * Z / 2
