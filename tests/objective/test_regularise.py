"""The terms beside a surrogate: estimates of a divergence and their gradients, one token at a time in plain float64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oldlogits.core.errors import ConfigError

from .typed import kl_estimate, regularised

logp = st.floats(-20, 0)
ESTIMATORS = ("k1", "k2", "k3")


def by_hand(policy, reference, estimator):
    """Schulman's estimators of KL(q, p), q the policy that sampled, p the reference, r = p / q; and their slope in log q."""
    r = math.exp(reference) / math.exp(policy)
    return {
        "k1": (-math.log(r), 1.0),
        "k2": (math.log(r) ** 2 / 2, -math.log(r)),
        "k3": (r - 1 - math.log(r), 1 - r),
    }[estimator]


@pytest.mark.parametrize("estimator", ESTIMATORS)
@given(pairs=st.lists(st.tuples(logp, logp), min_size=1, max_size=8))
def test_estimates_and_their_slopes_are_the_formulas(estimator, pairs):
    policy, reference = (torch.tensor([pair[i] for pair in pairs], dtype=torch.float64) for i in (0, 1))
    policy.requires_grad_()
    found = kl_estimate(policy, reference, estimator)
    found.sum().backward()
    for value, slope, pair in zip(found.tolist(), policy.grad.tolist(), pairs, strict=True):
        assert (value, slope) == pytest.approx(by_hand(*pair, estimator), rel=1e-9, abs=1e-12)


def test_the_example_of_the_docstring():
    policy, reference = torch.tensor([0.5]).log(), torch.tensor([0.25]).log()
    found = [float(kl_estimate(policy, reference, name)) for name in ESTIMATORS]
    assert found == pytest.approx([0.693147, 0.240227, 0.193147], abs=1e-5)


@pytest.mark.parametrize(
    ("estimator", "value", "slope"),
    [("k1", "forward", "none"), ("k2", None, "forward"), ("k3", "forward", "backward")],
)
def test_on_average_over_the_policys_tokens_values_and_gradients_are_those_of_the_divergences(estimator, value, slope):
    """Exact expectations over a small vocabulary: forward is KL(policy || reference), backward KL(reference || policy)."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(7, generator=g, dtype=torch.float64, requires_grad=True)
    reference = torch.log_softmax(torch.randn(7, generator=g, dtype=torch.float64), 0)
    policy = torch.log_softmax(logits, 0)
    weight = policy.detach().exp()
    mean = (weight * kl_estimate(policy, reference, estimator)).sum()
    [found] = torch.autograd.grad(mean, logits, retain_graph=True)
    exact = {
        "forward": (policy.exp() * (policy - reference)).sum(),
        "backward": (reference.exp() * (reference - policy)).sum(),
        "none": 0 * policy.sum(),
    }
    [expected] = torch.autograd.grad(exact[slope], logits, retain_graph=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    if value is not None:
        torch.testing.assert_close(mean, exact[value])


def test_k1_in_the_reward_and_k2_in_the_loss_have_the_same_gradient():
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(7, generator=g, dtype=torch.float64, requires_grad=True)
    reference = torch.log_softmax(torch.randn(7, generator=g, dtype=torch.float64), 0)
    policy = torch.log_softmax(logits, 0)
    weight, reward = policy.detach().exp(), -(policy.detach() - reference)
    [of_reward] = torch.autograd.grad((weight * reward * policy).sum(), logits, retain_graph=True)
    [of_loss] = torch.autograd.grad((weight * kl_estimate(policy, reference, "k2")).sum(), logits)
    torch.testing.assert_close(of_loss, -of_reward, rtol=0, atol=1e-12)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_policy_that_is_its_reference_has_no_divergence_and_only_k1_a_slope(estimator):
    policy = torch.tensor([-0.5, -3.0, 0.0], requires_grad=True)
    found = kl_estimate(policy, policy.detach().clone(), estimator)
    found.sum().backward()
    assert found.tolist() == [0.0] * 3
    assert policy.grad.tolist() == [float(estimator == "k1")] * 3


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("values", [(math.nan, -1.0), (-1.0, math.nan), (-math.inf, -1.0), (-1.0, -math.inf), (-200.0, -1.0)])
def test_a_token_without_a_finite_estimate_has_none_and_no_gradient(estimator, values):
    policy = torch.tensor([values[0], -1.0], requires_grad=True)
    found = kl_estimate(policy, torch.tensor([values[1], -2.0]), estimator)
    found.sum().backward()
    assert found[0].item() == 0.0
    assert policy.grad[0].item() == 0.0
    assert found[1].item() > 0


def test_an_unknown_estimator_is_refused():
    with pytest.raises(ConfigError, match="k4"):
        kl_estimate.__wrapped__(torch.zeros(1), torch.zeros(1), "k4")


def test_terms_are_added_with_their_weights_and_nothing_where_there_is_none():
    values, kl, entropy = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 0.0]), torch.tensor([3.0, math.nan])
    found = regularised(values, kl=kl, kl_coefficient=0.1, entropy=entropy, entropy_bonus=0.01)
    assert found.tolist() == pytest.approx([2 - 0.05 + 0.03, -1.0])
    assert regularised(values) is values


def test_an_entropy_that_is_not_finite_gets_no_gradient():
    entropy = torch.tensor([1.0, math.nan, math.inf], requires_grad=True)
    regularised(torch.zeros(3), entropy=entropy, entropy_bonus=0.5).sum().backward()
    assert entropy.grad.tolist() == [0.5, 0.0, 0.0]
