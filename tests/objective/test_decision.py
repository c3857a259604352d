"""Decision sums against a loop over tokens, with the active sets of the scalar oracle."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oldlogits.core.policies import ASYNC, EWMA, MU, OLD, THETA, find_variant
from oldlogits.objective import split_ratio

from .oracle import ROWS, Objective, token
from .typed import decision_sums, exact_variant, surrogate

NUM_STALENESS = 3
log_ratio = st.floats(-1, 1)
a_token = st.tuples(
    st.floats(-5, -1),  # log mu
    log_ratio,  # log old - log mu
    log_ratio,  # log ewma - log mu
    log_ratio,  # log theta - log mu
    st.sampled_from([-1.5, 0.0, 0.5]),
    st.booleans(),  # a loss token
    st.integers(0, NUM_STALENESS - 1),
)


def tensor(values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype)


def sums_of(tokens, variant="ppo_ewma_train_infer"):
    mu, old, ewma, theta, advantages, loss, staleness = (list(column) for column in zip(*tokens, strict=True))
    mu, loss_mask = tensor(mu), tensor(loss, torch.bool)
    logp = {MU: mu, OLD: mu + tensor(old), EWMA: mu + tensor(ewma), ASYNC: mu + tensor(ewma), THETA: mu + tensor(theta)}
    knobs = dataclasses.asdict(Objective())

    def active(row):
        return surrogate(split_ratio(row, logp), tensor(advantages), loss_mask, **knobs).active_mask

    row = find_variant(variant)
    return decision_sums(
        logp[row.proximal],
        logp[OLD],
        logp[THETA] - mu,
        tensor(advantages),
        active_mask=active(row),
        exact_active_mask=active(exact_variant(row)),
        loss_mask=loss_mask,
        staleness=tensor(staleness, torch.int64),
        num_staleness=NUM_STALENESS,
    )


def by_hand(tokens, variant, exact):
    """The sums of the paper's definitions, token by token; and how near a bound the nearest ratio is."""
    names = [field.name for field in dataclasses.fields(sums_of(tokens))]
    sums = {name: [0.0] * NUM_STALENESS for name in names}
    margin = math.inf
    for log_mu, old, ewma, theta, advantage, loss, lag in tokens:
        if not loss:
            continue
        mu = math.exp(log_mu)
        prob = {"mu": mu, "old": mu * math.exp(old), "ewma": mu * math.exp(ewma), "async": mu * math.exp(ewma)}
        prob["theta"] = mu * math.exp(theta)
        found, right = (token(name, prob, advantage, Objective()) for name in (variant, exact))
        margin = min(margin, found.margin, right.margin)
        weight = prob["theta"] / mu * abs(advantage)
        kept, masked = found.active and not right.active, right.active and not found.active
        proximal = prob[ROWS[variant][1]]
        added = {
            "num_tokens": 1,
            "num_nonzero": advantage != 0,
            "num_compared": 1,
            "logp_error": abs(math.log(proximal) - math.log(prob["old"])),
            "wrongly_kept": kept,
            "wrongly_masked": masked,
            "wrongly_kept_nonzero": kept and advantage != 0,
            "wrongly_masked_nonzero": masked and advantage != 0,
            "weight": weight * right.active,
            "weight_wrongly_kept": weight * kept,
            "weight_wrongly_masked": weight * masked,
        }
        assert set(added) == set(sums)
        for name, value in added.items():
            sums[name][lag] += value
    return sums, margin


