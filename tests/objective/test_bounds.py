import dataclasses
import itertools
import math
import random

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from oldlogits.config import bounds as config_bounds
from oldlogits.config.bounds import EffectiveBounds
from oldlogits.core.policies import EXPERIMENTAL_VARIANTS, MU, THETA, VARIANTS, Policy
from oldlogits.objective import linear_logp, loglinear_logp, split_ratio, surrogate

from . import oracle
from .tensor_bounds import active as unchecked_active
from .typed import checked

active = checked(unchecked_active)
INF, NAN = math.inf, math.nan
KINDS = ("linear", "loglinear")
MASKED, UNMASKED = "train_infer", "prox"
COMMON = {"weight_mu": 0.5, "band": 1.05, "eps_low": 0.2, "eps_high": 0.28, "dual_clip": 3.0}


def effective_bounds(kind, *, dual_clip, **knobs):
    """Bounds with None for no dual clip, as the objective takes it."""
    return config_bounds.effective_bounds(kind, dual_clip=INF if dual_clip is None else dual_clip, **knobs)


def bounds_of(kind, **overrides):
    return dataclasses.astuple(effective_bounds(kind, **{**COMMON, **overrides}))


def full_objective(kind, row, log_total, advantages, *, weight_mu, discrepancy="weight_and_mask", **knobs):
    """The surrogate of a variant from log-probs, and its gradient with respect to log theta."""
    log_mu = torch.full_like(log_total, -1.7)
    theta = (log_mu + log_total).requires_grad_()
    logp = {
        MU: log_mu,
        THETA: theta,
        Policy.LINEAR: linear_logp(log_mu, theta, weight_mu),
        Policy.LOGLINEAR: loglinear_logp(log_mu, theta, weight_mu),
    }
    variant = {**VARIANTS, **EXPERIMENTAL_VARIANTS}[f"{kind}_{row}"]
    loss_mask = torch.ones_like(log_total, dtype=torch.bool)
    tokens = surrogate(split_ratio(variant, logp), advantages, loss_mask, discrepancy=discrepancy, **knobs)
    (gradient,) = torch.autograd.grad(tokens.values.sum(), theta)
    return tokens, gradient


def effective(kind, row, knobs):
    """The bounds of a row: without `r_d` there is no band."""
    return effective_bounds(kind, **(knobs if row == MASKED else {**knobs, "band": INF}))


def all_settings(num_random=120):
    draw = random.Random(0)
    edges = itertools.product(
        (0.0, 0.2, 0.5, 1 / 1.28, 1.0),  # at 0.2, 1 / (1 - a) is a clip bound of 1.25; at 1 / 1.28, 1/c below
        (1.05, 1.28, INF),
        ((0.0, 0.0), (0.2, 0.25), (1.0, 0.28), (1.5, 3.0)),
        (None, 1.25, 3.0),
    )
    for weight_mu, band, (eps_low, eps_high), dual_clip in edges:
        yield {"weight_mu": weight_mu, "band": band, "eps_low": eps_low, "eps_high": eps_high, "dual_clip": dual_clip}
    for _ in range(num_random):
        yield {
            "weight_mu": draw.choice((draw.random(), 10 ** draw.uniform(-6, -1), 1 - 10 ** draw.uniform(-6, -1))),
            "band": 1 + 10 ** draw.uniform(-4, 2),
            "eps_low": 10 ** draw.uniform(-4, 0.2),
            "eps_high": 10 ** draw.uniform(-4, 1),
            "dual_clip": draw.choice((None, 1 + 10 ** draw.uniform(-3, 2))),
        }


def ratios_for(bounds, generator):
    """log R: common, extreme, exactly 1, and just beside each bound."""
    common = 4 * torch.rand(60, generator=generator, dtype=torch.float64) - 2
    extreme = 50 * torch.rand(20, generator=generator, dtype=torch.float64) - 25
    at = [math.log(bound) for bound in dataclasses.astuple(bounds) if 1e-4 < bound < 1e4]
    beside = [log + side * gap for log in at for side in (-1, 1) for gap in (1e-8, 1e-5, 1e-2)]
    return torch.cat([common, extreme, torch.tensor([0.0, -25.0, 25.0, *beside], dtype=torch.float64)])


