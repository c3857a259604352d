"""Traces: the panel scores what each route would, and the run beside it goes on as if it were not there."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest

from oldlogits.core.errors import ConfigError
from oldlogits.run.run import run
from studies.old_logits.measure.trace import AVERAGES, TraceInfo, record_trace
from tests.memory_log import without_wall_clock
from tests.runs import assert_same_state, recipe, tokens_of

pytestmark = pytest.mark.slow

WINDOW, UPDATES, SCORED = 3, 6, 3

DRIVERS = {  # driver: the recipe keys that it sets, and the column of the panel that it is
    "exact": ({"variant": "decoupled_exact", "proximal": {"source": "snapshot", "current_version": "scored"}}, "logp_old"),
    "arrival": ({"variant": "decoupled_async", "proximal": {"source": "arrival"}}, "logp_async"),
    "ewma": ({"variant": "ppo_ewma_train_infer", "proximal": {"source": "ewma"}}, "logp_ewma"),
    "ewma-mean-lag": (
        {"variant": "ppo_ewma_train_infer", "proximal": {"source": "ewma", "decay": "mean-lag"}},
        "logp_ewma-mean-lag",
    ),
    "ewma-auto": ({"variant": "ppo_ewma_train_infer", "proximal": {"source": "ewma", "decay": "auto"}}, "logp_ewma-auto"),
    "aged": ({"variant": "aged_train_infer", "proximal": {"source": "aged"}}, "logp_aged"),
    "rescore": ({"variant": "rescore_train_infer", "proximal": {"source": "rescore"}}, "logp_rescore"),
    "mu": ({"variant": "ppo_clip_train_infer", "proximal": {"source": "none"}}, "logp_mu"),
}


def config_of(folder: Path, driver: str, window: int = WINDOW, numerics: str = "fp8"):
    return recipe(
        folder,
        num_updates=UPDATES,
        max_staleness=WINDOW,
        lockstep={"max_lag": window},
        engine={"precision": numerics},
        **DRIVERS[driver][0],
    )


def events_of(out: Path) -> list[object]:
    return [without_wall_clock(json.loads(line)) for line in (out / "events.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def traced(tiny_folder, tmp_path_factory):
    """Record a trace once for all tests of this file; returns run folder, columns and info."""
    root = tmp_path_factory.mktemp("traces")

    @functools.cache
    def trace(driver: str, window: int = WINDOW, numerics: str = "fp8"):
        out = root / f"{driver}-{window}-{numerics}"
        table = record_trace(config_of(tiny_folder, driver, window, numerics), out, SCORED)
        return out, {name: table.column(name).to_numpy() for name in table.column_names}, TraceInfo.of(table)

    return trace


@pytest.mark.parametrize("driver", DRIVERS)
def test_the_panel_gives_what_the_route_itself_gives(traced, driver):
    _, columns, _ = traced(driver)
    assert np.array_equal(columns["logp_proximal"], columns[DRIVERS[driver][1]])


@pytest.mark.parametrize("driver", ["exact", "ewma-auto"])
def test_the_drivers_run_is_the_same_bit_for_bit_without_the_panel(traced, tiny_folder, tmp_path, driver):
    beside, columns, _ = traced(driver)
    result = run(config_of(tiny_folder, driver), tmp_path / "alone")
    assert result.error is None
    saved, again = (run / f"checkpoints/v{UPDATES:06d}" for run in (beside, tmp_path / "alone"))
    assert (saved / "model/model.safetensors").read_bytes() == (again / "model/model.safetensors").read_bytes()
    assert_same_state(saved / "state", again / "state")
    assert events_of(beside) == events_of(tmp_path / "alone")
    alone = tokens_of(tmp_path / "alone", "trainer_version", "staleness", "advantage", "logp_mu", "logp_theta", "logp_proximal")
    last = alone.pop("trainer_version") >= UPDATES - SCORED
    for name, values in alone.items():
        assert np.array_equal(values[last], columns[name])


def test_only_the_last_updates_are_recorded_and_lags_fill_the_window(traced):
    _, columns, info = traced("exact")
    assert sorted(set(columns["update"])) == list(range(UPDATES - SCORED, UPDATES))
    assert set(columns["staleness"]) == set(range(WINDOW + 1))
    assert set(columns["step"]) == {0, 1}
    assert (info.variant, info.source, info.engine) == ("decoupled_exact", "snapshot", "fp8")
    assert (info.window, info.lag, info.seed) == (WINDOW, "even", 0)


def test_arrival_is_theta_before_the_first_step_and_old_at_lag_0(traced):
    """And neither elsewhere, or this would hold for want of training."""
    _, columns, _ = traced("exact")
    moved = np.abs(columns["logp_async"] - columns["logp_theta"])
    assert moved[columns["step"] == 0].max() <= 1e-5 < 1e-3 < moved[columns["step"] == 1].max()
    aged = np.abs(columns["logp_async"] - columns["logp_old"])
    assert aged[columns["staleness"] == 0].max() <= 1e-5 < 1e-3 < aged[columns["staleness"] > 0].max()


def test_without_lag_every_proximal_policy_is_old(traced):
    _, columns, info = traced("exact", window=0)
    assert columns["staleness"].max() == 0
    assert info.beta == dict.fromkeys(AVERAGES, 0.0)
    for name in ("async", *AVERAGES, "aged", "rescore"):
        assert np.abs(columns[f"logp_{name}"] - columns["logp_old"]).max() <= 1e-5
    assert np.abs(columns["logp_mu"] - columns["logp_old"]).mean() > 1e-3


def test_rescore_is_mu_where_the_engine_has_no_noise(traced):
    _, columns, _ = traced("exact", numerics="fp32")
    assert np.abs(columns["logp_rescore"] - columns["logp_mu"]).max() <= 1e-5
    assert np.abs(columns["logp_old"] - columns["logp_mu"]).max() <= 1e-4


def test_each_average_has_the_beta_of_its_decay(traced):
    _, columns, info = traced("exact")
    assert info.beta["ewma"] == pytest.approx(WINDOW / (WINDOW + 2))
    assert 0 < info.beta["ewma-auto"] < WINDOW / (WINDOW + 1)
    assert info.beta["ewma-mean-lag"] != info.beta["ewma"]
    names = [f"logp_{name}" for name in AVERAGES]
    assert not np.array_equal(columns[names[0]], columns[names[1]])
    assert not np.array_equal(columns[names[0]], columns[names[2]])


def test_traces_of_bf16_forward_weights_are_refused(tiny_folder, tmp_path):
    with pytest.raises(ConfigError, match=r"model\.forward_dtype = 'bf16'"):
        record_trace(recipe(tiny_folder, model={"forward_dtype": "bf16"}), tmp_path / "run", 1)
