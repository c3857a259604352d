"""Whole runs under every preset, and what a loss that looks at a whole step or at whole sequences makes of micro-batches."""

from __future__ import annotations

import math

import numpy as np
import pyarrow.parquet as pq
import pytest

from oldlogits.config.objective.presets import PRESETS
from oldlogits.run.run import run

from ..runs import check_accounting, events_of, recipe


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_trains(name, tiny_folder, tmp_path):
    config = recipe(tiny_folder, num_updates=2, objective={"preset": name})
    out = tmp_path / "run"
    assert run(config, out).error is None
    check_accounting(out)
    metrics = [event.metrics for event in events_of(out, "update")]
    assert len(metrics) == 2
    assert all(math.isfinite(one["loss/value"]) for one in metrics)
    table = pq.read_table(out / "tokens" / "v000001.parquet")
    active = table.column("active_mask").to_numpy(zero_copy_only=False)
    assert metrics[0]["mask/rho"] == pytest.approx(active.mean())
    moved = sum(one["grad/norm"] for one in metrics)
    assert (moved > 0) == any(one["mask/rho"] > 0 for one in metrics)


CASES = {
    "gspo": {"variant": "ppo_clip_train_infer", "objective": {"loss": "gspo", "eps_low": 0.01, "eps_high": 0.02}},
    "m2po": {"variant": "decoupled_async", "objective": {"loss": "m2po", "options": {"threshold": 0.0001}}},
    "normalise": {"correction": {"normalise": True, "weight_level": "sequence", "weight_high": 1.2}},
    "rejection": {"correction": {"reject": "geometric", "reject_low": 0.99, "reject_high": 1.01, "veto_low": 0.5}},
    "prefix": {"variant": "ppo_clip_train_infer", "objective": {"loss": "reinforce", "options": {"level": "prefix"}}},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_size_of_micro_batches_changes_no_number(name, tiny_folder, tmp_path):
    found = {}
    for budget in (8, 8192):
        sections = {"num_updates": 2, "engine": {"precision": "int4", "max_num_seqs": 32}, **CASES[name]}
        trainer = {"minibatches_per_update": 2, "micro_batch_tokens": budget}
        config = recipe(tiny_folder, **sections, trainer=trainer)
        out = tmp_path / f"run{budget}"
        assert run(config, out).error is None
        found[budget] = events_of(out, "update")[0].metrics, pq.read_table(out / "tokens" / "v000001.parquet")
    (small, one_at_a_time), (large, at_once) = found.values()
    for key in ("loss/value", "grad/norm"):
        assert small[key] == pytest.approx(large[key], rel=2e-4, abs=1e-7), key
    for column in ("token_id", "band_mask", "clip_mask"):
        np.testing.assert_array_equal(*(t.column(column).to_numpy(zero_copy_only=False) for t in (one_at_a_time, at_once)))
    np.testing.assert_allclose(*(t.column("log_r_s").to_numpy() for t in (one_at_a_time, at_once)), atol=1e-5)


@pytest.mark.slow
def test_normalised_weights_divide_the_loss_by_their_mean_over_each_step(tiny_folder, tmp_path):
    metrics = {}
    for normalise in (False, True):
        config = recipe(
            tiny_folder,
            num_updates=1,
            band=math.inf,
            engine={"precision": "int4"},
            trainer={"minibatches_per_update": 1},
            proximal={"current_version": "scored"},
            correction={"normalise": normalise, "weight_high": 1.01},
        )
        out = tmp_path / f"run{normalise}"
        assert run(config, out).error is None
        metrics[normalise] = events_of(out, "update")[0].metrics["loss/value"]
        log_r_d = pq.read_table(out / "tokens" / "v000001.parquet").column("log_r_d").to_numpy().astype(float)
    mean = np.minimum(np.exp(log_r_d), 1.01).mean()
    assert abs(mean - 1) > 1e-5
    assert metrics[True] == pytest.approx(metrics[False] / mean, rel=1e-5)
