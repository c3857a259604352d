import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oldlogits.core.errors import ConfigError

from .oracle import interpolate
from .typed import a3po_weight_mu, linear_logp, loglinear_logp

BOTH = {"linear": linear_logp, "loglinear": loglinear_logp}
INF, NAN = math.inf, math.nan
logps = st.floats(-30.0, 0.0)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("kind", BOTH)
@given(mu=logps, theta=logps, weight=st.floats(0.0, 1.0))
def test_interpolations_equal_their_formulas_in_probability_space(kind, mu, theta, weight):
    expected = math.log(interpolate(math.exp(mu), math.exp(theta), weight)[kind])
    assert BOTH[kind](tensor(mu), tensor(theta), weight).item() == pytest.approx(expected, abs=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("kind", BOTH)
@given(mu=logps, theta=logps, weight=st.floats(0.0, 1.0))
def test_an_interpolation_lies_between_its_ends_and_the_linear_one_is_never_below_the_log_linear(kind, mu, theta, weight):
    value = BOTH[kind](tensor(mu), tensor(theta), weight).item()
    assert min(mu, theta) - 1e-12 <= value <= max(mu, theta) + 1e-12
    assert (
        linear_logp(tensor(mu), tensor(theta), weight).item()
        >= loglinear_logp(tensor(mu), tensor(theta), weight).item() - 1e-12
    )


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weight_one_is_exactly_mu_and_weight_zero_exactly_theta_even_at_probability_zero(kind, dtype):
    mu = torch.tensor([-0.1, -INF, -2.0, -INF, -50.0], dtype=dtype)
    theta = torch.tensor([-3.7, -1.0, -INF, -INF, -1e-3], dtype=dtype)
    for one, zero in ((1.0, 0.0), (torch.ones(5, dtype=dtype), torch.zeros(5, dtype=dtype))):
        assert torch.equal(BOTH[kind](mu, theta, one), mu)
        assert torch.equal(BOTH[kind](mu, theta, zero), theta)


def test_between_the_edges_probability_zero_halves_the_linear_mean_and_annuls_the_log_linear_one():
    mu, theta = tensor(-INF, -INF), tensor(-1.0, -INF)
    assert linear_logp(mu, theta, 0.5).tolist() == pytest.approx([math.log(0.5) - 1.0, -INF])
    assert loglinear_logp(mu, theta, 0.5).tolist() == [-INF, -INF]


@pytest.mark.parametrize("kind", BOTH)
def test_a_weight_per_token_equals_a_weight_per_call(kind):
    mu, theta, weights = tensor(-1.0, -2.0, -3.0), tensor(-2.0, -0.5, -3.5), tensor(0.0, 0.3, 1.0)
    together = BOTH[kind](mu, theta, weights)
    apart = [BOTH[kind](mu[i : i + 1], theta[i : i + 1], weights[i].item()).item() for i in range(3)]
    assert together.tolist() == pytest.approx(apart, abs=1e-15)


@pytest.mark.parametrize("kind", BOTH)
def test_proximal_policies_are_detached(kind):
    mu, theta = tensor(-1.0).requires_grad_(), tensor(-2.0).requires_grad_()
    assert not BOTH[kind](mu, theta, tensor(0.5).requires_grad_()).requires_grad


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("weight", [-0.01, 1.01, NAN])
def test_a_number_outside_the_unit_interval_is_refused_and_a_token_outside_it_is_nan(kind, weight):
    with pytest.raises(ConfigError, match="weight_mu is not a weight"):
        BOTH[kind](tensor(-1.0), tensor(-2.0), weight)
    assert math.isnan(BOTH[kind](tensor(-1.0), tensor(-2.0), tensor(weight)).item())


@given(behave=st.integers(0, 9), lag=st.integers(0, 9), mu=logps, theta=logps)
def test_loglinear_is_a3pos_policy_with_its_coefficient_on_the_other_side(behave, lag, mu, theta):
    current = behave + lag
    on_theta = 0.0 if lag == 0 else min(max((current - 1 - behave) / (current - behave), 0.0), 1.0)
    expected = mu + on_theta * (theta - mu)
    assert loglinear_logp(tensor(mu), tensor(theta), 1 - on_theta).item() == pytest.approx(expected, abs=1e-12)


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=8))
def test_a3pos_weight_is_its_formula_read_from_the_side_of_mu(versions):
    """A-3PO: log prox = log mu + alpha (log theta - log mu), alpha = clip((v - 1 - v_b) / (v - v_b), 0, 1), 0 at v = v_b."""
    on_mu = []
    for behaviour, staleness in versions:
        now = behaviour + staleness
        alpha = min(max((now - 1 - behaviour) / (now - behaviour), 0.0), 1.0) if staleness else 0.0
        on_mu.append(1 - alpha)
    found = a3po_weight_mu(torch.tensor([staleness for _, staleness in versions]))
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx(on_mu, abs=1e-7)


@given(mu=logps, theta=logps, staleness=st.integers(0, 20))
def test_with_a3pos_weight_the_loglinear_proximal_policy_is_a3pos(mu, theta, staleness):
    alpha = max(staleness - 1, 0) / max(staleness, 1)
    found = loglinear_logp(tensor(mu), tensor(theta), a3po_weight_mu(torch.tensor([staleness])))
    assert found.item() == pytest.approx(mu + alpha * (theta - mu), abs=1e-5)
