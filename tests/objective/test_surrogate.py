import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oldlogits.core.errors import ConfigError
from oldlogits.core.policies import AGED, ASYNC, BALANCE, EWMA, EXPERIMENTAL_VARIANTS, MU, OLD, RESCORE, THETA, VARIANTS, Policy
from oldlogits.objective import SplitRatio

from .oracle import ROWS, Objective, interpolate, token
from .typed import linear_logp, loglinear_logp, split_ratio, surrogate

ALL = {**VARIANTS, **EXPERIMENTAL_VARIANTS}
INF, NAN = math.inf, math.nan
KNOBS = dataclasses.asdict(Objective())

near = st.floats(-1.5, 1.5)  # log-ratios that meet every bound
a_token = st.tuples(st.floats(-8, -2), near, near, near, near, st.sampled_from([-2.0, -1.0, -1e-3, 0.0, 1e-3, 1.0, 2.0]))
knobs = st.builds(
    Objective,
    band=st.one_of(st.floats(1.05, 3), st.just(INF)),
    eps_low=st.floats(0.01, 1.2),
    eps_high=st.floats(0.01, 1),
    dual_clip=st.one_of(st.none(), st.floats(1.1, 4)),
    discrepancy=st.sampled_from(["weight_and_mask", "mask"]),
    truncation=st.one_of(st.none(), st.floats(1.01, 4), st.just(INF)),
)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def of_ratios(log_r_d, log_r_s, advantages, **overrides):
    """Surrogate and its gradient, straight from log-ratios; every token is a loss token."""
    x = log_r_s.clone().requires_grad_()
    split = SplitRatio(log_r_d=log_r_d, log_r_s=x)
    tokens = surrogate(split, advantages, torch.ones_like(x, dtype=torch.bool), **{**KNOBS, **overrides})
    (gradient,) = torch.autograd.grad(tokens.values.sum(), x)
    return tokens, gradient


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
@given(tokens=st.lists(a_token, min_size=1, max_size=8), weight_mu=st.floats(0, 1), objective=knobs)
@settings(max_examples=60)
def test_every_variant_equals_the_scalar_oracle_in_value_gradient_and_masks(name, tokens, weight_mu, objective):
    probs, advantages = [], []
    for log_mu, old, asynchronous, ewma, theta, advantage in tokens:
        logs = {
            "mu": log_mu,
            "old": log_mu + old,
            "async": log_mu + asynchronous,
            "ewma": log_mu + ewma,
            "aged": log_mu + 2 * ewma - asynchronous,
            "rescore": log_mu + old - asynchronous,
            "balance": log_mu + (old + ewma) / 2,
            "theta": log_mu + theta,
        }
        prob = {policy: math.exp(value) for policy, value in logs.items()}
        probs.append(prob | interpolate(prob["mu"], prob["theta"], weight_mu))
        advantages.append(advantage)
    expected = [token(name, prob, a, objective) for prob, a in zip(probs, advantages, strict=True)]

    given = (MU, OLD, ASYNC, EWMA, AGED, RESCORE, BALANCE)
    logp = {policy: tensor(*(prob[policy] for prob in probs)).log() for policy in given}
    theta = tensor(*(prob["theta"] for prob in probs)).log().requires_grad_()
    logp[THETA] = theta
    logp[Policy.LINEAR] = linear_logp(logp[MU], theta, weight_mu)
    logp[Policy.LOGLINEAR] = loglinear_logp(logp[MU], theta, weight_mu)
    loss_mask = torch.ones(len(tokens), dtype=torch.bool)
    actual = surrogate(split_ratio(ALL[name], logp), tensor(*advantages), loss_mask, **dataclasses.asdict(objective))
    (gradient,) = torch.autograd.grad(actual.values.sum(), theta)

    for i, want in enumerate(expected):
        if want.margin < 1e-9:
            continue
        assert actual.band_mask[i].item() == want.band
        assert actual.clip_mask[i].item() == want.clip
        assert actual.active_mask[i].item() == want.active
        assert actual.values[i].item() == pytest.approx(want.value, rel=1e-10, abs=1e-12)
        assert gradient[i].item() == pytest.approx(want.gradient, rel=1e-10, abs=1e-12)


