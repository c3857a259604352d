import itertools
import math
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oldlogits.backends.lag import draw_plan

LAGS = ("fresh_first", "even", "skewed", "random")
NUM = 4000


def plans(lag, window, tokens_per_version=6, num=NUM):
    rng = random.Random(f"{lag}/{window}")
    return [draw_plan(lag, window, tokens_per_version, rng) for _ in range(num)]


def lags_of(plan):
    """The lags at which a plan allows tokens, from the oldest on."""
    return [lag for lag in reversed(range(len(plan))) if plan[lag]]


def sample_lags(plan, num_tokens):
    """The lag of each token of a trajectory of that length."""
    left = list(plan)
    lags = []
    for lag in lags_of(plan):
        take = int(min(left[lag], num_tokens - len(lags)))
        lags += [lag] * take
    return lags


@given(st.sampled_from(LAGS), st.integers(0, 6), st.integers(1, 30), st.integers())
def test_a_plan_has_one_allowance_per_lag_whole_and_only_the_last_is_endless(lag, window, tokens_per_version, seed):
    plan = draw_plan(lag, window, tokens_per_version, random.Random(seed))
    assert len(plan) == window + 1
    used = lags_of(plan)
    assert [math.isinf(plan[i]) for i in used] == [False] * (len(used) - 1) + [True]
    assert all(plan[i] == int(plan[i]) >= 1 for i in used[:-1])
    assert len(sample_lags(plan, 500)) == 500


@given(st.sampled_from(LAGS), st.integers(0, 6), st.integers(1, 30), st.integers())
def test_a_plan_is_repeatable_from_its_seed_alone(lag, window, tokens_per_version, seed):
    first, second = (draw_plan(lag, window, tokens_per_version, random.Random(seed)) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("lag", LAGS)
def test_without_a_window_everything_is_fresh(lag):
    assert draw_plan(lag, 0, 5, random.Random(0)) == (math.inf,)


def test_fresh_first_uses_lags_1_and_0_only():
    for plan in plans("fresh_first", 4):
        assert lags_of(plan) == [1, 0]


@pytest.mark.parametrize("window", [1, 2, 3, 5])
def test_even_gives_every_lag_the_same_share_of_halves_of_trajectories(window):
    shares = Counter(lag for plan in plans("even", window) for lag in lags_of(plan))
    assert sum(shares.values()) == 2 * NUM, "two versions a trajectory"
    for lag in range(window + 1):
        expected = 2 * NUM / (window + 1)
        assert abs(shares[lag] - expected) < 5 * math.sqrt(expected), lag


@pytest.mark.parametrize("lag, first", [("fresh_first", 1), ("even", None)])
def test_the_first_version_samples_the_mean_number_of_tokens(lag, first):
    sizes = [plan[first or lags_of(plan)[0]] for plan in plans(lag, 3, tokens_per_version=6)]
    assert set(sizes) == set(range(1, 12))
    assert abs(sum(sizes) / NUM - 6) < 5 * math.sqrt((11**2 - 1) / 12 / NUM)


def test_skewed_begins_at_geometrically_fewer_old_lags_and_ends_fresh():
    starts = Counter(lags_of(plan)[0] for plan in plans("skewed", 3))
    for lag, share in {0: 1 / 2, 1: 1 / 4, 2: 1 / 8, 3: 1 / 8}.items():
        assert abs(starts[lag] - share * NUM) < 5 * math.sqrt(share * (1 - share) * NUM)
    assert all(lags_of(plan)[-1] == 0 and len(lags_of(plan)) <= 2 for plan in plans("skewed", 3))


def test_random_begins_at_every_lag_alike_and_goes_through_all_younger_ones():
    starts = Counter()
    for plan in plans("random", 3):
        used = lags_of(plan)
        starts[used[0]] += 1
        assert used == list(range(used[0], -1, -1))
    assert all(abs(starts[lag] - NUM / 4) < 5 * math.sqrt(NUM * 3 / 16) for lag in range(4))


def test_random_switches_after_any_token_with_the_same_probability_whatever_its_position():
    seen, switched = Counter(), Counter()
    for plan in plans("random", 3, tokens_per_version=5):
        lags = sample_lags(plan, 12)
        for position, (now, then) in enumerate(itertools.pairwise(lags)):
            if now > 0:
                seen[position] += 1
                switched[position] += then != now
    for position in range(8):
        expected = seen[position] / 5
        assert abs(switched[position] - expected) < 5 * math.sqrt(expected * 4 / 5), position


def test_one_token_per_version_switches_after_every_token():
    for plan in plans("random", 3, tokens_per_version=1, num=50):
        assert {plan[lag] for lag in lags_of(plan)[:-1]} <= {1.0}
