"""avg@k and pass@k over tasks that were each played several times, with intervals.

The episodes of one task are no independent draws of tasks: the intervals are those of a mean over tasks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from oldlogits.record.intervals import Interval, rate_interval
from oldlogits.record.jsonl import RecordError


def avg_at_k(trials: Sequence[Sequence[bool]], k: int) -> Interval:
    """The mean over tasks of their rate of success, where each was played at least `k` times, with its 95% interval.

    Args:
        trials: For every task, which of its trials succeeded.
        k: The trials that the figure is named for; more of them make it more precise, and mean the same.

    Raises:
        RecordError: There are no tasks, or one was played less often.

    Example:
        >>> avg_at_k([[True, False], [True, True]], 2).mean
        0.75
    """
    _check(trials, k)
    return rate_interval([fmean(task) for task in trials], sum(map(len, trials)))


def pass_at_k(trials: Sequence[Sequence[bool]], k: int) -> Interval:
    """The chance that at least one of `k` trials of a task succeeds, over tasks, with its 95% interval.

    A task with `c` successes in `n` trials gives ``1 - C(n - c, k) / C(n, k)``, which is unbiased for every ``n >= k``
    (Chen et al. 2021, arXiv 2107.03374, equation 1); at ``n = k`` it is whether any succeeded.

    Args:
        trials: For every task, which of its trials succeeded.
        k: Trials, at least 1.

    Raises:
        RecordError: There are no tasks, or one was played less often than `k` times.

    Example:
        >>> pass_at_k([[True, False, False, False]], 2).mean
        0.5
    """
    _check(trials, k)
    chances = [1 - math.comb(len(task) - sum(task), k) / math.comb(len(task), k) for task in trials]
    return rate_interval(chances, sum(map(len, trials)))


def _check(trials: Sequence[Sequence[bool]], k: int) -> None:
    fewest = min(map(len, trials), default=0)
    if not 1 <= k <= fewest:
        raise RecordError(
            f"no figure of {k} trials",
            got=f"{len(trials)} tasks, the one that was played least often {fewest} times",
            allowed="1 <= k <= the trials of every task",
            fix=f"play every task {k} times: oldlogits eval --repeats {k}",
        )
