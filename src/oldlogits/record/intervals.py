"""Intervals of success rates and of what a run gained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev
from typing import Final

from oldlogits.record.events import Evaluated
from oldlogits.record.jsonl import RecordError

Z_95: Final = NormalDist().inv_cdf(0.975)
"""Half the width of a 95% normal interval, in standard errors: 1.95996."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A mean over episodes with its 95% interval."""

    mean: float
    low: float
    high: float
    num_episodes: int

    def __str__(self) -> str:
        """``37.4% [34.5%, 40.4%]``."""
        return f"{self.mean:.1%} {self.bounds('.1%')}"

    @property
    def plain(self) -> str:
        """``0.374 [0.345, 0.404]``, for means that are no shares."""
        return f"{self.mean:.3f} {self.bounds('.3f')}"

    @property
    def points(self) -> str:
        """``+3.1 [-0.2, +6.4]``: a difference of two shares, in percentage points."""
        return f"{100 * self.mean:+.1f} {self.bounds('+.1f', times=100)}"

    @property
    def change(self) -> str:
        """``+0.031 [-0.002, +0.064]``: a difference of two means that are no shares."""
        return f"{self.mean:+.3f} {self.bounds('+.3f')}"

    def bounds(self, form: str, times: float = 1) -> str:
        """The interval in a number format; one value alone has none.

        Example:
            >>> mean_interval([0.5]).bounds(".3f"), mean_interval([0.5, 0.5]).bounds(".3f")
            ('(no interval)', '[0.500, 0.500]')
        """
        if math.isinf(self.low):
            return "(no interval)"
        return f"[{times * self.low:{form}}, {times * self.high:{form}}]"


def success_of(evaluated: Evaluated) -> Interval:
    """The success rate of an evaluation."""
    return Interval(mean=evaluated.mean, low=evaluated.low, high=evaluated.high, num_episodes=evaluated.num_episodes)


def reward_of(evaluated: Evaluated) -> Interval:
    """The mean reward of an evaluation."""
    low, high = evaluated.reward_low, evaluated.reward_high
    return Interval(mean=evaluated.reward_mean, low=low, high=high, num_episodes=evaluated.num_episodes)


NOT_MEASURED: Final = Interval(mean=math.nan, low=0.0, high=1.0, num_episodes=0)
"""What is known of a success rate when no episode could be played."""


def verdict_of(gain: Interval) -> str:
    """Say in words whether a gain is beyond chance."""
    return "better" if gain.low > 0 else "worse" if gain.high < 0 else "no difference beyond chance"


def wilson(successes: int, n: int) -> Interval:
    """Wilson's 95% score interval of a success rate ``p = successes / n``.

    ``(p + z^2/2n +- z sqrt(p (1 - p) / n + z^2/4n^2)) / (1 + z^2/n)``, Wilson 1927.

    Raises:
        RecordError: Not ``0 <= successes <= n``, or no episode.

    Example:
        >>> interval = wilson(8, 10)
        >>> round(interval.low, 3), round(interval.high, 3)
        (0.49, 0.943)
    """
    if not 0 <= successes <= n or n == 0:
        raise RecordError(
            "no success rate", got=f"{successes} of {n}", allowed="0 <= successes <= n, n >= 1", fix="count the same episodes"
        )
    return _wilson(successes / n, n, num_episodes=n)


def rate_interval(rates: Sequence[float], num_episodes: int) -> Interval:
    """Wilson's interval of the mean over tasks of a rate of each, which `num_episodes` in all have measured.

    Repeats of a task are no independent tasks, so `n` is an effective number of episodes: ``p (1 - p)`` over the variance of
    the mean of the rates, not fewer than the tasks and not more than the episodes.

    Example:
        >>> print(rate_interval([1.0, 0.0, 0.5], 6))
        50.0% [12.5%, 87.5%]
    """
    p = fmean(rates)
    variance = stdev(rates) ** 2 / len(rates) if len(rates) > 1 else 0.0
    effective = min(max(len(rates), p * (1 - p) / variance), num_episodes) if variance else len(rates)
    return _wilson(p, effective, num_episodes=num_episodes)


def _wilson(p: float, n: float, *, num_episodes: int) -> Interval:
    z2 = Z_95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    # At the ends one bound is the rate itself; rounding must not push it past.
    low, high = 0.0 if p == 0 else centre - half, 1.0 if p == 1 else centre + half
    return Interval(mean=p, low=low, high=high, num_episodes=num_episodes)


def paired_gain(before: Sequence[float], after: Sequence[float]) -> Interval:
    """The mean of ``after - before`` over the same episodes, with the 95% normal interval of paired differences.

    ``mean(d) +- z stdev(d) / sqrt(n)`` with ``n - 1`` in the variance. One pair has no finite interval; pairs that
    all differ by the same amount have one of width 0.

    Raises:
        RecordError: The two lists are empty or of different lengths.

    Example:
        >>> gain = paired_gain([0, 0, 1, 0], [1, 0, 1, 1])
        >>> gain.mean, round(gain.low, 3), round(gain.high, 3)
        (0.5, -0.066, 1.066)
    """
    if len(before) != len(after) or not before:
        raise RecordError(
            "a paired gain needs the same episodes before and after",
            got=f"{len(before)} and {len(after)} rewards",
            allowed="two lists of one length, at least 1",
            fix="evaluate the same rows with the same seeds",
        )
    return mean_interval([b - a for a, b in zip(before, after, strict=True)])


def mean_interval(values: Sequence[float]) -> Interval:
    """The mean of independent values with its 95% normal interval ``mean +- z stdev / sqrt(n)``, ``n - 1`` in the variance.

    One value has no finite interval, and equal ones have one of width 0.

    Raises:
        RecordError: There are none.

    Example:
        >>> print(mean_interval([0.0, 0.5, 1.0, 0.5]).plain)
        0.500 [0.100, 0.900]
    """
    if not values:
        raise RecordError("no mean", got="0 values", allowed="at least 1", fix="play an episode")
    n, mean = len(values), fmean(values)
    half = Z_95 * stdev(values) / math.sqrt(n) if n > 1 else math.inf
    return Interval(mean=mean, low=mean - half, high=mean + half, num_episodes=n)
