"""avg@k and pass@k over tasks that were each played several times, with intervals.

The episodes of one task are no independent draws of tasks: the intervals are those of a mean over tasks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

from oldlogits.record.intervals import Z_95, Interval, wilson
from oldlogits.record.jsonl import RecordError


def trials_of(rows: Sequence[Mapping[str, object]], rewards: Sequence[float | None]) -> list[list[float]]:
    """Return the rewards of every task: equal rows are trials of one task. A trial that failed is none.

    Example:
        >>> trials_of([{"task": "1"}, {"task": "2"}, {"task": "1"}], [1.0, 0.0, None])
        [[1.0], [0.0]]
    """
    tasks: dict[str, list[float]] = {}
    for row, reward in zip(rows, rewards, strict=True):
        played = tasks.setdefault(json.dumps(row, sort_keys=True), [])
        if reward is not None:
            played.append(reward)
    return list(tasks.values())


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
    return _over_tasks([fmean(task) for task in trials], trials)


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
    return _over_tasks([1 - math.comb(len(task) - sum(task), k) / math.comb(len(task), k) for task in trials], trials)


def _over_tasks(values: Sequence[float], trials: Sequence[Sequence[bool]]) -> Interval:
    """The mean of a value of each task: Wilson's interval where all are 0 or 1, else the normal one, within 0 and 1."""
    num_episodes = sum(map(len, trials))
    if all(value in (0, 1) for value in values):
        of_tasks = wilson(round(sum(values)), len(values))
        return Interval(mean=of_tasks.mean, low=of_tasks.low, high=of_tasks.high, num_episodes=num_episodes)
    mean = fmean(values)
    half = Z_95 * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return Interval(mean=mean, low=max(0.0, mean - half), high=min(1.0, mean + half), num_episodes=num_episodes)


def _check(trials: Sequence[Sequence[bool]], k: int) -> None:
    fewest = min(map(len, trials), default=0)
    if not 1 <= k <= fewest:
        raise RecordError(
            f"no figure of {k} trials",
            got=f"{len(trials)} tasks, the one that was played least often {fewest} times",
            allowed="1 <= k <= the trials of every task",
            fix="play every task k times: eval.num_episodes = k times the number of tasks",
        )
