"""What is refused because it can never act, and what is warned of: each rule at its edge, with its figures."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oldlogits.config.bounds import a3po_weight, effective_bounds, supremum_r_s
from oldlogits.config.check import check
from oldlogits.config.guard import cautions, kept_at_lag_0
from oldlogits.config.load import config_from_table
from oldlogits.core.errors import ConfigError
from oldlogits.objective import a3po_weight_mu

INF = math.inf
LINEAR, LOGLINEAR = ("linear_prox", "linear_train_infer"), ("loglinear_prox", "loglinear_train_infer")
SOURCES = {
    "decoupled_exact": "snapshot", "ppo_clip": "snapshot", "decoupled_async": "arrival", "ppo_ewma": "ewma",
    "ppo_ewma_train_infer": "ewma", "aged_train_infer": "aged", "rescore_train_infer": "rescore",
}  # fmt: skip


def recipe(variant, source=None, **table):
    proximal = {"source": SOURCES.get(variant, "none"), **(source or {})}
    return config_from_table({"variant": variant, "proximal": proximal, **table})


def refusal(variant, **table):
    with pytest.raises(ConfigError) as caught:
        check(recipe(variant, **table))
    return caught.value


def warned(variant, source=None, **table):
    config = recipe(variant, source, **table)
    check(config)
    return {caution.name: caution for caution in cautions(config)}


@pytest.mark.parametrize("variant", LINEAR)
@pytest.mark.parametrize("eps_high", [0.1, 0.28, 1.0])
def test_a_linear_proximal_policy_whose_ratio_cannot_reach_the_upper_clip_is_refused(variant, eps_high):
    """``r_s < 1 / (1 - a)``: the clip at ``1 + eps_high`` exists where ``1 / (1 - a)`` is above it."""
    edge = 1 - 1 / (1 + eps_high)
    for weight_mu in (0.5 * edge, edge - 1e-9):
        error = refusal(variant, objective={"interpolation_mu": weight_mu, "eps_high": eps_high})
        assert error.what.startswith(f"variant '{variant}' has no clip for A > 0 at interpolation_mu")
        assert f"{edge:.4g}" in error.allowed
        assert f"variant '{variant.replace('linear', 'loglinear')}'" in error.fix
    check(recipe(variant, objective={"interpolation_mu": edge + 1e-9, "eps_high": eps_high}))


@pytest.mark.parametrize("variant", LINEAR + LOGLINEAR)
def test_a_proximal_policy_that_is_theta_itself_has_no_clip_and_is_refused(variant):
    assert "no clip for A > 0 and A < 0 at interpolation_mu 0" in refusal(variant, objective={"interpolation_mu": 0.0}).what


@pytest.mark.parametrize("variant", LOGLINEAR)
def test_a_log_linear_clip_exists_at_every_weight_until_its_bound_leaves_the_floats(variant):
    check(recipe(variant, objective={"interpolation_mu": 0.01}))  # 1.28^100 = 5e10
    assert "no clip" in refusal(variant, objective={"interpolation_mu": 1e-4}).what  # 1.28^10000


def test_a_proximal_policy_that_is_mu_itself_is_refused_where_it_is_to_mask_and_kept_where_it_is_to_clip():
    for variant in ("linear_train_infer", "loglinear_train_infer"):
        for band in (1.5, INF):
            error = refusal(variant, band=band, objective={"interpolation_mu": 1.0})
            assert "its proximal policy is MU and r_d is 1" in error.what
            assert "ppo_clip_train_infer" in error.fix
        check(recipe(variant, objective={"interpolation_mu": 0.99}))
    for variant in ("linear_prox", "loglinear_prox"):
        check(recipe(variant, objective={"interpolation_mu": 1.0}))


def test_under_a_schedule_every_staleness_of_the_window_needs_its_clip():
    """1/4 is above 0.28 / 1.28 = 0.219 and 1/5 is not."""
    scheduled = {"interpolation_schedule": "a3po"}
    for variant in LINEAR:
        check(recipe(variant, max_staleness=4, objective=scheduled))
        error = refusal(variant, max_staleness=5, objective=scheduled)
        assert error.what.startswith(f"variant '{variant}' has no clip for A > 0 at staleness 5")
        assert "a smaller max_staleness" in error.fix
        lockstep = {"runtime": {"type": "lockstep"}, "lockstep": {"max_lag": 4}}
        check(recipe(variant, max_staleness=5, objective=scheduled, **lockstep))
    for variant in LOGLINEAR:
        check(recipe(variant, max_staleness=32, objective=scheduled))


@pytest.mark.parametrize("variant", ["linear_train_infer", "loglinear_train_infer"])
def test_a_schedule_that_never_leaves_mu_masks_nothing_and_is_refused(variant):
    error = refusal(variant, max_staleness=1, objective={"interpolation_schedule": "a3po"})
    assert (error.got, "masks nothing" in error.what) == ("staleness 0, staleness 1", True)
    check(recipe(variant, max_staleness=2, objective={"interpolation_schedule": "a3po"}))


def test_no_band_is_refused_where_r_d_only_masks_and_warned_of_where_it_weights():
    error = refusal("decoupled_exact", band=INF, objective={"mismatch_correction": "mask"})
    assert "without a band it does neither" in error.what
    assert warned("decoupled_exact", band=INF)["no-band"].figures == {"band": INF}
    for variant in ("ppo_clip", "ppo_ewma", "linear_prox", "ppo_clip_train_infer"):  # no r_d, so no band to miss
        assert warned(variant, band=INF, objective={"mismatch_correction": "mask"}) == {}


def test_a_dual_clip_that_is_switched_off_or_out_of_reach_is_neither_refused_nor_warned_of():
    assert warned("decoupled_exact", objective={"dual_clip": INF}) == {}
    assert warned("linear_prox", objective={"dual_clip": 3.0}) == {}  # r_s < 2 at interpolation_mu 0.5


def test_a_recipe_that_says_that_it_does_not_clip_is_not_told_so():
    truncated = {"clip": "truncated", "is_cap": 1.5}
    assert warned("linear_prox", objective=truncated) == {}
    assert warned("linear_prox", objective={**truncated, "is_cap": INF, "interpolation_mu": 0.0}) == {}
    assert warned("decoupled_async", objective=truncated, trainer={"minibatches_per_update": 1}) == {}
    assert warned("linear_train_infer", band=1.05, objective=truncated) == {}
    assert "masks nothing" in refusal("linear_train_infer", objective={**truncated, "interpolation_mu": 1.0}).what


@pytest.mark.parametrize("variant", LINEAR)
@pytest.mark.parametrize("weight_mu", [0.25, 0.5, 0.8])
def test_a_truncation_that_a_linear_proximal_policys_ratio_cannot_exceed_is_refused(variant, weight_mu):
    """``r_s < 1 / (1 - a)``, which it approaches as R grows."""
    largest = 1 / (1 - weight_mu)
    assert 1e12 / (weight_mu + (1 - weight_mu) * 1e12) == pytest.approx(largest, rel=1e-6)
    for truncation in (largest, 1.01 * largest):
        error = refusal(variant, objective={"clip": "truncated", "interpolation_mu": weight_mu, "is_cap": truncation})
        assert error.what.startswith(f"variant '{variant}' has nothing to truncate at interpolation_mu {weight_mu:g}")
        assert error.allowed == f"a truncation below {largest:.4g}, or inf: none"
        assert error.fix.endswith(f"variant '{variant.replace('linear', 'loglinear')}', or a smaller objective.is_cap")
    for truncation in (0.99 * largest, INF):
        check(recipe(variant, objective={"clip": "truncated", "interpolation_mu": weight_mu, "is_cap": truncation}))
    check(recipe(variant, objective={"interpolation_mu": weight_mu, "is_cap": largest}))  # ppo: truncates nothing


def test_a_log_linear_ratio_exceeds_every_truncation_unless_the_proximal_policy_is_theta():
    for variant in LOGLINEAR:
        check(recipe(variant, objective={"clip": "truncated", "interpolation_mu": 0.01, "is_cap": 100.0}))
    for variant in LINEAR + LOGLINEAR:
        error = refusal(variant, objective={"clip": "truncated", "interpolation_mu": 0.0, "is_cap": 1.01})
        assert "nothing to truncate at interpolation_mu 0: r_s is 1" in error.what
        assert "smaller objective.is_cap" not in error.fix


def test_under_a_schedule_every_staleness_of_the_window_needs_its_truncation():
    """1 / (1 - 1/3) = 1.5 at staleness 3, 4/3 at staleness 4."""
    scheduled = {"clip": "truncated", "is_cap": 1.4, "interpolation_schedule": "a3po"}
    check(recipe("linear_prox", max_staleness=3, objective=scheduled))
    error = refusal("linear_prox", max_staleness=4, objective=scheduled)
    assert "nothing to truncate at staleness 4: r_s stays below 1 / (1 - weight on mu) = 1.333" in error.what
    assert "a smaller max_staleness" in error.fix
    check(recipe("loglinear_prox", max_staleness=32, objective=scheduled))


@given(st.sampled_from(["linear", "loglinear"]), st.floats(0, 1), st.floats(-30, 30))
def test_no_ratio_is_above_its_supremum(kind, weight_mu, log_total):
    total = math.exp(log_total)
    r_s = total / (weight_mu + (1 - weight_mu) * total) if kind == "linear" else total**weight_mu
    assert r_s <= supremum_r_s(kind, weight_mu=weight_mu) * (1 + 1e-12)


def test_the_shipped_defaults_give_no_warning():
    for variant in ("decoupled_exact", "decoupled_async", "ppo_clip", "ppo_ewma", *LINEAR, *LOGLINEAR):
        assert warned(variant) == {}


@pytest.mark.parametrize(
    ("variant", "steps", "max_staleness", "proximal_policy"),
    [
        ("decoupled_async", 1, 4, "ASYNC"),
        ("decoupled_async", 2, 4, None),
        ("decoupled_exact", 1, 0, "OLD"),
        ("ppo_clip", 1, 0, "OLD"),
        ("decoupled_exact", 1, 1, None),
        ("decoupled_exact", 2, 0, None),
        ("ppo_ewma", 1, 0, "EWMA"),
        ("ppo_ewma_train_infer", 1, 0, "EWMA"),
        ("ppo_ewma_train_infer", 1, 1, None),
        ("ppo_ewma", 2, 0, None),
        ("aged_train_infer", 1, 0, "AGED"),
        ("aged_train_infer", 1, 1, None),
        ("rescore_train_infer", 1, 0, "RESCORE"),
        ("rescore_train_infer", 1, 1, None),
        ("ppo_clip_train_infer", 1, 0, None),  # THETA / MU
        ("loglinear_prox", 1, 0, None),
    ],
)
def test_one_step_at_the_proximal_policys_own_weights_is_warned_of(variant, steps, max_staleness, proximal_policy):
    found = warned(variant, max_staleness=max_staleness, trainer={"minibatches_per_update": steps})
    assert found.keys() == ({"no-clip"} if proximal_policy else set())
    for caution in found.values():
        assert caution.figures == {"minibatches_per_update": 1, "clipped": 0}
        assert f"THETA is {proximal_policy} at the only step" in caution.message


def test_at_lag_0_an_average_is_the_live_weights_under_every_decay_but_a_fixed_one():
    def names(variant, **source):
        return warned(variant, source, max_staleness=0, trainer={"minibatches_per_update": 1}).keys()

    fixed = {"decay": "fixed", "beta": 0.5}
    for decay in ("max-lag", "mean-lag", "auto"):
        assert names("ppo_ewma", decay=decay) == {"no-clip"}
    assert names("ppo_ewma", **fixed) == set()
    assert names("aged_train_infer", **fixed) == {"no-clip"}  # moved by lag / age = 0


def test_bounds_of_an_interpolation_that_lie_beyond_its_mask_are_warned_of_with_their_figures():
    """Linear, a = 0.5, c = 1.05: mask [2/c - 1, 2 c - 1], clips 1.28 a / (1.28 a - 0.28) and 0.8 a / (0.8 a + 0.2)."""
    (caution,) = warned("linear_train_infer", band=1.05).values()
    assert caution.name == "hidden-bounds"
    expected = {
        "mask_low": 2 / 1.05 - 1, "mask_high": 2 * 1.05 - 1, "negative_low": 0.4 / 0.6, "positive_high": 0.64 / 0.36
    }  # fmt: skip
    assert caution.figures == pytest.approx(expected, rel=1e-12)
    assert caution.message == (
        "bounds of linear_train_infer that never act, at band 1.05: interpolation_mu 0.5: clip of A > 0, clip of A < 0 "
        "(interpolation_mu 0.5: mask 0.905 <= R <= 1.1, clip 0.667 <= R <= 1.78; oldlogits bounds)"
    )
    (caution,) = warned("linear_train_infer", band=3.0).values()  # 1/3 <= a: no lower end
    assert caution.figures["mask_low"] == 0
    assert "interpolation_mu 0.5: mask from below" in caution.message
    assert "clip of" not in caution.message
    assert warned("linear_prox", band=1.05) == {}


SCHEDULED = {"interpolation_schedule": "a3po"}


def test_under_a_schedule_the_bounds_that_never_act_are_named_by_ranges_of_staleness():
    """At lags 0 and 1 X is MU. From lag 2 on the clip is 1.28^(1/a) >= 1.64, the mask 1.05^(1/(1-a)) <= 1.1"""
    (caution,) = warned("loglinear_train_infer", band=1.05, objective=SCHEDULED, max_staleness=16).values()
    assert "staleness 0 to 1: mask; staleness 2 to 16: clip of A > 0, clip of A < 0 (" in caution.message
    assert "(staleness 2: mask 0.907 <= R <= 1.1, clip 0.64 <= R <= 1.64;" in caution.message
    expected = {"mask_low": 1.05**-2, "mask_high": 1.05**2, "negative_low": 0.8**2, "positive_high": 1.28**2}
    assert caution.figures == pytest.approx(expected)


def test_figures_are_those_of_the_first_staleness_with_a_mask_be_its_bounds_hidden_or_not():
    (caution,) = warned("loglinear_train_infer", band=1.5, objective=SCHEDULED, max_staleness=2).values()
    assert "staleness 0 to 1: mask (staleness 2: mask 0.444 <= R <= 2.25" in caution.message
    assert caution.figures["mask_high"] == pytest.approx(1.5**2)


@pytest.mark.slow
@settings(max_examples=40)
@given(
    st.sampled_from(["linear_train_infer", "loglinear_train_infer"]),
    st.floats(1.001, 20),
    st.floats(0.01, 0.99),
    st.floats(0.001, 0.066),  # below 1/15: a linear clip exists at a = 1/16
    st.sampled_from(["ppo", "truncated"]),
)
def test_the_warning_of_a_window_of_16_names_every_hidden_bound_in_less_than_300_characters(
    variant, band, eps_low, eps_high, clip
):
    knobs = {**SCHEDULED, "eps_low": eps_low, "eps_high": eps_high, "clip": clip, "is_cap": 1 + eps_high}
    found = warned(variant, band=band, objective=knobs, max_staleness=16)
    message = found["hidden-bounds"].message
    assert len(message) < 300
    listed, _, _ = message.partition(": ")[2].rpartition(" (")
    named = {}
    for part in listed.split("; "):
        where, _, bounds = part.partition(": ")
        first, _, last = where.removeprefix("staleness ").partition(" to ")
        named |= dict.fromkeys(range(int(first), int(last or first) + 1), bounds.split(", "))
    kind = variant.removesuffix("_train_infer")
    for lag in range(17):
        b = effective_bounds(kind, weight_mu=1 / max(lag, 1), band=band, eps_low=eps_low, eps_high=eps_high, dual_clip=3.0)
        ends = (b.mask_low > 0, b.mask_high < INF)
        expected = {(False, False): ["mask"], (False, True): ["mask from below"], (True, False): ["mask from above"]}.get(
            ends, []
        )
        if clip == "ppo":
            expected = (
                expected
                + ["clip of A > 0"] * (b.positive_high >= b.mask_high)
                + ["clip of A < 0"] * (b.negative_low <= b.mask_low)
            )
        assert named.get(lag, []) == expected


def test_what_the_mask_keeps_at_lag_0_is_the_band_or_the_interpolations_effective_mask():
    assert kept_at_lag_0(recipe("decoupled_exact", band=1.25)) == (0.8, 1.25)
    assert kept_at_lag_0(recipe("decoupled_async", band=1.25)) == (0.8, 1.25)
    for variant in ("ppo_clip", "ppo_ewma", "ppo_clip_train_infer", "linear_prox"):
        assert kept_at_lag_0(recipe(variant, band=1.25)) == (0, INF)
    assert kept_at_lag_0(recipe("linear_train_infer", band=1.25)) == pytest.approx((0.6, 1.5))
    assert kept_at_lag_0(recipe("loglinear_train_infer", band=1.25)) == pytest.approx((0.64, 1.5625))
    scheduled = recipe("loglinear_train_infer", band=1.25, objective={"interpolation_schedule": "a3po"})
    assert kept_at_lag_0(scheduled) == (0, INF)  # fresh tokens: X is MU


@given(st.integers(0, 64))
def test_the_schedules_weight_is_the_one_that_the_objective_takes(staleness):
    assert a3po_weight(staleness) == pytest.approx(a3po_weight_mu(torch.tensor([staleness])).item(), rel=1e-6)
