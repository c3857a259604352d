"""How fast the weight average forgets: beta from the window, from the measured lags, or from both sources of error.

Derived in docs/ewma.md; `oldlogits.versions.growth` says how far log-probs grow apart.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

from oldlogits.versions.growth import Floats, Growth, fitted_exponent, power

_AGES_PER_VERSION: Final = 8


def window_beta(window: int) -> float:
    """``W / (W + 2)``: age W / 2, the middle of lags that are evenly spread over 0..W (PAPER, "Revised PPO-EWMA").

    Example:
        W = 8: beta = .8, age .8 / .2 = 4.
    """
    return window / (window + 2)


def mean_lag_beta(lag_counts: NDArray[np.int64]) -> float:
    """``m / (1 + m)``: age m, the token-weighted mean lag; 0 without tokens. `lag_counts`: int64 [lag], tokens of lag 0, 1, ...

    Example:
        Three tokens of lag 0 and one of lag 4: m = 1, beta = .5.
    """
    mean_lag = float(lag_counts @ np.arange(len(lag_counts))) / max(int(lag_counts.sum()), 1)
    return mean_lag / (1 + mean_lag)


def growth_exponent(logps: Floats, max_gap: int) -> float:
    """The p of ``E[(x_(t+h) - x_t)^2] ~ h^p``, fitted to the log-probs of fixed tokens; in [1, 2].

    The slope of ``log V(h)`` over ``log h`` by least squares, where ``V(h)`` is the mean over tokens and over pairs of
    versions h apart, and a gap counts with its number of pairs.

    Args:
        logps: float64 [version, token], successive versions. With fewer than three of them, or without any change, there
            is nothing to fit: `RANDOM_WALK`, which asks for the smaller ages.
        max_gap: The largest h, >= 2.
    """
    gaps = np.arange(1, min(len(logps), max_gap + 1))
    growth = np.array([np.mean((logps[gap:] - logps[:-gap]) ** 2) for gap in gaps])
    return fitted_exponent(gaps, growth, len(logps) - gaps)


def average_errors(beta: float, num_lags: int, growth: float | Growth) -> Floats:
    """Root mean square error of the average's log-prob as that of ``l`` versions ago, for l = 0 .. num_lags - 1: float64 [lag].

    Where log-probs grow apart as ``E[(x_(t+h) - x_t)^2] = V(h)``, the average over versions with the weights
    ``w_j = (1 - beta) beta^j`` of age j misses x(t - l) by::

        E_l = sum_j w_j V(|j - l|) - 1/2 sum_j sum_k w_j w_k V(|j - k|)

    `beta` is in [0, 1). `growth` is V; a number in (0, 2] stands for ``V(h) = h^p``, and the unit is then the root mean square
    change from one version to the next. p = 2 (drift): ``(l - age)^2``. p = 1 (random walk):
    ``beta^2 / (1 - beta^2) - 2 beta (1 - beta^l) / (1 - beta) + l``.
    """
    grown = power(growth) if isinstance(growth, (int, float)) else growth
    lags = np.arange(num_lags, dtype=np.float64)
    if beta == 0:
        live: Floats = np.sqrt(grown(lags))
        return live
    horizon = math.ceil(math.log(1e-18) / math.log(beta)) + 1
    ages = np.arange(horizon, dtype=np.float64)
    weights = (1 - beta) * beta**ages
    apart = 2 * (1 - beta) / (1 + beta) * beta**ages  # share of the pairs of versions that are j > 0 apart
    return _errors(weights, apart, lags, grown)


def weighted_errors(weights: Floats, num_lags: int, growth: Growth) -> Floats:
    """The same of an average with any weights: float64 [age], newest version first, whose sum is 1.

    Example:
        Random walk, and half the weight on each of the two newest versions: ``E_0 = 1/2 - 1/4``, so sqrt(.25) = .5 at lag 0
        and at lag 1, and sqrt(1.25) at lag 2.
    """
    pairs = np.correlate(weights, weights, "full")[len(weights) - 1 :]
    pairs[1:] *= 2
    return _errors(weights, pairs, np.arange(num_lags, dtype=np.float64), growth)


def _errors(weights: Floats, apart: Floats, lags: Floats, growth: Growth) -> Floats:
    """``sqrt(E_l)``, from the weight of each age and the share of the pairs of versions that are each gap apart."""
    ages = np.arange(len(weights), dtype=np.float64)
    squared = growth(np.abs(ages - lags[:, None])) @ weights - apart[1:] @ growth(ages[1:]) / 2
    errors: Floats = np.sqrt(np.maximum(squared, 0))
    return errors


def best_beta(lag_counts: NDArray[np.int64], growth: float | Growth) -> float:
    """The beta of the smallest expected |error| over the measured lags: ``min sum_l n_l sqrt(E_l)``, ages 0 .. W.

    `lag_counts`: int64 [lag], tokens of lag 0 .. W; without tokens 0. `growth`: see `average_errors`.

    Example:
        Drift, and one token each of lag 0, 1, 5: age 1, the median lag, so beta = .5.
    """
    num_lags = len(lag_counts)
    ages = np.linspace(0, num_lags - 1, _AGES_PER_VERSION * (num_lags - 1) + 1)
    betas = ages / (1 + ages)
    costs = [float(lag_counts @ average_errors(beta, num_lags, growth)) for beta in betas]
    return float(betas[int(np.argmin(costs))])
