import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oldlogits.objective import QUANTILES

from .typed import diagnose, to_metrics

NAN = math.nan
log_ratio = st.one_of(st.floats(-3, 3), st.sampled_from([0.0, NAN, math.inf]))
a_token = st.tuples(
    log_ratio, log_ratio, st.booleans(), st.booleans(), st.booleans(), st.integers(-1, 4), st.sampled_from([-1.0, 0.0, 2.0])
)


def run(tokens, num_staleness=3):
    log_r_d, log_r_s, band, clip, loss, staleness, advantages = map(list, zip(*tokens, strict=True)) if tokens else [[]] * 7
    return to_metrics(
        diagnose(
            torch.tensor(log_r_d, dtype=torch.float64),
            torch.tensor(log_r_s, dtype=torch.float64),
            band_mask=torch.tensor(band, dtype=torch.bool),
            clip_mask=torch.tensor(clip, dtype=torch.bool),
            loss_mask=torch.tensor(loss, dtype=torch.bool),
            staleness=torch.tensor(staleness, dtype=torch.int64),
            advantages=torch.tensor(advantages, dtype=torch.float64),
            num_staleness=num_staleness,
        )
    )


def by_hand(tokens):
    """The metrics of one group of loss tokens, in Python and NumPy."""
    finite = [t for t in tokens if math.isfinite(t[0]) and math.isfinite(t[1])]
    clipped = [t for t in finite if not t[3]]
    n = len(tokens)
    metrics = {
        "mask/num_tokens": n,
        "mask/num_nonfinite": n - len(finite),
        "mask/num_clipped_high": sum(t[6] > 0 for t in clipped),
        "mask/num_clipped_low": sum(t[6] < 0 and t[1] < 0 for t in clipped),
        "mask/num_clipped_dual": sum(t[6] < 0 and t[1] > 0 for t in clipped),
        "mask/rho_band": sum(t[2] for t in finite) / n,
        "mask/rho_clip": sum(t[3] for t in finite) / n,
        "mask/rho": sum(t[2] and t[3] for t in finite) / n,
    }
    if not finite:
        return metrics
    m, ds, ss = len(finite), [t[0] for t in finite], [t[1] for t in finite]
    weights = [math.exp(d) * math.exp(s) for d, s in zip(ds, ss, strict=True)]
    metrics |= {
        "ratio/ess": sum(weights) ** 2 / sum(w * w for w in weights) / m,
        "kl/mu_prox_k1": sum(-d for d in ds) / m,
        "kl/mu_prox_k3": sum(math.exp(d) - 1 - d for d in ds) / m,
        "kl/prox_theta_k3": sum(math.exp(d) * (math.exp(s) - 1 - s) for d, s in zip(ds, ss, strict=True)) / m,
        "ratio/log_r_d_abs_mean": sum(map(abs, ds)) / m,
        "ratio/log_r_d_abs_max": max(map(abs, ds)),
        "ratio/log_r_s_abs_mean": sum(map(abs, ss)) / m,
    }
    for name, values in (("log_r_d", ds), ("log_r_s", ss)):
        for q, value in zip((1, 5, 25, 50, 75, 95, 99), np.quantile(values, QUANTILES), strict=True):
            metrics[f"ratio/{name}_q{q:02d}"] = value
    return metrics


@pytest.mark.slow
@given(tokens=st.lists(a_token, max_size=30))
@settings(max_examples=150)
def test_metrics_equal_plain_python_over_all_loss_tokens_and_by_staleness(tokens):
    loss_tokens = [t for t in tokens if t[4]]
    expected = by_hand(loss_tokens) if loss_tokens else {}
    for lag in range(3):
        of_lag = [t for t in loss_tokens if t[5] == lag]
        if of_lag:
            expected |= {f"{name}@lag{lag}": value for name, value in by_hand(of_lag).items()}
    actual = run(tokens)
    assert set(actual) == set(expected)
    for name, value in expected.items():
        assert actual[name] == pytest.approx(value, rel=1e-9, abs=1e-12), name


def test_kl_and_effective_sample_size_of_two_tokens_by_hand():
    # r_d = 1.25 and 0.8, r_s = 1: k1 = 0, k3 = (0.25 + -0.2) / 2, ess = (2.05)^2 / (2 (1.5625 + 0.64)).
    metrics = run([(math.log(r), 0.0, True, True, True, 0, 1.0) for r in (1.25, 0.8)])
    assert metrics["kl/mu_prox_k1"] == pytest.approx(0.0, abs=1e-15)
    assert metrics["kl/mu_prox_k3"] == pytest.approx(0.025)
    assert metrics["kl/prox_theta_k3"] == 0.0
    assert metrics["ratio/ess"] == pytest.approx(2.05**2 / (2 * 2.2025))


def test_ratios_of_one_have_ess_one_and_no_divergence():
    metrics = run([(0.0, 0.0, True, True, True, lag, 1.0) for lag in (0, 0, 1)])
    for suffix in ("", "@lag0", "@lag1"):
        assert metrics[f"ratio/ess{suffix}"] == 1.0
        assert metrics[f"mask/rho{suffix}"] == 1.0
        assert metrics[f"kl/mu_prox_k3{suffix}"] == metrics[f"kl/prox_theta_k3{suffix}"] == 0.0


def test_the_effective_sample_size_survives_ratios_that_overflow():
    metrics = run([(0.0, s, True, True, True, 0, 1.0) for s in (5000.0, 5000.0, -5000.0, 0.0)])
    assert metrics["ratio/ess"] == pytest.approx(0.5)


def test_k3_estimates_the_divergence_of_mu_from_old_without_bias():
    """Summed over a whole distribution, weighted by mu, both estimators are KL(mu || old)."""
    mu, old, theta = np.array([0.5, 0.3, 0.2]), np.array([0.4, 0.35, 0.25]), np.array([0.3, 0.3, 0.4])
    counts = (10 * mu).astype(int)  # ten tokens in the proportions of mu
    tokens = [
        (math.log(o / m), math.log(t / o), True, True, True, 0, 1.0)
        for m, o, t, count in zip(mu, old, theta, counts, strict=True)
        for _ in range(count)
    ]
    metrics = run(tokens)
    kl = (mu * np.log(mu / old)).sum()
    assert metrics["kl/mu_prox_k1"] == pytest.approx(kl)
    assert metrics["kl/mu_prox_k3"] == pytest.approx(kl)
    assert metrics["kl/prox_theta_k3"] == pytest.approx((old * np.log(old / theta)).sum())


def test_tokens_that_are_too_old_to_be_told_apart_count_overall():
    metrics = run([(0.0, 0.0, True, True, True, lag, 1.0) for lag in (0, 7)], num_staleness=3)
    assert metrics["mask/num_tokens"] == 2
    assert {name for name in metrics if name.startswith("mask/num_tokens@")} == {"mask/num_tokens@lag0"}


def test_without_loss_tokens_there_are_no_metrics():
    assert run([]) == {}
    assert run([(0.0, 0.0, True, True, False, 0, 1.0)]) == {}


def test_every_metric_is_documented():
    from pathlib import Path

    documented = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    for name in by_hand([(0.0, 0.0, True, True, True, 0, 1.0)]):
        generic = name.rpartition("_q")[0] + "_q" if "_q" in name else name
        assert f"`{generic}" in documented, name