@pytest.mark.slow
@given(tokens=st.lists(a_token, min_size=1, max_size=8), objective=knobs)
def test_identity_a_kept_tokens_gradient_is_the_total_ratio_whatever_the_proximal_policy(tokens, objective):
    """The proximal policy acts through the active set only: given that set, the three gradients are one formula."""
    objective = dataclasses.replace(objective, discrepancy="weight_and_mask", truncation=None)
    log_mu, old, asynchronous, ewma, log_total, advantages = (tensor(*column) for column in zip(*tokens, strict=True))
    logp = {MU: log_mu, OLD: log_mu + old, ASYNC: log_mu + asynchronous, EWMA: log_mu + ewma}
    total_gradient = advantages * log_total.exp()
    for name in ("decoupled_exact", "decoupled_async", "ppo_ewma_train_infer"):
        theta = (log_mu + log_total).requires_grad_()
        split = split_ratio(VARIANTS[name], {**logp, THETA: theta})
        loss_mask = torch.ones(len(tokens), dtype=torch.bool)
        actual = surrogate(split, advantages, loss_mask, **dataclasses.asdict(objective))
        (gradient,) = torch.autograd.grad(actual.values.sum(), theta)
        torch.testing.assert_close(gradient, torch.where(actual.active_mask, total_gradient, 0.0), rtol=1e-12, atol=1e-14)


def test_without_the_weight_the_gradient_depends_on_the_proximal_policy():
    theta, proximals = tensor(-1.0), (tensor(-1.1), tensor(-0.9))
    gradients = []
    for proximal in proximals:
        _, gradient = of_ratios(tensor(0.0), theta - proximal, tensor(1.0), discrepancy="mask")
        gradients.append(gradient.item())
    assert gradients == pytest.approx([math.exp(0.1), math.exp(-0.1)])


def test_under_a_truncation_the_gradient_of_an_active_token_depends_on_the_proximal_policy():
    """R = 2.4 as 1.2 * 2 and as 1.4 * 1.714, c = 1.5: the gradient is r_d c, not R."""
    r_d = tensor(1.2, 1.4)
    tokens, gradient = of_ratios(r_d.log(), (2.4 / r_d).log(), tensor(1.0, 1.0), truncation=1.5)
    assert tokens.active_mask.all()
    assert gradient.tolist() == pytest.approx([1.2 * 1.5, 1.4 * 1.5])


def test_the_documented_example_holds():
    ratios = tensor(1.1, 1.1).log(), tensor(1.2, 1.4).log(), tensor(2.0, 2.0)
    tokens, gradient = of_ratios(*ratios)
    assert tokens.values.tolist() == pytest.approx([2.64, 2.816])
    assert gradient.tolist() == pytest.approx([2.64, 0.0])
    tokens, gradient = of_ratios(*ratios, truncation=1.3)
    assert tokens.values.tolist() == pytest.approx([2.64, 3.072], abs=1e-3)
    assert gradient.tolist() == pytest.approx([2.64, 2.86])


@given(
    log_ratios=st.lists(st.floats(-20, 20), min_size=1, max_size=8),
    advantage=st.sampled_from([-2.0, -1e-3, 1e-3, 1.0]),
    cap=st.one_of(st.floats(1.01, 10), st.just(INF)),
)
@pytest.mark.slow
def test_truncated_importance_sampling_weighs_by_the_total_ratio_up_to_the_cap_and_masks_no_token(log_ratios, advantage, cap):
    logp = {MU: tensor(*log_ratios) * 0 - 30, THETA: (tensor(*log_ratios) - 30).requires_grad_()}
    advantages = torch.full_like(logp[MU], advantage)
    loss_mask = torch.ones(len(log_ratios), dtype=torch.bool)
    split = split_ratio(VARIANTS["ppo_clip_train_infer"], logp)
    tokens = surrogate(split, advantages, loss_mask, **{**KNOBS, "band": 1.01, "truncation": cap})
    (gradient,) = torch.autograd.grad(tokens.values.sum(), logp[THETA])
    assert tokens.clip_mask.all()
    assert tokens.active_mask.all()
    expected = [min(math.exp(ratio), cap) * advantage for ratio in log_ratios]
    assert gradient.tolist() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sign", [1.0, -1.0, 0.0])
