import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oldlogits.core.errors import MissingLogprobError
from oldlogits.core.policies import EXPERIMENTAL_VARIANTS, LINEAR, MU, OLD, THETA, VARIANTS, Policy, Ratio, Variant

from .oracle import ROWS
from .typed import log_discrepancy, split_ratio

ALL = {**VARIANTS, **EXPERIMENTAL_VARIANTS}
probability = st.floats(1e-9, 1.0)


def test_the_table_has_the_papers_rows_and_no_others():
    assert set(ALL) == set(ROWS)


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
@given(probs=st.fixed_dictionaries(dict.fromkeys(Policy, probability)))
def test_both_factors_are_the_quotients_of_the_papers_row(name, probs):
    logp = {policy: torch.tensor([p], dtype=torch.float64).log() for policy, p in probs.items()}
    discrepancy, proximal = ROWS[name]
    split = split_ratio(ALL[name], logp)
    r_d = 1.0 if discrepancy is None else probs[discrepancy[0]] / probs[discrepancy[1]]
    assert split.log_r_d.item() == pytest.approx(math.log(r_d), abs=1e-12)
    assert split.log_r_s.item() == pytest.approx(math.log(probs["theta"] / probs[proximal]), abs=1e-12)


@pytest.mark.parametrize("name", ROWS)
def test_gradient_reaches_theta_through_r_s_and_nothing_else(name):
    logp = {policy: torch.full((2,), -1.0 - k, requires_grad=True) for k, policy in enumerate(Policy)}
    split = split_ratio(ALL[name], logp)
    assert not split.log_r_d.requires_grad
    split.log_r_s.sum().backward()
    gradients = {policy: tensor.grad for policy, tensor in logp.items() if tensor.grad is not None}
    assert set(gradients) == {THETA}
    assert gradients[THETA].tolist() == [1.0, 1.0]


def test_r_d_of_one_is_exactly_zero_in_log_space_even_where_mu_is_not_finite():
    logp = {MU: torch.tensor([math.nan, -math.inf]), OLD: torch.tensor([-1.0, -2.0]), THETA: torch.tensor([-1.0, -2.0])}
    assert split_ratio(VARIANTS["ppo_clip"], logp).log_r_d.tolist() == [0.0, 0.0]


def test_pure_importance_weighting_without_a_clip_has_its_gradient_through_r_s():
    variant = Variant(r_d=THETA / MU, r_s=Ratio(numerator=THETA, denominator=THETA))
    theta = torch.tensor([-1.0], requires_grad=True)
    split = split_ratio(variant, {MU: torch.tensor([-1.5]), THETA: theta})
    split.log_r_s.sum().backward()
    assert (split.log_r_d.item(), split.log_r_s.item(), theta.grad.item()) == (0.5, 0.0, 1.0)


def test_log_discrepancy_needs_no_theta():
    logp = {MU: torch.tensor([-1.0]), OLD: torch.tensor([-0.75])}
    assert log_discrepancy(VARIANTS["decoupled_exact"], logp).item() == 0.25


@pytest.mark.parametrize(
    ("name", "given_policies", "named"),
    [
        ("decoupled_exact", (MU, THETA), "OLD"),
        ("decoupled_exact", (OLD, THETA), "MU"),
        ("ppo_clip", (MU, OLD), "THETA"),
        ("linear_prox", (MU, THETA), "LINEAR"),
        ("decoupled_async", (THETA,), "ASYNC"),
        ("ppo_clip", (), "THETA and OLD"),
    ],
)
def test_a_missing_log_prob_is_an_error_that_names_its_policy(name, given_policies, named):
    logp = {policy: torch.zeros(1) for policy in given_policies}
    with pytest.raises(MissingLogprobError, match=f"log-probs of {named} are missing"):
        split_ratio(VARIANTS[name], logp)


def test_another_policy_is_never_used_in_place_of_the_missing_one():
    with pytest.raises(MissingLogprobError, match="got: OLD, LINEAR"):
        log_discrepancy(VARIANTS["decoupled_async"], {OLD: torch.zeros(1), LINEAR: torch.zeros(1)})
