"""Measured growth of log-probs, the error of an average under any growth, and the beta that makes it small."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oldlogits.versions import best_beta, measured_growth, weighted_errors
from oldlogits.versions.decay import average_errors
from oldlogits.versions.growth import DRIFT, RANDOM_WALK, MeasuredGrowth, fitted_exponent, power

steps = st.lists(st.floats(0.01, 3), min_size=1, max_size=6)


def scalar_growth(gaps, values, exponent, h):
    """V(h) in plain numbers: linear between measured distances and from 0, a power beyond."""
    if h > gaps[-1]:
        return values[-1] * (h / gaps[-1]) ** exponent
    points = [(0.0, 0.0), *zip(gaps, values, strict=True)]
    for (a, va), (b, vb) in itertools.pairwise(points):
        if a <= h <= b:
            return va + (vb - va) * (h - a) / (b - a)
    raise AssertionError


def scalar_error(weights, lag, growth):
    """The definition: ``sum_j w_j V(|j - l|) - 1/2 sum_j sum_k w_j w_k V(|j - k|)`` by two loops, rooted."""
    first = math.fsum(w * growth(abs(j - lag)) for j, w in enumerate(weights))
    pairs = math.fsum(w * u * growth(abs(j - k)) for j, w in enumerate(weights) for k, u in enumerate(weights))
    return math.sqrt(max(first - pairs / 2, 0.0))


def rising(jumps, first=1, stride=1, exponent=1.5):
    gaps = np.arange(first, first + stride * len(jumps), stride, dtype=np.float64)
    return MeasuredGrowth(gaps=gaps, values=np.cumsum(jumps), exponent=exponent, noise=0.0)


@given(steps, st.integers(1, 3), st.integers(1, 2), st.floats(1, 2), st.floats(0, 0.8), st.integers(1, 6))
@settings(max_examples=30, deadline=None)
def test_the_error_under_any_growth_is_the_double_sum_over_pairs_of_versions(jumps, first, stride, exponent, beta, num_lags):
    grown = rising(jumps, first, stride, exponent)
    weights = [(1 - beta) * beta**j for j in range(200)]
    by_gap = [scalar_growth(grown.gaps, grown.values, exponent, h) for h in range(201)]
    expected = [scalar_error(weights, lag, by_gap.__getitem__) for lag in range(num_lags)]
    # an error near 0 is the root of the difference of two sums
    np.testing.assert_allclose(average_errors(beta, num_lags, grown), expected, rtol=1e-6, atol=1e-6 * math.sqrt(by_gap[-1]))


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=8), steps, st.floats(1, 2))
@settings(max_examples=50)
def test_the_error_of_any_weights_is_the_double_sum_too(weights, jumps, exponent):
    shares, grown = np.array(weights) / sum(weights), rising(jumps, exponent=exponent)
    by_gap = [scalar_growth(grown.gaps, grown.values, exponent, h) for h in range(12)]
    expected = [scalar_error(shares, lag, by_gap.__getitem__) for lag in range(5)]
    np.testing.assert_allclose(weighted_errors(shares, 5, grown), expected, rtol=1e-6, atol=1e-6 * math.sqrt(by_gap[-1]))


def test_the_errors_of_two_versions_are_those_of_the_docstring():
    np.testing.assert_allclose(weighted_errors(np.array([0.5, 0.5]), 3, power(RANDOM_WALK)), [0.5, 0.5, math.sqrt(1.25)])


def test_live_weights_miss_by_the_growth_itself():
    grown = rising([1.0, 2.0, 4.0])
    np.testing.assert_allclose(average_errors(0.0, 4, grown) ** 2, [0, 1, 3, 7])
    np.testing.assert_allclose(weighted_errors(np.ones(1), 4, grown) ** 2, [0, 1, 3, 7])


@given(st.floats(1, 2), st.lists(st.integers(0, 60), min_size=3, max_size=9).filter(any), st.floats(1e-6, 10))
@settings(max_examples=40, deadline=None)
def test_where_the_measured_growth_is_a_power_the_beta_is_that_of_its_exponent(exponent, lags, unit):
    """In any unit: only the shape of V says which beta is best."""
    num = len(lags)
    counts = np.arange(10, 10 + num)
    grown = measured_growth(counts, counts * unit * np.arange(num) ** exponent)
    assert grown.exponent == pytest.approx(exponent)
    found, expected = best_beta(np.array(lags), grown), best_beta(np.array(lags), exponent)

    def cost(beta):
        return float(np.array(lags) @ average_errors(beta, num, exponent))

    assert found == expected or cost(found) == pytest.approx(cost(expected), rel=1e-9)  # two ages of equal cost


@given(steps, st.floats(1, 2), st.lists(st.integers(0, 50), min_size=2, max_size=4).filter(any))
@settings(max_examples=10, deadline=None)
def test_no_age_within_the_window_has_a_smaller_error_than_the_best_whatever_the_growth(jumps, exponent, lags):
    """The sum over lags in plain numbers, at eighths of a version."""
    grown = rising(jumps, exponent=exponent)
    by_gap = [scalar_growth(grown.gaps, grown.values, exponent, h) for h in range(130)]

    def cost(beta):
        weights = [(1 - beta) * beta**j for j in range(120)]  # at age 3, the largest, 1e-15 is left
        return sum(n * scalar_error(weights, lag, by_gap.__getitem__) for lag, n in enumerate(lags))

    best = cost(best_beta(np.array(lags), grown))
    for eighth in range(8 * (len(lags) - 1) + 1):
        assert best <= cost(eighth / 8 / (1 + eighth / 8)) + 1e-5 * sum(lags) * math.sqrt(by_gap[-1])


@given(steps, st.lists(st.integers(1, 50), min_size=7, max_size=7), st.floats(0, 0.5))
@settings(max_examples=50)
def test_a_growth_that_rises_is_measured_as_it_is_less_the_noise_of_lag_0(jumps, counts, noise):
    counts = np.array(counts[: len(jumps) + 1])
    squares = counts * (noise + np.concatenate([[0.0], np.cumsum(jumps)]))
    grown = measured_growth(counts, squares)
    np.testing.assert_allclose(grown(np.arange(len(counts), dtype=float)), np.concatenate([[0.0], np.cumsum(jumps)]), atol=1e-9)
    assert grown.noise == pytest.approx(noise, abs=1e-9)


@given(st.lists(st.tuples(st.integers(1, 9), st.floats(0, 4)), min_size=2, max_size=5))
@settings(max_examples=60)
def test_a_growth_that_falls_is_smoothed_to_the_nearest_one_that_does_not(points):
    """Against all ways to form blocks of neighbours: the best of those whose means do not fall."""
    counts, means = np.array([n for n, _ in points]), np.array([v for _, v in points])
    grown = measured_growth(np.append(0, counts), np.append(0.0, counts * means))

    def fits():
        for cuts in itertools.product([False, True], repeat=len(means) - 1):
            ends = [i + 1 for i, cut in enumerate(cuts) if cut]
            blocks = list(itertools.pairwise([0, *ends, len(means)]))
            fit = np.concatenate([np.full(b - a, np.average(means[a:b], weights=counts[a:b])) for a, b in blocks])
            if (np.diff(fit) >= -1e-12).all():
                yield float(counts @ (fit - means) ** 2)

    if grown is None:
        assert means.max() == 0
        return
    assert (np.diff(grown.values) >= 0).all()
    assert counts @ (grown.values - means) ** 2 == pytest.approx(min(fits()), abs=1e-9)


@pytest.mark.parametrize("counts, squares", [
    ([], []), ([9, 0, 0], [0.0, 0.0, 0.0]), ([9, 4, 4], [0.0, 0.0, 0.0]), ([4, 4], [4.0, 3.0]), ([4, 4], [0.0, math.inf]),
], ids=["none", "lag 0 alone", "unchanged", "only noise", "infinite"])  # fmt: skip
def test_where_nothing_has_grown_there_is_no_growth(counts, squares):
    assert measured_growth(np.array(counts, np.int64), np.array(squares)) is None


def test_a_lag_without_tokens_lies_between_its_neighbours_and_one_lag_alone_is_a_random_walk():
    grown = measured_growth(np.array([0, 2, 0, 2]), np.array([0.0, 2.0, 0.0, 10.0]))
    np.testing.assert_allclose(grown(np.array([0.0, 1, 2, 3])), [0, 1, 3, 5])
    alone = measured_growth(np.array([0, 0, 3, 0]), np.array([0.0, 0.0, 12.0, 0.0]))
    assert alone.exponent == RANDOM_WALK
    np.testing.assert_allclose(alone(np.array([0.0, 1, 2, 6])), [0, 2, 4, 12])


def test_beyond_the_window_the_example_of_the_docstring_goes_on_with_its_exponent():
    grown = measured_growth(np.array([0, 2, 1]), np.array([0.0, 2.0, 4.0]))
    assert grown.exponent == pytest.approx(DRIFT)
    np.testing.assert_allclose(grown(np.array([1.0, 2, 3])), [1, 4, 9])


def test_a_distance_counts_with_its_tokens_in_the_exponent():
    """A million tokens on the line of slope 1, and one token far above it."""
    gaps, growth = np.array([1.0, 2, 4]), np.array([1.0, 2, 16])
    assert fitted_exponent(gaps, growth, np.array([10**6, 10**6, 1])) == pytest.approx(1, abs=1e-3)
    assert fitted_exponent(gaps, growth, np.array([1, 1, 10**6])) > 1.9