def test_at_the_truncation_value_and_gradient_go_on_without_a_step(dtype, sign):
    at = torch.tensor([math.log(2.0)], dtype=dtype)
    beyond, far = torch.nextafter(at, torch.full_like(at, INF)), at + 1
    values, gradients = [], []
    for log_r_s in (at, beyond, far):
        tokens, gradient = of_ratios(torch.zeros_like(at), log_r_s, torch.full_like(at, sign), truncation=2.0)
        values.append(tokens.values.item())
        gradients.append(gradient.item())
        assert tokens.active_mask.item()
    assert gradients == pytest.approx([2 * sign] * 3)
    assert values == pytest.approx([2 * sign, 2 * sign, 4 * sign])


def test_a_token_outside_the_band_is_masked_under_a_truncation_too():
    tokens, gradient = of_ratios(tensor(1.6, 1.4).log(), tensor(9.0, 9.0).log(), tensor(1.0, 1.0), truncation=2.0)
    assert tokens.band_mask.tolist() == tokens.active_mask.tolist() == [False, True]
    assert tokens.clip_mask.tolist() == [True, True]
    assert tokens.values.tolist() == pytest.approx([0.0, 1.4 * 2 * (1 + math.log(4.5))])
    assert gradient.tolist() == pytest.approx([0.0, 2.8])


@pytest.mark.parametrize("truncation", [1.0, 0.5, -1.0, NAN])
def test_a_truncation_that_would_scale_every_token_down_is_refused(truncation):
    with pytest.raises(ConfigError, match="truncation must be above 1"):
        of_ratios(tensor(0.0), tensor(0.0), tensor(1.0), truncation=truncation)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_at_a_bound_the_gradient_is_whole_and_beyond_it_zero(dtype):
    low, high, dual, band = (torch.tensor([math.log(x)], dtype=dtype) for x in (0.8, 1.28, 3.0, 1.5))
    cases = [(0 * band, high, 1.0, (0, INF)), (0 * band, low, -1.0, (0, -INF)), (0 * band, dual, -1.0, (0, INF))]
    cases += [(band, 0 * high, 1.0, (INF, 0)), (-band, 0 * high, -1.0, (-INF, 0))]
    for log_r_d, log_r_s, sign, (d, s) in cases:
        advantage = torch.full((1,), 2.0 * sign, dtype=dtype)
        tokens, gradient = of_ratios(log_r_d, log_r_s, advantage)
        assert tokens.active_mask.item()
        torch.testing.assert_close(gradient, advantage * (log_r_d + log_r_s).exp())
        beyond_d = torch.nextafter(log_r_d, torch.full_like(log_r_d, d)) if d else log_r_d
        beyond_s = torch.nextafter(log_r_s, torch.full_like(log_r_s, s)) if s else log_r_s
        tokens, gradient = of_ratios(beyond_d, beyond_s, advantage)
        assert not tokens.active_mask.item()
        assert gradient.item() == 0.0
        assert (tokens.values.item() == 0.0) == bool(d)  # outside the band the value is 0, clipped it is not


def test_zero_advantage_is_active_and_contributes_nothing_even_where_the_ratio_overflows():
    tokens, gradient = of_ratios(tensor(0.0, 0.0), tensor(0.3, 5000.0), tensor(0.0, -0.0), band=INF)
    assert tokens.active_mask.all()
    assert tokens.values.tolist() == [0.0, 0.0]
    assert gradient.tolist() == [0.0, 0.0]


def test_the_gradient_is_non_zero_exactly_on_active_tokens_with_an_advantage():
    torch.manual_seed(0)
    log_r_d, log_r_s, advantages = torch.randn(400) * 0.3, torch.randn(400) * 0.5, torch.randn(400).round()
    tokens, gradient = of_ratios(log_r_d, log_r_s, advantages)
    assert torch.equal(gradient != 0, tokens.active_mask & (advantages != 0))
    assert 50 < tokens.active_mask.sum() < 350