EXACT = {
    "ppo_clip": "ppo_clip",
    "ppo_clip_train_infer": "decoupled_exact",
    "decoupled_exact": "decoupled_exact",
    "decoupled_async": "decoupled_exact",
    "linear_prox": "ppo_clip",
    "loglinear_prox": "ppo_clip",
    "ppo_ewma": "ppo_clip",
    "ppo_ewma_train_infer": "decoupled_exact",
    "linear_train_infer": "decoupled_exact",
    "loglinear_train_infer": "decoupled_exact",
    "aged_train_infer": "decoupled_exact",
    "rescore_train_infer": "decoupled_exact",
    "mis_balance": "decoupled_exact",
}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_stands_in_for_the_exact_row_that_corrects_the_mismatch_as_it_does(name):
    assert exact_variant(find_variant(name)) == find_variant(EXACT[name])


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["ppo_ewma_train_infer", "ppo_ewma", "decoupled_async", "ppo_clip_train_infer"])
@given(tokens=st.lists(a_token, min_size=1, max_size=12))
@settings(max_examples=80)
def test_the_sums_are_those_of_a_loop_over_tokens(variant, tokens):
    expected, margin = by_hand(tokens, variant, EXACT[variant])
    if margin < 1e-9:
        return
    found = sums_of(tokens, variant)
    for name, values in expected.items():
        np.testing.assert_allclose(getattr(found, name).numpy(), values, rtol=1e-9, atol=1e-9, err_msg=name)


@pytest.mark.slow
@given(st.lists(a_token, min_size=1, max_size=8), st.lists(a_token, min_size=1, max_size=8))
@settings(max_examples=40)
def test_sums_of_two_batches_add_up_to_those_of_both(one, other):
    left, right, both = sums_of(one), sums_of(other), sums_of([*one, *other])
    for field in dataclasses.fields(both):
        a, b, c = (getattr(sums, field.name) for sums in (left, right, both))
        torch.testing.assert_close(a + b, c)


@pytest.mark.slow
@given(st.lists(a_token, min_size=1, max_size=12))
def test_old_itself_decides_nothing_otherwise(tokens):
    exact = sums_of([(mu, old, old, theta, a, loss, lag) for mu, old, _, theta, a, loss, lag in tokens])
    for name in ("logp_error", "wrongly_kept", "wrongly_masked", "weight_wrongly_kept", "weight_wrongly_masked"):
        assert getattr(exact, name).tolist() == [0] * NUM_STALENESS


def test_the_example_of_the_docstring_holds():
    found = decision_sums(
        tensor([-1.0, -1.0, -1.0]),
        tensor([-1.0, -1.5, -1.25]),
        tensor([0.0, 0.0, 0.0]),
        tensor([2.0, -1.0, 0.0]),
        active_mask=tensor([1, 0, 1], torch.bool),
        exact_active_mask=tensor([1, 1, 0], torch.bool),
        loss_mask=tensor([1, 1, 1], torch.bool),
        staleness=tensor([0, 0, 0], torch.int64),
        num_staleness=1,
    )
    assert {field.name: getattr(found, field.name).item() for field in dataclasses.fields(found)} == {
        "num_tokens": 3, "num_nonzero": 2, "num_compared": 3, "logp_error": 0.75,
        "wrongly_kept": 1, "wrongly_masked": 1, "wrongly_kept_nonzero": 0, "wrongly_masked_nonzero": 1,
        "weight": 3.0, "weight_wrongly_kept": 0.0, "weight_wrongly_masked": 1.0,
    }  # fmt: skip


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_a_log_prob_that_is_not_finite_is_left_out_of_the_mean_error_and_counted_as_masked(bad):
    found = decision_sums(
        tensor([bad, -1.0]),
        tensor([-1.0, -1.5]),
        tensor([0.0, 0.0]),
        tensor([2.0, 1.0]),
        active_mask=tensor([0, 1], torch.bool),
        exact_active_mask=tensor([1, 1], torch.bool),
        loss_mask=tensor([1, 1], torch.bool),
        staleness=tensor([0, 0], torch.int64),
        num_staleness=1,
    )
    assert (found.num_tokens.item(), found.num_compared.item(), found.logp_error.item()) == (2, 1, 0.5)
    assert (found.wrongly_masked.item(), found.weight_wrongly_masked.item()) == (1, 2.0)
