"""Intervals and tests of a study: Student's t (scipy) over few pairs, Holm's adjustment, geometric means of ratios."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Final

from scipy.stats import t

from oldlogits.core.errors import ConfigError

LEVEL: Final = 0.95
"""Coverage of every interval of a study."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean with its 95% interval and the test that it is `null`.

    Args:
        mean: Of the values; of ratios, their geometric mean.
        low: Lower end; minus infinity (0 for ratios) where one value alone gives no interval.
        high: Upper end.
        p: Two-sided, of the hypothesis that the mean is `null`; 1 where there is no interval.
        n: Values.
        null: 0 for differences, 1 for ratios.
    """

    mean: float
    low: float
    high: float
    p: float
    n: int
    null: float = 0.0

    @property
    def sign(self) -> int:
        """1 or -1 where the interval lies above or below `null`, 0 where it holds it."""
        return (self.low > self.null) - (self.high < self.null)


def mean_interval(values: Sequence[float]) -> Estimate:
    """The mean with its 95% t interval, ``mean +- t(0.975, n - 1) stdev / sqrt(n)``, and the p of "the mean is 0".

    Equal values have an interval of width 0, and p is then 0, or 1 where they are 0; one value has no finite interval.

    Raises:
        ConfigError: No value, or one that is not finite.

    Example:
        >>> found = mean_interval([0.1, 0.2, 0.3])
        >>> round(found.low, 3), round(found.high, 3), round(found.p, 3)
        (-0.048, 0.448, 0.074)
    """
    if not values or not all(map(math.isfinite, values)):
        raise ConfigError("no mean", got=repr(list(values)), allowed="finite numbers, at least one", fix="leave the cell out")
    n, mean = len(values), fmean(values)
    if n == 1:
        return Estimate(mean=mean, low=-math.inf, high=math.inf, p=1.0, n=1)
    error = stdev(values) / math.sqrt(n)
    if error == 0:
        return Estimate(mean=mean, low=mean, high=mean, p=float(mean == 0), n=n)
    half = float(t.ppf((1 + LEVEL) / 2, n - 1)) * error
    return Estimate(mean=mean, low=mean - half, high=mean + half, p=float(2 * t.sf(abs(mean) / error, n - 1)), n=n)


def geometric_mean(ratios: Sequence[float]) -> Estimate:
    """The geometric mean of positive ratios; the t interval is formed on their logarithms, the null hypothesis is 1.

    Raises:
        ConfigError: No ratio, or one that is not above 0.

    Example:
        >>> round(geometric_mean([0.5, 2.0, 1.0]).mean, 6)
        1.0
    """
    if not all(ratio > 0 for ratio in ratios):
        raise ConfigError("no ratios", got=repr(list(ratios)), allowed="numbers above 0", fix="add to both counts")
    logs = mean_interval([math.log(ratio) for ratio in ratios])
    high = math.exp(logs.high) if logs.high < 700 else math.inf
    return Estimate(mean=math.exp(logs.mean), low=math.exp(logs.low), high=high, p=logs.p, n=logs.n, null=1.0)


def group_means(values: Iterable[tuple[Hashable, float]]) -> list[float]:
    """The mean of the values of each group, in the order in which groups come up: groups are independent, their values not.

    Example:
        >>> group_means([("seed 1", 1.0), ("seed 2", 5.0), ("seed 1", 3.0)])
        [2.0, 5.0]
    """
    groups: dict[Hashable, list[float]] = {}
    for group, value in values:
        groups.setdefault(group, []).append(value)
    return [fmean(own) for own in groups.values()]


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """Holm's adjusted p values, in the order given: ``max over j <= i of min(1, (m - j) p_(j))``, j from 0, Holm 1979.

    Example:
        >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
        [0.03, 0.06, 0.06]
    """
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return tuple(adjusted)
