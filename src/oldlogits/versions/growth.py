"""How far apart log-probs grow from one version to another: a power of their distance, or what was measured on tokens.

    V(h) = E (x(t) - x(t - h))^2        x(t): the log-prob of a token at version t, h versions

Derived in docs/ewma.md, which says what an average's error has to do with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

Growth = Callable[[Floats], Floats]
"""V: from distances h >= 0, in versions, to mean squared differences of log-probs, of the same shape; 0 at h = 0."""

DRIFT: Final = 2.0
"""Growth exponent of ``E[(x_(t+h) - x_t)^2] ~ h^p`` for a log-prob x that moves at constant speed."""
RANDOM_WALK: Final = 1.0
"""The same for independent steps."""


def power(exponent: float) -> Growth:
    """``V(h) = h^p``, in units of the mean squared change from one version to the next."""
    return lambda gaps: gaps**exponent


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredGrowth:
    """V as it was measured at some distances: called with distances, it gives V there.

    Between two measured distances V is linear, and from 0 to the first one too; beyond the last one, H, it is
    ``V(H) (h / H)^p``.

    Args:
        gaps: float64 [distance], ascending, above 0.
        values: float64 [distance], nats^2; they do not fall.
        exponent: The p beyond the last distance.
        noise: What two scores of the same version differ by, mean square, in nats^2; no part of `values`.
    """

    gaps: Floats
    values: Floats
    exponent: float
    noise: float

    def __call__(self, gaps: Floats) -> Floats:
        """V at these distances, float64 of the same shape."""
        inside = np.interp(gaps, np.append(0.0, self.gaps), np.append(0.0, self.values))
        beyond: Floats = np.where(
            gaps > self.gaps[-1], self.values[-1] * (np.maximum(gaps, self.gaps[-1]) / self.gaps[-1]) ** self.exponent, inside
        )
        return beyond


def measured_growth(counts: NDArray[np.int64], squares: Floats) -> MeasuredGrowth | None:
    """V from squared differences ``(log pi_t - log pi_(t - h))^2`` of tokens of lag h; None: they show no growth.

    The mean of each lag, less that of lag 0, which is the noise between two scores of one version. Where a mean falls from one
    lag to the next, both take their common mean, as least squares under the condition that V does not fall (pool adjacent
    violators). The exponent is `fitted_exponent` of these.

    Args:
        counts: int64 [lag]; tokens of lag 0, 1, ...
        squares: float64 [lag]; the sum over them, in nats^2.

    Example:
        Two tokens of lag 1 with a sum of 2, one of lag 2 with 4: V(1) = 1, V(2) = 4, p = 2, and V(3) = 4 * 1.5^2 = 9.
    """
    lags = np.flatnonzero(counts)
    if not len(lags) or lags[-1] == 0:
        return None
    values = _rising(squares[lags] / counts[lags], counts[lags])
    noise = float(values[0]) if lags[0] == 0 else 0.0
    gaps, values = lags[lags > 0].astype(np.float64), values[lags > 0] - noise
    if not values[-1] > 0 or not np.isfinite(values).all():
        return None
    moved = values > 0
    exponent = fitted_exponent(gaps[moved], values[moved], counts[lags[lags > 0]][moved])
    return MeasuredGrowth(gaps=gaps, values=values, exponent=exponent, noise=noise)


def fitted_exponent(gaps: NDArray[np.int64] | Floats, growth: Floats, counts: NDArray[np.int64]) -> float:
    """The slope of ``log V(h)`` over ``log h`` by least squares, in [1, 2]; each distance counts with its number of pairs.

    With fewer than two distances, or without growth at one of them, there is nothing to fit: `RANDOM_WALK`.
    """
    if len(gaps) < 2 or not (np.isfinite(growth) & (growth > 0)).all():
        return RANDOM_WALK
    slope, _ = np.polyfit(np.log(gaps), np.log(growth), 1, w=np.sqrt(counts))
    return float(np.clip(slope, RANDOM_WALK, DRIFT))


def _rising(values: Floats, weights: NDArray[np.int64]) -> Floats:
    """The values that do not fall and have the smallest weighted squared distance to the given ones."""
    blocks: list[tuple[float, int, int]] = []  # value, weight, number of values
    for value, weight in zip(values.tolist(), weights.tolist(), strict=True):
        block = (value, weight, 1)
        while blocks and blocks[-1][0] > block[0]:
            before = blocks.pop()
            total = before[1] + block[1]
            block = ((before[0] * before[1] + block[0] * block[1]) / total, total, before[2] + block[2])
        blocks.append(block)
    return np.repeat([value for value, _, _ in blocks], [num for _, _, num in blocks])
