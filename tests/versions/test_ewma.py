"""The average against explicit sums in float64, and the betas against what they are to minimise."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from oldlogits.core.errors import ConfigError
from oldlogits.versions import WeightAverage, best_beta, growth_exponent, mean_lag_beta, window_beta
from oldlogits.versions.decay import average_errors
from oldlogits.versions.growth import DRIFT, RANDOM_WALK

betas = st.floats(0, 0.98)


def masters(version, dtype=torch.float32):
    """Two weights of a made-up model; every version is another."""
    draw = torch.Generator().manual_seed(version)
    return {"a": torch.randn(3, 2, generator=draw).to(dtype), "b": torch.randn(5, generator=draw).to(dtype)}


def after(*decays, first=0):
    """The average of versions first, first + 1, ..., each taken in with its beta."""
    average = WeightAverage(masters(first))
    for version, beta in enumerate(decays, first + 1):
        average.add(masters(version), beta)
    return average


def explicit(decays):
    """Weights of versions 0 .. n by the definition: the product of all later betas."""
    return np.array([math.prod(decays[k:]) for k in range(len(decays) + 1)])


def assert_average_of(average, weights, first=0):
    for name in ("a", "b"):
        versions = np.stack([masters(first + k)[name].double().numpy() for k in range(len(weights))])
        expected = np.tensordot(weights, versions, 1) / weights.sum()
        np.testing.assert_allclose(average.weights[name].numpy(), expected, rtol=0, atol=2e-6)


@pytest.mark.slow
@given(st.lists(betas, max_size=12))
def test_the_average_and_its_age_are_the_explicit_sums_whatever_beta_each_version_had(decays):
    average, weights = after(*decays), explicit(decays)
    assert_average_of(average, weights)
    ages = np.arange(len(weights))[::-1]
    assert average.age == pytest.approx(float(weights @ ages / weights.sum()), abs=1e-12)
    assert average.num_versions == len(weights)


@given(st.floats(0.01, 0.98), st.integers(1, 60))
def test_the_age_of_n_versions_of_one_beta_is_the_papers(beta, n):
    expected = beta / (1 - beta) - n * beta**n / (1 - beta**n)
    assert after(*[beta] * (n - 1)).age == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_the_example_of_the_docstring_holds():
    average = WeightAverage({"x": torch.tensor([1.0])})
    for value in (2.0, 4.0):
        average.add({"x": torch.tensor([value])}, 0.5)
    assert average.weights["x"].item() == pytest.approx(3.0)
    assert average.age == pytest.approx(1 / 1.75)


@pytest.mark.parametrize("forget", [lambda a, w: a.add(w, 0.0), lambda a, w: a.reset(w)])
def test_beta_0_and_a_reset_leave_the_newest_version_bit_for_bit(forget):
    average = after(0.9, 0.8, 0.9)
    forget(average, masters(9))
    assert all(torch.equal(average.weights[name], w) for name, w in masters(9).items())
    assert average.age == 0


@pytest.mark.slow
@given(st.lists(betas, max_size=5), st.lists(betas, max_size=5))
def test_what_was_before_a_reset_does_not_count(before, later):
    average = after(*before, first=20)
    average.reset(masters(0))
    for version, beta in enumerate(later, 1):
        average.add(masters(version), beta)
    assert_average_of(average, explicit(later))
    assert average.num_versions == len(later) + 1


def test_the_average_does_not_move_with_the_masters_it_was_given():
    weights = masters(0)
    average = WeightAverage(weights)
    weights["a"].zero_()
    assert torch.equal(average.weights["a"], masters(0)["a"])


@pytest.mark.parametrize("beta", [-0.1, 1.0, 1.5, math.nan])
def test_a_beta_that_is_no_decay_is_refused(beta):
    with pytest.raises(ConfigError, match="beta is no decay"):
        after(beta)


def test_the_average_is_float32_in_one_buffer_whatever_the_masters_are():
    average = WeightAverage(masters(0, torch.bfloat16))
    average.add(masters(1, torch.bfloat16), 0.5)
    assert {w.dtype for w in average.weights.values()} == {torch.float32}
    assert len({w.untyped_storage().data_ptr() for w in average.weights.values()}) == 1
    assert average.num_bytes == 4 * 11


def test_a_bf16_average_freezes_where_an_fp32_one_keeps_its_age():
    """A weight near 1 drifts by 1e-4 a version; its average over 9 versions should lag 9 versions behind."""
    beta, speed, num_versions = 0.9, 1e-4, 400
    fp32 = WeightAverage({"x": torch.ones(1)})
    bf16 = torch.ones(1, dtype=torch.bfloat16)
    weight_sum = 1.0
    for version in range(1, num_versions + 1):
        theta = torch.tensor([1 + speed * version])
        fp32.add({"x": theta}, beta)
        weight_sum = beta * weight_sum + 1
        bf16.lerp_(theta.to(torch.bfloat16), 1 / weight_sum)  # steps of the masters' bf16 casts are 1/128
    now = 1 + speed * num_versions
    assert (now - fp32.weights["x"].item()) / speed == pytest.approx(fp32.age, rel=0.02)
    assert (now - bf16.item()) / speed > 3 * fp32.age


@pytest.mark.parametrize("decays", [(), (0.9, 0.5, 0.0, 0.7)])
def test_an_average_read_from_a_file_goes_on_bit_for_bit(tmp_path, decays):
    straight = after(*decays)
    save_file({**straight.weights, "counters": straight.counters}, tmp_path / "average.safetensors")
    restored = WeightAverage(masters(77))
    read = load_file(tmp_path / "average.safetensors")
    restored.load(read, read.pop("counters"))
    for average in (straight, restored):
        average.add(masters(50), 0.9)
    assert all(torch.equal(restored.weights[name], w) for name, w in straight.weights.items())
    assert (restored.age, restored.num_versions) == (straight.age, straight.num_versions)


@given(st.integers(0, 64))
def test_the_windows_beta_has_the_age_of_half_the_window(window):
    beta = window_beta(window)
    assert beta / (1 - beta) == pytest.approx(window / 2)


@given(st.lists(st.integers(0, 500), min_size=1, max_size=10).filter(any))
def test_the_mean_lags_beta_has_the_age_of_the_mean_lag(counts):
    beta = mean_lag_beta(np.array(counts))
    tokens = [lag for lag, n in enumerate(counts) for _ in range(n)]
    assert beta / (1 - beta) == pytest.approx(sum(tokens) / len(tokens))


def test_without_measured_lags_every_measured_beta_is_that_of_the_live_weights():
    nothing = np.zeros(5, np.int64)
    assert mean_lag_beta(nothing) == best_beta(nothing, 1.5) == 0


@given(st.floats(0, 0.9), st.floats(0.2, 2.0), st.integers(1, 6))
@settings(max_examples=40)
def test_the_error_of_an_average_is_the_double_sum_over_pairs_of_versions(beta, exponent, num_lags):
    ages = np.arange(400)
    weights = (1 - beta) * np.power(beta, ages, dtype=float)
    pairs = weights @ np.abs(ages[:, None] - ages) ** exponent @ weights / 2
    expected = [math.sqrt(max(weights @ np.abs(ages - lag) ** exponent - pairs, 0)) for lag in range(num_lags)]
    np.testing.assert_allclose(average_errors(beta, num_lags, exponent), expected, rtol=1e-6, atol=1e-5)


@given(st.floats(0, 0.97))
def test_drift_and_random_walk_are_the_papers_two_errors(beta):
    lags = np.arange(9)
    age = beta / (1 - beta)
    np.testing.assert_allclose(average_errors(beta, 9, DRIFT), np.abs(lags - age), atol=1e-5)
    walk = beta**2 / (1 - beta**2) - 2 * beta * (1 - beta**lags) / (1 - beta) + lags
    np.testing.assert_allclose(average_errors(beta, 9, RANDOM_WALK), np.sqrt(np.maximum(walk, 0)), atol=1e-6)


def test_the_error_is_that_of_a_simulated_random_walk():
    rng = np.random.default_rng(0)
    steps = rng.standard_normal((4000, 300))
    walks = np.cumsum(steps, 1)
    beta = 0.8
    weights = (1 - beta) * beta ** np.arange(300)
    found = np.array([np.sqrt(np.mean((walks[:, ::-1] @ weights - walks[:, -1 - lag]) ** 2)) for lag in range(9)])
    np.testing.assert_allclose(found, average_errors(beta, 9, RANDOM_WALK), rtol=0.05)


def test_the_exponent_of_drift_is_2_and_of_a_random_walk_about_1():
    rng = np.random.default_rng(1)
    speeds = rng.standard_normal(64)
    assert growth_exponent(np.arange(12)[:, None] * speeds, 8) == pytest.approx(DRIFT)
    walk = np.cumsum(rng.standard_normal((16, 4000)), 0)
    assert growth_exponent(walk, 8) == pytest.approx(RANDOM_WALK, abs=0.03)
    mixed = growth_exponent(walk + 1.5 * np.arange(16)[:, None] * rng.standard_normal(4000), 8)
    assert 1.2 < mixed < 1.9


@pytest.mark.parametrize(
    "logps",
    [np.zeros((0,)), np.zeros((1, 4)), np.array([[0.0], [1.0]]), np.ones((9, 4)), np.full((9, 4), np.nan)],
    ids=["none", "one", "two", "unchanged", "nan"],
)
def test_where_there_is_nothing_to_fit_the_exponent_is_the_cautious_one(logps):
    assert growth_exponent(logps, 8) == RANDOM_WALK


def test_noise_without_memory_does_not_push_the_exponent_below_the_random_walk():
    assert growth_exponent(np.random.default_rng(2).standard_normal((16, 500)), 8) == RANDOM_WALK


@given(st.lists(st.integers(0, 50), min_size=2, max_size=7).filter(any), st.floats(1, 2))
@settings(max_examples=30)
def test_no_age_within_the_window_has_a_smaller_expected_error_than_the_best(counts, exponent):
    lags, num_lags = np.array(counts), len(counts)
    best = lags @ average_errors(best_beta(lags, exponent), num_lags, exponent)
    for age in np.linspace(0, num_lags - 1, 8 * (num_lags - 1) + 1):
        assert best <= lags @ average_errors(age / (1 + age), num_lags, exponent) + 1e-9
    # between two neighbours of the grid at most a sixteenth of a version is lost
    for age in np.linspace(0, num_lags - 1, 37):
        assert best <= lags @ average_errors(age / (1 + age), num_lags, exponent) + lags.sum() / 16 + 1e-9


def test_under_drift_the_best_age_is_the_median_lag():
    beta = best_beta(np.array([1, 1, 0, 0, 0, 1]), DRIFT)
    assert beta / (1 - beta) == pytest.approx(1)


@pytest.mark.slow
@pytest.mark.parametrize("exponent", [RANDOM_WALK, 1.5, DRIFT])
@pytest.mark.parametrize("window", [4, 8, 32])
def test_even_lags_ask_for_an_average_and_mostly_fresh_ones_for_the_live_weights(exponent, window):
    even = best_beta(np.ones(window + 1, np.int64), exponent)
    assert even / (1 - even) == pytest.approx(window / 2, rel=0.1)
    mostly_fresh = (1000 * 0.4 ** np.arange(window + 1)).astype(np.int64)
    assert best_beta(mostly_fresh, exponent) == 0