@pytest.mark.slow
def test_no_tokens_active_state_differs_from_the_full_objectives():
    generator = torch.Generator().manual_seed(0)
    num_checks = num_active = num_beside = 0
    for knobs, kind, row in itertools.product(all_settings(), KINDS, (MASKED, UNMASKED)):
        bounds = effective(kind, row, knobs)
        log_total = ratios_for(bounds, generator).repeat(3)
        advantages = torch.tensor([1.5, -0.5, 0.0], dtype=torch.float64).repeat_interleave(len(log_total) // 3)
        tokens, _ = full_objective(kind, row, log_total, advantages, **knobs)
        at = [math.log(bound) for bound in dataclasses.astuple(bounds) if 0 < bound < INF]
        distance = (log_total[:, None] - torch.tensor([*at, INF], dtype=torch.float64)).abs().amin(dim=1)
        decided = distance.expm1() >= 1e-9
        differs = decided & (active(log_total, advantages, bounds) != tokens.active_mask)
        assert not differs.any(), (kind, row, knobs, log_total[differs], advantages[differs])
        num_checks += int(decided.sum())
        num_active += int(tokens.active_mask[decided].sum())
        num_beside += int((decided & (distance < 1e-7)).sum())
    assert num_checks >= 200_000
    assert 0.2 < num_active / num_checks < 0.8
    assert num_beside >= 15_000  # within 1e-7 of a bound


def test_the_gradient_weight_is_the_total_ratio_where_r_d_is_a_weight_and_is_not_where_r_d_is_one():
    log_total = torch.linspace(-0.3, 0.3, 41, dtype=torch.float64)
    advantages = torch.tensor([2.0, -2.0], dtype=torch.float64).repeat(21)[:41]
    knobs = {**COMMON, "band": 1.5}
    for kind in KINDS:
        masked, weighted = full_objective(kind, MASKED, log_total, advantages, **knobs)
        unmasked, unweighted = full_objective(kind, UNMASKED, log_total, advantages, **knobs)
        assert torch.equal(masked.active_mask, unmasked.active_mask)  # at these ratios neither bound is met ...
        assert masked.active_mask.all()
        torch.testing.assert_close(weighted, advantages * log_total.exp(), rtol=1e-13, atol=0)
        proximal = oracle.interpolate(1.0, log_total.exp(), 0.5)[kind]  # X / mu
        torch.testing.assert_close(unweighted * proximal, weighted, rtol=1e-13, atol=0)
        away = log_total.abs() > 0.05  # ... and yet the gradients differ, by the factor r_d
        assert ((unweighted / weighted - 1).abs()[away] > 0.02).all()


def test_without_the_weight_the_train_infer_rows_keep_their_active_set_and_lose_the_total_ratio():
    log_total = torch.linspace(-1.5, 1.5, 61, dtype=torch.float64)
    advantages = torch.ones_like(log_total)
    for kind in KINDS:
        tokens, gradient = full_objective(kind, MASKED, log_total, advantages, discrepancy="mask", **{**COMMON, "band": 1.5})
        kept = active(log_total, advantages, effective_bounds(kind, **{**COMMON, "band": 1.5}))
        assert torch.equal(tokens.active_mask, kept)
        proximal = oracle.interpolate(1.0, log_total.exp(), 0.5)[kind]
        torch.testing.assert_close(gradient, torch.where(kept, log_total.exp() / proximal, 0.0))


CLIPS = {"band", "eps_low", "eps_high", "dual_clip"}
ratios = st.floats(-6, 6).map(math.exp)
knobs_strategy = st.builds(
    oracle.Objective,
    band=st.floats(1.01, 3),
    eps_low=st.floats(0.01, 1.2),
    eps_high=st.floats(0.01, 1),
    dual_clip=st.one_of(st.none(), st.floats(1.1, 4)),
)


@pytest.mark.slow
@given(
    total=ratios,
    kind=st.sampled_from(KINDS),
    row=st.sampled_from((MASKED, UNMASKED)),
    weight_mu=st.floats(0, 1),
    knobs=knobs_strategy,
    advantage=st.sampled_from((1.0, -1.0, 0.0)),
)
@settings(max_examples=400)
def test_the_bounds_agree_with_the_scalar_oracle_of_the_variant(total, kind, row, weight_mu, knobs, advantage):
    prob = {"mu": 0.1, "theta": 0.1 * total}
    want = oracle.token(f"{kind}_{row}", prob | oracle.interpolate(0.1, 0.1 * total, weight_mu), advantage, knobs)
    assume(want.margin > 1e-9)
    chosen = {name: value for name, value in dataclasses.asdict(knobs).items() if name in CLIPS}
    bounds = effective(kind, row, {**chosen, "weight_mu": weight_mu})
    got = active(torch.tensor([total], dtype=torch.float64).log(), torch.tensor([advantage], dtype=torch.float64), bounds)
    assert got.item() == want.active


@given(kind=st.sampled_from(KINDS), weight_mu=st.floats(0.05, 0.95), knobs=knobs_strategy)
def test_at_each_finite_bound_its_factor_meets_the_bound_of_the_objective(kind, weight_mu, knobs):
    chosen = {name: value for name, value in dataclasses.asdict(knobs).items() if name in CLIPS}
    bounds = effective_bounds(kind, weight_mu=weight_mu, **chosen)

    def factors(total):
        proximal = oracle.interpolate(1.0, total, weight_mu)[kind]
        return proximal, total / proximal

    met = {
        "mask_low": (0, 1 / knobs.band),
        "mask_high": (0, knobs.band),
        "positive_high": (1, 1 + knobs.eps_high),
        "negative_low": (1, 1 - knobs.eps_low),
        "negative_high": (1, knobs.dual_clip),
    }
    for name, (factor, bound) in met.items():
        total = getattr(bounds, name)
        if 0 < total < 1e5:  # beyond, r_s of the linear kind is within rounding of its supremum
            assert factors(total)[factor] == pytest.approx(bound, rel=1e-9)


def test_the_closed_forms_by_hand():
    # a = 1/2: mask (1/c - 1/2) * 2 and (c - 1/2) * 2; 1.28 * .5 / (1 - 1.28 * .5); .8 * .5 / (1 - .8 * .5); 3 * .5 >= 1
    assert bounds_of("linear") == pytest.approx((2 / 1.05 - 1, 1.1, 0.64 / 0.36, 0.4 / 0.6, INF))
    # a = 1/2: every bound squared
    assert bounds_of("loglinear") == pytest.approx((1.05**-2, 1.05**2, 1.28**2, 0.8**2, 9.0))
    # a = 4/5: mask (2/3 - 4/5) * 5 < 0 and (3/2 - 4/5) * 5; 1.28 * .8 / (1 - 1.28 * .2); .64 / .84; 2.4 / (1 - .6)
    assert bounds_of("linear", weight_mu=0.8, band=1.5) == pytest.approx((0, 3.5, 1.024 / 0.744, 0.64 / 0.84, 6.0))
    # a = 1/4: 1/a = 4, 1/(1 - a) = 4/3
    expected = (1.5 ** (-4 / 3), 1.5 ** (4 / 3), 1.28**4, 0.8**4, 81.0)
    assert bounds_of("loglinear", weight_mu=0.25, band=1.5) == pytest.approx(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_weight_one_leaves_no_mask_and_the_clip_of_the_objective_on_the_total_ratio(kind):
    assert bounds_of(kind, weight_mu=1.0) == pytest.approx((0.0, INF, 1.28, 0.8, 3.0))


@pytest.mark.parametrize("kind", KINDS)
def test_weight_zero_leaves_the_band_on_the_total_ratio_and_no_clip(kind):
    assert bounds_of(kind, weight_mu=0.0) == pytest.approx((1 / 1.05, 1.05, INF, 0.0, INF))
    assert bounds_of(kind, weight_mu=0.0, eps_low=0.0, eps_high=0.0)[2:] == (INF, 0.0, INF)


@pytest.mark.parametrize("kind", KINDS)
def test_no_band_no_lower_clip_and_no_dual_clip_leave_no_bound_of_theirs(kind):
    assert bounds_of(kind, band=INF)[:2] == (0.0, INF)
    for eps_low in (1.0, 1.5):
        assert bounds_of(kind, eps_low=eps_low)[3] == 0.0
    assert bounds_of(kind, dual_clip=None)[4] == bounds_of(kind, dual_clip=INF)[4] == INF
    assert bounds_of(kind, eps_high=INF)[2] == INF


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weight_mu", [0.1, 0.3, 0.7])
def test_a_clip_of_width_zero_is_a_bound_of_exactly_one(kind, weight_mu):
    assert bounds_of(kind, weight_mu=weight_mu, eps_low=0.0, eps_high=0.0)[2:4] == (1.0, 1.0)


def test_a_linear_proximal_policy_is_never_clipped_where_r_s_cannot_reach_the_bound():
    """r_s < 1 / (1 - a): at a = .2 a bound of 1.25 is out of reach, one of 1.24 is not; 1/c <= a likewise."""
    assert bounds_of("linear", weight_mu=0.2, eps_high=0.25)[2] == INF
    assert bounds_of("linear", weight_mu=0.2, eps_high=0.24)[2] == pytest.approx(0.248 / 0.008)
    assert bounds_of("linear", weight_mu=0.2, dual_clip=1.25)[4] == INF
    assert bounds_of("linear", weight_mu=0.5, band=2.0)[0] == 0.0
    assert bounds_of("linear", weight_mu=0.5, band=1.9)[0] == pytest.approx(2 / 1.9 - 1)


def test_a_log_linear_bound_beyond_float64_is_0_or_inf():
    assert bounds_of("loglinear", weight_mu=1e-4)[2:] == (INF, 0.0, INF)
    assert bounds_of("loglinear", weight_mu=1 - 1e-9)[:2] == (0.0, INF)
    assert bounds_of("loglinear", weight_mu=5e-324)[2:] == (INF, 0.0, INF)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@given(weight_mu=st.floats(0, 1), band=st.floats(1, 10, exclude_min=True), eps=st.floats(0, 2), dual=st.floats(1.001, 9))
def test_a_token_whose_policies_agree_is_always_active(kind, weight_mu, band, eps, dual):
    bounds = effective_bounds(kind, weight_mu=weight_mu, band=band, eps_low=eps, eps_high=eps, dual_clip=dual)
    assert active(torch.zeros(3), torch.tensor([1.0, -1.0, 0.0]), bounds).all()


def test_the_advantages_sign_chooses_the_clip_and_equality_keeps():
    bounds = EffectiveBounds(mask_low=0.25, mask_high=4.0, positive_high=2.0, negative_low=0.5, negative_high=3.0)
    total = torch.tensor([0.2, 0.25, 0.4, 0.5, 1.0, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5], dtype=torch.float64)
    kept = {sign: total[active(total.log(), torch.full_like(total, sign), bounds)].tolist() for sign in (1.0, -1.0, 0.0)}
    assert kept[1.0] == [0.25, 0.4, 0.5, 1.0, 2.0]
    assert kept[-1.0] == [0.5, 1.0, 2.0, 2.5, 3.0]
    assert kept[0.0] == [0.25, 0.4, 0.5, 1.0, 2.0, 2.5, 3.0, 3.5, 4.0]


def test_a_token_that_is_not_finite_is_not_active_even_without_a_bound():
    free = EffectiveBounds(mask_low=0.0, mask_high=INF, positive_high=INF, negative_low=0.0, negative_high=INF)
    total, advantages = torch.tensor([NAN, INF, -INF, 0.0, 0.0, 700.0]), torch.tensor([1.0, 1.0, -1.0, NAN, INF, 1.0])
    assert active(total, advantages, free).tolist() == [False, False, False, False, False, True]
