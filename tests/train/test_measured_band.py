"""The band that is measured: what it holds, what it forgets, and that a run keeps one for each update everywhere."""

import math
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from oldlogits.config.check import check
from oldlogits.config.load import config_from_table
from oldlogits.core.errors import ConfigError
from oldlogits.loop.audit import ExactAudit
from oldlogits.run.run import run
from oldlogits.train.measured_band import MOST_TOKENS, RECENT_VERSIONS, USUAL_BAND, MeasuredBand

from ..runs import assert_same_state, events_of, recipe

noises = st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=300)


def measured(*versions):
    band = MeasuredBand()
    for log_r_d in versions:
        band.note(np.array(log_r_d, np.float32))
    return band


def scalar_band(versions):
    """The smallest of the measured sizes that 99 of 100 others do not exceed, by their order, of the newest versions."""
    sizes = sorted(abs(x) for version in versions[-RECENT_VERSIONS:] for x in version)
    return math.exp(max(sizes[math.ceil(0.99 * (len(sizes) - 1))], 1e-5))


@given(st.lists(noises, min_size=1, max_size=12))
def test_the_band_holds_99_of_100_tokens_of_the_newest_versions(versions):
    assert measured(*versions).value == pytest.approx(scalar_band(versions), rel=1e-6)


def test_noise_of_rounding_alone_is_a_band_of_what_fp32_rounds_off():
    assert measured([0.0] * 5).value == math.exp(1e-5)
    assert measured([2e-5] * 5).value == pytest.approx(math.exp(2e-5), rel=1e-9)


def test_without_a_finite_token_the_band_is_the_usual_one_and_such_tokens_say_nothing():
    assert measured().value == measured([], [math.nan, math.inf]).value == USUAL_BAND
    assert not measured([math.nan]).is_known
    assert measured([0.1, math.nan, -math.inf]).value == pytest.approx(math.exp(0.1))


def test_of_many_tokens_of_a_version_so_many_are_kept_that_the_quantile_stays():
    draws = np.random.default_rng(0).standard_normal(50_000)
    band = measured(draws)
    assert len(band.state()["noise"]) == MOST_TOKENS
    assert math.log(band.value) == pytest.approx(np.quantile(np.abs(draws), 0.99), rel=0.01)


@given(st.lists(noises, max_size=11), noises)
def test_a_restored_band_goes_on_as_if_there_had_been_no_break(versions, later):
    straight, restored = measured(*versions), MeasuredBand()
    restored.load(straight.state())
    for band in (straight, restored):
        band.note(np.array(later, np.float32))
    assert restored.value == straight.value
    assert all((a == b).all() for a, b in zip(restored.state().values(), straight.state().values(), strict=True))


@pytest.mark.parametrize("variant", ["ppo_ewma_train_infer", "decoupled_async", "ppo_clip", "linear_train_infer"])
def test_a_measured_band_is_refused_where_r_d_is_not_the_noise_alone(variant):
    check(config_from_table({"variant": "decoupled_exact", "band": "auto"}))
    with pytest.raises(ConfigError, match="a measured band holds the engine's own noise"):
        check(config_from_table({"variant": variant, "band": "auto"}))


# Whole runs.

NUM_UPDATES = 6


def config_of(folder: Path, band="auto", **more):
    wide = {"num_updates": NUM_UPDATES, "engine": {"precision": "int4", "max_num_seqs": 32}, "audit": {"share": 1.0}}
    return recipe(folder, band=band, record={"checkpoint_every": 2}, **wide, **more)


def table_of(out: Path, version: int):
    table = pq.read_table(out / f"tokens/v{version:06d}.parquet")
    return {name: table.column(name).to_numpy(zero_copy_only=False) for name in table.column_names if name != "context"}


@pytest.mark.slow
def test_each_update_has_one_band_that_follows_from_the_tokens_before_it_and_the_audit_judges_by_it(tiny_folder, tmp_path):
    out = tmp_path / "run"
    assert run(config_of(tiny_folder), out).error is None
    noise, bands = [], []
    for update in events_of(out, "update"):
        table, band = table_of(out, update.version), update.metrics["mask/band"]
        fresh = table["log_r_d"][table["staleness"] == 0]
        if not noise:  # the first one: its own tokens, which the live weights have scored before the steps
            assert band == pytest.approx(scalar_band([fresh]), rel=1e-5)
        else:
            assert band == pytest.approx(scalar_band(noise), rel=1e-6)
        inside = np.abs(table["log_r_d"]) <= math.log(band)
        assert (table["band_mask"] == inside).all()
        usual = table["clip_mask"] & (np.abs(table["log_r_d"]) <= math.log(1.5))
        assert update.metrics["mask/rho_usual_band"] == pytest.approx(usual.mean())
        assert update.metrics["mask/rho"] == pytest.approx(table["active_mask"].mean())
        noise.append(fresh.tolist())
        bands.append(band)
    assert len(set(bands)) > 1
    assert 1.01 < min(bands) < max(bands) < 1.5, "int4 on this model"
    for audit in events_of(out, "audit"):
        assert sum(audit.wrongly_kept) + sum(audit.wrongly_masked) == 0, "OLD is used: its own band would judge otherwise"
    assert events_of(out, "run_started")[0].band is None


@pytest.mark.slow
def test_under_another_band_the_audit_would_find_errors(tiny_folder, tmp_path, monkeypatch):
    """Else the law above would hold for want of tokens between the bands."""
    real = ExactAudit.judge

    def judge(audit, scores, result, *, version):
        result.metrics["mask/band"] *= 0.95
        return real(audit, scores, result, version=version)

    monkeypatch.setattr(ExactAudit, "judge", judge)
    assert run(config_of(tiny_folder), tmp_path / "run").error is None
    assert sum(sum(audit.wrongly_kept) for audit in events_of(tmp_path / "run", "audit")) > 0


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_same_bands_bit_for_bit(tiny_folder, tmp_path):
    out, config = tmp_path / "run", config_of(tiny_folder)
    assert run(config, out).error is None
    last = f"checkpoints/v{NUM_UPDATES:06d}"
    whole = shutil.move(out / last, tmp_path / "whole")
    tables = [(out / f"tokens/v{version:06d}.parquet").read_bytes() for version in range(1, NUM_UPDATES + 1)]
    bands = [update.metrics["mask/band"] for update in events_of(out, "update")]
    assert run(config, out, resume=True).error is None
    again = {update.version: update.metrics["mask/band"] for update in events_of(out, "update")}
    assert list(again.values()) == bands
    assert tables == [(out / f"tokens/v{version:06d}.parquet").read_bytes() for version in range(1, NUM_UPDATES + 1)]
    assert_same_state(out / last / "state", Path(whole) / "state")


@pytest.mark.slow
def test_to_measure_it_changes_nothing_where_every_token_is_inside_of_both(tiny_folder, tmp_path, monkeypatch):
    """A quantile of 1 and the usual band keep the same tokens here; the runs are then the same bit for bit."""
    monkeypatch.setattr(MeasuredBand, "value", property(lambda band: USUAL_BAND))
    weights = []
    for band in ("auto", 1.5):
        out = tmp_path / str(band)
        assert run(config_of(tiny_folder, band), out).error is None
        weights.append(load_file(out / f"checkpoints/v{NUM_UPDATES:06d}/model/model.safetensors"))
    assert all(np.array_equal(weights[0][name], weights[1][name]) for name in weights[0])
