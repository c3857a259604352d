"""Where other frameworks' losses coincide with a row of the table, both give the same loss and the same gradient.

Each peer's formula is written the way that peer composes it (FIELD, section 1): ratios, clamps and maxima, autograd.
"""

import math

import pytest
import torch

from oldlogits.core.policies import ASYNC, EWMA, LOGLINEAR, MU, OLD, THETA, VARIANTS

from .typed import aggregate, kept_mask, log_discrepancy, loglinear_logp, split_ratio, surrogate

LOW, HIGH, DUAL, BAND = 0.2, 0.28, 3.0, 1.5


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(3)
    base = -4 * torch.rand(300, generator=generator, dtype=torch.float64)

    def noisy(scale):
        return base + scale * torch.randn(300, generator=generator, dtype=torch.float64)

    logp = {MU: noisy(0.25), OLD: base, ASYNC: noisy(0.2), EWMA: noisy(0.1), THETA: noisy(0.6)}
    advantages = torch.randn(300, generator=generator, dtype=torch.float64)
    loss_mask = torch.rand(300, generator=generator) < 0.6
    return logp, advantages, loss_mask


def clipped(a, b, advantages):
    """``L(a, b) = -min(r A, clip(r, 1 - eps_low, 1 + eps_high) A)``."""
    ratio = (a - b).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - LOW, 1 + HIGH) * advantages)


def dual_clipped(a, b, advantages):
    """verl's third bound: for A < 0 the loss is at most ``-d A``."""
    loss = clipped(a, b, advantages)
    return torch.where(advantages < 0, torch.minimum(loss, -DUAL * advantages), loss)


def same(data, peer, name, *, mode="token-mean", dual_clip=None, band=math.inf, discrepancy="weight_and_mask"):
    logp, advantages, loss_mask = data
    theirs, ours = logp[THETA].clone().requires_grad_(), logp[THETA].clone().requires_grad_()
    expected = peer({**logp, THETA: theirs}, advantages, loss_mask)
    split = split_ratio(VARIANTS[name], {**logp, THETA: ours})
    tokens = surrogate(
        split, advantages, loss_mask, band=band, eps_low=LOW, eps_high=HIGH, dual_clip=dual_clip, discrepancy=discrepancy
    )
    kept = kept_mask(log_discrepancy(VARIANTS[name], logp), loss_mask, band)
    actual = aggregate(tokens.values, loss_mask, mode=mode, kept_mask=kept)
    assert actual.item() == pytest.approx(expected.item(), rel=1e-12)
    gradients = [torch.autograd.grad(loss, x)[0] for loss, x in ((expected, theirs), (actual, ours))]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-15)
    assert 0 < gradients[0].count_nonzero() < loss_mask.sum()


def test_ppo_clip_is_the_plain_clipped_loss(data):
    same(data, lambda p, a, m: clipped(p[THETA], p[OLD], a)[m].mean(), "ppo_clip")


def test_ppo_clip_with_dual_clip_is_verls_policy_loss(data):
    same(data, lambda p, a, m: dual_clipped(p[THETA], p[OLD], a)[m].mean(), "ppo_clip", dual_clip=DUAL)


def test_ppo_clip_train_infer_is_the_clip_on_the_total_ratio(data):
    same(data, lambda p, a, m: clipped(p[THETA], p[MU], a)[m].mean(), "ppo_clip_train_infer")


@pytest.mark.parametrize(("name", "proximal"), [("decoupled_exact", OLD), ("decoupled_async", ASYNC)])
def test_the_decoupled_rows_are_a_band_with_weight_over_all_valid_tokens(data, name, proximal):
    def peer(p, a, m):
        r_d = (p[proximal] - p[MU]).exp()
        inside = (r_d >= 1 / BAND) & (r_d <= BAND)
        return (r_d * inside * dual_clipped(p[THETA], p[proximal], a) * m).sum() / m.sum()

    same(data, peer, name, dual_clip=DUAL, band=BAND)


def test_mask_only_over_kept_tokens_is_the_band_that_filters(data):
    def peer(p, a, m):
        r_d = (p[ASYNC] - p[MU]).exp()
        kept = m & (r_d >= 1 / BAND) & (r_d <= BAND)
        return clipped(p[THETA], p[ASYNC], a)[kept].mean()

    same(data, peer, "decoupled_async", mode="token-mean-kept", band=BAND, discrepancy="mask")


def test_ppo_ewma_train_infer_without_a_band_is_the_unbounded_weight_times_the_clip(data):
    def peer(p, a, m):
        return ((p[EWMA] - p[MU]).exp() * clipped(p[THETA], p[EWMA], a))[m].mean()

    same(data, peer, "ppo_ewma_train_infer")


def test_loglinear_prox_is_a3pos_loss_with_its_version_dependent_coefficient(data):
    logp, advantages, loss_mask = data
    lag = torch.arange(300, dtype=torch.float64) % 5
    on_theta = torch.where(lag == 0, 0.0, ((lag - 1) / lag.clamp(min=1)).clamp(0, 1))
    logp[LOGLINEAR] = loglinear_logp(logp[MU], logp[THETA], 1 - on_theta)

    def peer(p, a, m):
        proximal = (p[MU] + on_theta * (p[THETA] - p[MU])).detach()
        return clipped(p[THETA], proximal, a)[m].mean()

    same((logp, advantages, loss_mask), peer, "loglinear_prox")
