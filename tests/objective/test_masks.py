import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oldlogits.core.errors import ConfigError

from .typed import band_mask, clip_log_ratio, clip_mask, finite_mask, kept_mask

INF, NAN = math.inf, math.nan
CLIP = {"eps_low": 0.2, "eps_high": 0.28, "dual_clip": 3.0}
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def step(x, towards):
    return torch.nextafter(x, torch.full_like(x, towards))


@dtypes
@pytest.mark.parametrize("band", [1.0001, 1.05, 1.5, 10.0])
def test_the_band_includes_both_bounds_and_nothing_beyond(dtype, band):
    bound = torch.tensor([math.log(band), -math.log(band)], dtype=dtype)
    outside = torch.cat([step(bound[:1], INF), step(bound[1:], -INF)])
    assert band_mask(bound, band).tolist() == [True, True]
    assert band_mask(outside, band).tolist() == [False, False]


@given(log_r_d=st.floats(-5, 5), band=st.floats(1.001, 20))
def test_the_band_is_symmetric_in_log_space(log_r_d, band):
    mask = band_mask(torch.tensor([log_r_d, -log_r_d], dtype=torch.float64), band)
    assert mask[0] == mask[1]


def test_an_infinite_band_keeps_every_finite_ratio():
    assert band_mask(torch.tensor([0.0, -80.0, 1e30]), INF).all()


@pytest.mark.parametrize("band", [1.0, 0.9, 0.0, -2.0, NAN])
def test_a_band_that_is_not_above_one_is_refused(band):
    with pytest.raises(ConfigError, match="band must be above 1"):
        band_mask(torch.zeros(1), band)


def test_kept_is_loss_and_band_and_finite():
    log_r_d = torch.tensor([0.0, 0.0, 1.0, NAN, INF, -0.1])
    loss_mask = torch.tensor([True, False, True, True, True, True])
    assert kept_mask(log_r_d, loss_mask, 1.5).tolist() == [True, False, False, False, False, True]
    assert kept_mask(log_r_d, loss_mask, INF).tolist() == [True, False, True, False, False, True]


def test_finite_needs_every_input_to_be_finite():
    good = torch.zeros(7)
    for position in range(3):
        inputs = [good, good, good]
        inputs[position] = torch.tensor([NAN, INF, -INF, 0.0, 88.0, -1e30, 1e30])
        assert finite_mask(*inputs).tolist() == [False, False, False, True, True, True, True]
    assert not finite_mask(torch.tensor([INF]), torch.tensor([-INF]), torch.zeros(1)).any()


@dtypes
def test_a_ratio_exactly_at_a_clip_bound_is_kept_and_the_next_float_is_not(dtype):
    low, high, dual = (torch.tensor([math.log(x)], dtype=dtype) for x in (1 - 0.2, 1 + 0.28, 3.0))
    positive, negative = torch.ones(1, dtype=dtype), -torch.ones(1, dtype=dtype)
    for bound, advantage, beyond in ((high, positive, INF), (low, negative, -INF), (dual, negative, INF)):
        assert clip_mask(bound, advantage, **CLIP).item()
        assert not clip_mask(step(bound, beyond), advantage, **CLIP).item()
    assert clip_mask(step(high, INF), negative, **CLIP).item()
    assert clip_mask(step(low, -INF), positive, **CLIP).item()


@given(log_r_s=st.floats(-50, 50), eps_low=st.floats(0, 2), eps_high=st.floats(0, 2))
def test_zero_advantage_is_always_kept(log_r_s, eps_low, eps_high):
    for zero in (0.0, -0.0):
        assert clip_mask(torch.tensor([log_r_s]), torch.tensor([zero]), eps_low, eps_high, 3.0).item()


@pytest.mark.slow
@given(
    log_r_s=st.floats(-4, 4),
    advantage=st.floats(-2, 2),
    eps_low=st.floats(0, 1.5),
    eps_high=st.floats(0, 2),
    dual=st.one_of(st.none(), st.floats(1.01, 9)),
)
def test_the_mask_and_the_clipped_ratio_follow_the_sign_of_the_advantage(log_r_s, advantage, eps_low, eps_high, dual):
    r_s = math.exp(log_r_s)
    arguments = (torch.tensor([log_r_s], dtype=torch.float64), torch.tensor([advantage], dtype=torch.float64))
    h = clip_log_ratio(*arguments, eps_low, eps_high, dual).exp().item()
    if advantage > 0:
        expected = min(r_s, 1 + eps_high)
    elif advantage < 0:
        expected = min(max(r_s, 1 - eps_low), INF if dual is None else dual)
    else:
        expected = r_s
    assert h == pytest.approx(expected, rel=1e-12)
    if not 0 < abs(log_r_s - math.log(expected)) < 1e-9:
        assert clip_mask(*arguments, eps_low, eps_high, dual).item() == (expected == r_s)


def test_eps_low_of_one_or_more_is_no_lower_bound_and_dual_clip_none_no_upper_one():
    far_down, far_up, negative = torch.tensor([-60.0]), torch.tensor([60.0]), torch.tensor([-1.0])
    assert clip_mask(far_down, negative, 1.0, 0.2, 3.0).item()
    assert not clip_mask(far_down, negative, 0.999, 0.2, 3.0).item()
    assert clip_mask(far_up, negative, 0.2, 0.2, None).item()
    assert not clip_mask(far_up, negative, 0.2, 0.2, 3.0).item()


def test_nan_is_neither_in_a_finite_band_nor_unclipped():
    nan = torch.tensor([NAN])
    assert not band_mask(nan, 1.5).item()
    assert not any(clip_mask(nan, torch.tensor([a]), **CLIP).item() for a in (-1.0, 0.0, 1.0))


@pytest.mark.parametrize(
    "wrong", [{"eps_low": -0.1}, {"eps_high": -0.1}, {"dual_clip": 1.0}, {"eps_high": NAN}, {"dual_clip": NAN}]
)
def test_clip_bounds_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigError, match="clip bounds out of range"):
        clip_mask(torch.zeros(1), torch.ones(1), **{**CLIP, **wrong})
