"""The clip of a token narrows with its own staleness: one token at a time in plain float64, gradient included."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oldlogits.core.errors import ConfigError
from oldlogits.core.loss import LOSSES, LossInputs, Objective
from oldlogits.core.policies import MU, OLD, THETA, VARIANTS

from .typed import clip_log_ratio, eps_at_lag

KNOBS = Objective(variant=VARIANTS["decoupled_exact"], band=1.4, eps_low=0.2, eps_high=0.3, dual_clip=2.5)
RULES = {"none": lambda s: 1.0, "inverse": lambda s: 1 + s, "inverse-sqrt": lambda s: math.sqrt(1 + s)}
tokens = st.tuples(st.floats(-2, 2), st.floats(-0.3, 0.3), st.sampled_from([-1.5, 0.0, 2.0]), st.integers(0, 9))


def terms_of(drawn, rule, dtype=torch.float64):
    log_r_s, log_r_d, advantages, staleness = map(list, zip(*drawn, strict=True))
    old = torch.full((len(drawn),), -3.0, dtype=dtype)
    theta = (old + torch.tensor(log_r_s, dtype=dtype)).requires_grad_()
    inputs = LossInputs(
        logp={MU: old - torch.tensor(log_r_d, dtype=dtype), OLD: old, THETA: theta},
        advantages=torch.tensor(advantages, dtype=dtype),
        loss_mask=torch.ones(len(drawn), dtype=torch.bool),
        staleness=torch.tensor(staleness),
        sequence_index=torch.zeros(len(drawn), dtype=torch.int64),
        num_sequences=1,
    )
    found = LOSSES.find("masked_is")(inputs, dataclasses.replace(KNOBS, clip_by_lag=rule))
    return found, torch.autograd.grad(found.values.sum(), theta)[0]


def by_hand(log_r_s, log_r_d, advantage, lag, rule):
    """Value and slope in log theta of one token."""
    r_s, r_d, over = math.exp(log_r_s), math.exp(log_r_d), RULES[rule](lag)
    low, high = 1 - 0.2 / over, 1 + 0.3 / over
    h = min(r_s, high) if advantage > 0 else min(max(r_s, low), 2.5) if advantage < 0 else r_s
    value = r_d * advantage * h if 1 / 1.4 <= r_d <= 1.4 else 0.0
    return value, value if h == r_s else 0.0


@pytest.mark.parametrize("rule", RULES)
@given(drawn=st.lists(tokens, min_size=1, max_size=10))
def test_values_and_gradients_are_those_of_each_tokens_own_clip(rule, drawn):
    found, slopes = terms_of(drawn, rule)
    for value, slope, one in zip(found.values.tolist(), slopes.tolist(), drawn, strict=True):
        assert (value, slope) == pytest.approx(by_hand(*one, rule), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rule", ["inverse", "inverse-sqrt"])
def test_fresh_tokens_have_the_clip_of_the_recipe_to_the_last_bit_ties_included(rule, dtype):
    edges = [math.log(1.3), math.log(0.8), math.log(2.5), 0.0, math.log(1.3000001)]
    drawn = [(edge, 0.1, advantage, 0) for edge in edges for advantage in (-1.5, 0.0, 2.0)]
    (found, slopes), (plain, expected) = terms_of(drawn, rule, dtype), terms_of(drawn, "none", dtype)
    assert torch.equal(found.values, plain.values)
    assert torch.equal(found.clip_mask, plain.clip_mask)
    assert torch.equal(slopes, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_ratio_at_the_bound_of_its_lag_is_kept_and_one_beyond_it_is_not(dtype):
    eps = eps_at_lag(0.3, torch.tensor([3, 3]), "inverse")
    assert eps.tolist() == pytest.approx([0.075, 0.075], rel=1e-12)
    bound = torch.tensor([math.log1p(0.075)], dtype=torch.float64).to(dtype)
    log_r_s = torch.cat([bound, torch.nextafter(bound, torch.ones_like(bound))])
    kept = clip_log_ratio(log_r_s, torch.ones(2, dtype=dtype), eps, eps, 3.0) == log_r_s
    assert kept.tolist() == [True, False]


def test_the_example_of_the_docstring():
    lags = torch.tensor([0, 1, 3])
    assert eps_at_lag(0.2, lags, "inverse").tolist() == pytest.approx([0.2, 0.1, 0.05])
    assert eps_at_lag(0.2, lags, "inverse-sqrt").tolist() == pytest.approx([0.2, 0.2 / math.sqrt(2), 0.1])
    assert eps_at_lag(0.2, lags, "none") == 0.2


def test_a_ratio_that_is_not_a_number_is_masked_whatever_its_lag():
    found, slopes = terms_of([(math.nan, 0.0, 1.0, 2), (0.01, 0.0, 1.0, 2)], "inverse")
    assert found.clip_mask.tolist() == [False, True]
    assert slopes.tolist() == pytest.approx([0.0, math.exp(0.01)])


def test_bounds_out_of_range_are_refused_as_before():
    for low, high in ((-0.1, 0.2), (0.2, math.nan)):
        with pytest.raises(ConfigError, match="clip bounds"):
            clip_log_ratio(torch.zeros(1), torch.ones(1), low, high, 3.0)