def test_a_huge_ratio_out_of_the_band_or_out_of_the_loss_leaves_no_nan():
    theta = torch.tensor([900.0, 900.0, -0.1, -900.0], requires_grad=True)
    split = split_ratio(VARIANTS["decoupled_exact"], {MU: torch.tensor([-500.0, 0, 0, 0]), OLD: torch.zeros(4), THETA: theta})
    loss_mask = torch.tensor([True, False, True, True])
    tokens = surrogate(split, torch.tensor([1.0, -1.0, 1.0, 1.0]), loss_mask, **{**KNOBS, "dual_clip": None})
    tokens.values.sum().backward()
    assert tokens.band_mask.tolist() == [False, True, True, True]
    assert tokens.values.tolist() == pytest.approx([0.0, 0.0, math.exp(-0.1), 0.0])
    assert theta.grad.tolist() == pytest.approx([0.0, 0.0, math.exp(-0.1), 0.0])


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("where", ["mu", "old", "theta", "advantage", "mu and old"])
@pytest.mark.parametrize("band", [1.5, INF])
def test_a_non_finite_input_drops_its_token_from_all_masks_and_leaves_the_others_alone(bad, where, band):
    logp = {policy: torch.tensor([-1.0, -1.0, -1.0]) for policy in (MU, OLD, THETA)}
    advantages = torch.tensor([2.0, 2.0, 2.0])
    for name in where.split(" and "):
        target = advantages if name == "advantage" else logp[Policy(name)]
        target[:2] = bad
    logp[THETA].requires_grad_()
    loss_mask = torch.tensor([True, False, True])
    tokens = surrogate(split_ratio(VARIANTS["decoupled_exact"], logp), advantages, loss_mask, **{**KNOBS, "band": band})
    tokens.values.sum().backward()
    for mask in (tokens.band_mask, tokens.clip_mask, tokens.active_mask):
        assert mask.tolist() == [False, False, True]
    assert tokens.values.tolist() == [0.0, 0.0, 2.0]
    assert logp[THETA].grad.tolist() == [0.0, 0.0, 2.0]


def test_context_tokens_have_neither_a_value_nor_a_gradient():
    log_r_s = torch.tensor([0.0, NAN], requires_grad=True)
    split = SplitRatio(log_r_d=torch.tensor([0.0, NAN]), log_r_s=log_r_s)
    tokens = surrogate(split, torch.ones(2), torch.zeros(2, dtype=torch.bool), **KNOBS)
    tokens.values.sum().backward()
    assert tokens.values.tolist() == log_r_s.grad.tolist() == [0.0, 0.0]


def test_an_empty_batch_has_an_empty_surrogate():
    empty = torch.zeros(0)
    tokens = surrogate(SplitRatio(log_r_d=empty, log_r_s=empty), empty, empty.bool(), **KNOBS)
    assert tokens.values.shape == (0,)


@pytest.mark.parametrize("truncation", [None, 1.3, INF])
@pytest.mark.parametrize("discrepancy", ["weight_and_mask", "mask"])
def test_gradcheck_agrees_away_from_the_bounds(discrepancy, truncation):
    """Numerical differentiation of the value: it knows nothing of the closed form."""
    torch.manual_seed(0)
    ratios = tensor(0.7, 0.9, 1.0, 1.1, 1.5, 2.5, 4.0, 1.2)  # 4.0 is beyond the dual clip, 0.7 and 1.5 beyond the clip
    log_r_d, loss_mask = torch.linspace(-0.5, 0.3, 8, dtype=torch.float64), torch.arange(8) != 7
    chosen = KNOBS | {"discrepancy": discrepancy, "truncation": truncation}
    for sign in (1.0, -1.0):
        advantages = sign * torch.linspace(0.5, 2.0, 8, dtype=torch.float64)

        def values(x, advantages=advantages):
            split = SplitRatio(log_r_d=log_r_d, log_r_s=x)
            return surrogate(split, advantages, loss_mask, **chosen).values

        assert torch.autograd.gradcheck(values, ratios.log().requires_grad_(), atol=1e-7)


def test_float32_agrees_with_float64():
    torch.manual_seed(0)
    inputs = [torch.randn(500, dtype=torch.float64) * scale for scale in (0.2, 0.3, 1.0)]
    (double, double_gradient), (single, single_gradient) = of_ratios(*inputs), of_ratios(*(x.float() for x in inputs))
    assert single.values.dtype is torch.float32
    assert torch.equal(double.active_mask, single.active_mask)
    torch.testing.assert_close(single.values.double(), double.values, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(single_gradient.double(), double_gradient, rtol=1e-6, atol=1e-7)


def test_an_unknown_discrepancy_is_refused():
    from oldlogits.objective import surrogate as unchecked

    split = SplitRatio(log_r_d=torch.zeros(1), log_r_s=torch.zeros(1))
    with pytest.raises(ConfigError, match="unknown discrepancy"):
        unchecked(split, torch.zeros(1), torch.ones(1, dtype=torch.bool), **{**KNOBS, "discrepancy": "weight"})
