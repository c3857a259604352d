"""Whole runs under rescore: what the proximal policy is at lag 0 and without noise, and what is measured of the rest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from oldlogits.run.run import run

from ..runs import check_accounting, events_of, recipe, summary_of, tokens_of

RESCORE = {"variant": "rescore_train_infer", "proximal": {"source": "rescore"}}
COLUMNS = ("staleness", "provenance", "logp_mu", "logp_theta", "logp_proximal")


def rescored(out: Path, folder: Path, numerics: str, **sections: object) -> dict[str, np.ndarray]:
    """Run, and return the trained tokens; with one step per version THETA is the trainer before that step."""
    trainer = {"minibatches_per_update": 1}
    config = recipe(folder, **RESCORE, engine={"precision": numerics}, trainer=trainer, **sections)
    assert run(config, out).error is None
    check_accounting(out)
    tokens = tokens_of(out, *COLUMNS)
    assert set(tokens["provenance"].tolist()) == {"rescore"}
    assert summary_of(out)["provenance"] == {"rescore": len(tokens["provenance"])}
    return tokens


def correlations(out: Path) -> list[dict[str, float]]:
    """Of every update."""
    found = [event.metrics for event in events_of(out, "update")]
    return [{name: value for name, value in metrics.items() if name.startswith("source/")} for metrics in found]


@pytest.mark.slow
@pytest.mark.parametrize("numerics", ["bf16", "fp8", "int8", "int4"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_at_lag_0_it_is_old_however_coarse_the_engine(numerics, temperature, tmp_path, tiny_folder):
    sampling = {"temperature": temperature}
    tokens = rescored(tmp_path, tiny_folder, numerics, lockstep={"max_lag": 0}, max_staleness=0, sampling=sampling)
    assert np.abs(tokens["logp_mu"] - tokens["logp_theta"]).max() > 1e-3
    assert np.abs(tokens["logp_proximal"] - tokens["logp_theta"]).max() <= 1e-5
    for measured in correlations(tmp_path):
        assert measured == pytest.approx({"source/noise_correlation": 1.0, "source/noise_correlation_min": 1.0}, abs=1e-12)


@pytest.mark.slow
def test_with_an_engine_without_noise_it_is_mu_at_every_lag(tmp_path, tiny_folder):
    tokens = rescored(tmp_path, tiny_folder, "fp32")
    assert set(tokens["staleness"].tolist()) == {0, 1, 2}
    assert np.abs(tokens["logp_proximal"] - tokens["logp_mu"]).max() <= 1e-6
    assert np.abs(tokens["logp_proximal"] - tokens["logp_theta"]).max() > 1e-2
    assert correlations(tmp_path) == [{}] * 4


@pytest.mark.slow
def test_the_noise_correlates_fully_at_lag_0_and_less_at_larger_lags_and_no_version_is_stored(tmp_path, tiny_folder):
    tokens = rescored(tmp_path, tiny_folder, "fp8")
    first, *later = correlations(tmp_path)
    assert first == pytest.approx({"source/noise_correlation": 1.0, "source/noise_correlation_min": 1.0}, abs=1e-12)
    for measured in later:
        assert -1 <= measured["source/noise_correlation_min"] <= measured["source/noise_correlation"] < 1
    lagging = tokens["staleness"] > 0
    error = np.abs(tokens["logp_proximal"] - tokens["logp_theta"])
    assert error[~lagging].max() <= 1e-5
    assert error[lagging].max() > 1e-2
    assert {event.bytes for event in events_of(tmp_path, "published")} == {0}


@pytest.mark.slow
def test_it_runs_with_engine_and_trainer_in_processes_of_their_own(tmp_path, tiny_folder):
    tokens = rescored(tmp_path, tiny_folder, "int8", num_updates=2, runtime={"type": "local"})
    assert tokens["staleness"].max() <= 2
    fresh = tokens["staleness"] == 0
    assert np.abs(tokens["logp_proximal"] - tokens["logp_theta"])[fresh].max() <= 1e-5
    for measured in correlations(tmp_path):
        assert measured.keys() == {"source/noise_correlation", "source/noise_correlation_min"}
