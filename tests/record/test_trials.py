"""avg@k and pass@k against the mean over all choices of k trials, counted one by one."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oldlogits.record.intervals import wilson
from oldlogits.record.jsonl import RecordError
from oldlogits.record.trials import avg_at_k, pass_at_k

TRIALS = st.integers(1, 4).flatmap(
    lambda k: st.tuples(st.just(k), st.lists(st.lists(st.booleans(), min_size=k, max_size=7), min_size=1, max_size=6))
)


@given(TRIALS)
def test_both_are_means_over_all_choices_of_k_trials(case):
    k, trials = case
    average = chance = 0.0
    for task in trials:
        choices = list(itertools.combinations(task, k))
        average += sum(sum(choice) / k for choice in choices) / len(choices) / len(trials)
        chance += sum(any(choice) for choice in choices) / len(choices) / len(trials)
    assert avg_at_k(trials, k).mean == pytest.approx(average)
    assert pass_at_k(trials, k).mean == pytest.approx(chance)


@given(TRIALS)
def test_the_interval_holds_the_mean_and_is_one_of_rates(case):
    k, trials = case
    for figure in (avg_at_k(trials, k), pass_at_k(trials, k)):
        assert 0 <= figure.low <= figure.mean + 1e-12
        assert figure.mean - 1e-12 <= figure.high <= 1
        assert figure.num_episodes == sum(map(len, trials))


def test_one_trial_is_the_rate_of_success_with_wilsons_interval():
    trials = [[True]] * 8 + [[False]] * 2
    for figure in (avg_at_k(trials, 1), pass_at_k(trials, 1)):
        assert figure == wilson(8, 10)


def test_the_interval_is_that_of_a_mean_over_tasks_not_over_episodes():
    """Two kinds of tasks, each always the same: four trials of a task say no more than one."""
    trials = [[True] * 4] * 5 + [[False] * 4] * 5
    assert (avg_at_k(trials, 4).low, avg_at_k(trials, 4).high) == (wilson(5, 10).low, wilson(5, 10).high)
    halves = [[True, False], [True, True], [False, False], [True, False]]
    variance = sum((x - 0.5) ** 2 for x in (0.5, 1, 0, 0.5)) / 3 / 4
    n, z2 = 0.25 / variance, 1.959964**2  # as many independent episodes have this variance
    half = math.sqrt(z2 * (0.25 / n + z2 / (4 * n * n))) / (1 + z2 / n)
    assert n == pytest.approx(6)
    assert avg_at_k(halves, 2).low == pytest.approx(0.5 - half, abs=1e-6)


@pytest.mark.parametrize("trials, k", [([], 1), ([[True], [True, True]], 2), ([[True]], 0)])
def test_a_task_that_was_played_too_seldom_is_refused(trials, k):
    for figure in (avg_at_k, pass_at_k):
        with pytest.raises(RecordError, match="trials"):
            figure(trials, k)
