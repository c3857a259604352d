"""The calibration at lag 0: figures from the recorded tokens, warnings at their edges, and a training that does not notice."""

from __future__ import annotations

import asyncio
import functools
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch

from oldlogits.config.load import config_from_table
from oldlogits.core.errors import MissingLogprobError
from oldlogits.engines.embedded.slots import SlotTable
from oldlogits.loop.calibration import BANDS, MISMATCH, ROUNDING, Calibrator
from oldlogits.record.events import Calibrated
from oldlogits.record.report.data import read_run
from oldlogits.run.run import run
from tests.memory_log import without_wall_clock

from ..builders import batch_of, sampled, trajectory
from ..runs import events_of, recipe, summary_of, tokens_of

INF, NAN = math.inf, math.nan
EVERYTHING = 3 * 4
"""Trajectories of a version of `recipe`."""


@pytest.fixture(scope="module")
def calibrated(tiny_folder, tmp_path_factory):
    """Train one update with an engine of these numerics, everything calibrated; the run folder. Read it only."""
    root = tmp_path_factory.mktemp("calibration")

    @functools.cache
    def train(numerics: str, variant: str = "decoupled_exact", source: str = "snapshot", band: float = 1.03) -> Path:
        out = root / f"{numerics}-{variant}-{band}"
        config = recipe(
            tiny_folder,
            num_updates=1,
            variant=variant,
            band=band,
            proximal={"source": source},
            engine={"precision": numerics},
            eval={"num_episodes": 0, "num_calibration": EVERYTHING},
        )
        assert run(config, out).error is None
        return out

    return train


def fields_of(out: Path) -> dict:
    [event] = events_of(out, "calibration")
    return dict(event.recorded())


def names_of(out: Path) -> list[str]:
    return [str(event.name) for event in events_of(out, "warning")]


@pytest.mark.slow
@pytest.mark.parametrize("numerics", ["fp8", "int4"])
def test_the_shares_are_those_of_the_recorded_log_probs_and_kept_is_the_first_updates_own_band_mask(calibrated, numerics):
    found = fields_of(calibrated(numerics))
    tokens = tokens_of(calibrated(numerics), "logp_mu", "logp_proximal", "trajectory", "band_mask", "staleness")
    r_d = np.exp(tokens["logp_proximal"].astype(np.float64) - tokens["logp_mu"])
    assert not tokens["staleness"].any()
    assert found["bands"] == [1.01, 1.02, 1.03, 1.05, 1.1, 1.2, 1.5, 2.0, 3.0]
    oracle = [np.mean((r_d > band) | (r_d < 1 / band)) for band in found["bands"]]
    assert found["masked"] == pytest.approx(oracle, abs=1e-12)
    assert found["masked"] == sorted(found["masked"], reverse=True)
    assert found["kept"] == pytest.approx(tokens["band_mask"].mean(), abs=1e-12)
    assert 1 - found["kept"] == pytest.approx(found["masked"][2])
    assert 0 < found["masked"][2] < found["masked"][0] < 1
    assert (found["num_tokens"], found["num_trajectories"]) == (len(r_d), EVERYTHING)
    assert found["log_r_d_abs_mean"] == pytest.approx(np.abs(np.log(r_d)).mean(), rel=1e-5)
    assert found["log_r_d_abs_max"] == pytest.approx(np.abs(np.log(r_d)).max(), rel=1e-5)
    assert found["r_d_mean"] == pytest.approx(r_d.mean(), rel=1e-6)
    clusters = [(r_d - r_d.mean())[tokens["trajectory"] == name].sum() for name in sorted(set(tokens["trajectory"]))]
    error = math.sqrt(sum(c * c for c in clusters) * EVERYTHING / (EVERYTHING - 1)) / len(r_d)
    assert found["r_d_mean_error"] == pytest.approx(error, rel=1e-4)


@pytest.mark.slow
def test_an_fp32_engine_has_no_noise_that_any_band_would_mask(calibrated):
    found = fields_of(calibrated("fp32"))
    assert set(found["masked"]) == {0.0}
    assert (found["kept"], found["log_r_d_abs_max"] < 1e-4) == (1, True)
    assert found["r_d_mean"] == pytest.approx(1, abs=1e-5)
    assert names_of(calibrated("fp32")) == []


@pytest.mark.slow
def test_the_proximal_policy_does_not_change_what_is_measured(calibrated):
    exact = fields_of(calibrated("int4"))
    for variant, source in (("decoupled_async", "arrival"), ("ppo_clip_train_infer", "none"), ("ppo_ewma", "ewma")):
        found = fields_of(calibrated("int4", variant, source))
        shares = dict(zip(found["bands"], found["masked"], strict=True))
        expected = dict(zip(exact["bands"], exact["masked"], strict=True))
        assert shares == pytest.approx({band: expected[band] for band in shares}, abs=1e-12)
        assert found["kept"] == (exact["kept"] if variant == "decoupled_async" else 1)


@pytest.mark.slow
def test_of_an_interpolation_the_kept_share_is_that_of_its_own_mask_before_the_first_step(calibrated):
    found = fields_of(calibrated("int4", "loglinear_train_infer", "none"))
    tokens = tokens_of(calibrated("int4"), "logp_mu", "logp_proximal")
    log_total = tokens["logp_proximal"].astype(np.float64) - tokens["logp_mu"]  # theta is old: X/mu = R^(1 - a), a = 0.5
    assert found["kept"] == pytest.approx(np.mean(np.abs(0.5 * log_total) <= math.log(1.03)), abs=1e-12)


@pytest.mark.slow
def test_warnings_are_events_with_figures_lines_on_the_console_and_notes_in_the_report(tiny_folder, tmp_path, capsys):
    more = {"num_updates": 1, "engine": {"precision": "int4"}, "trainer": {"minibatches_per_update": 1}}
    config = recipe(tiny_folder, variant="decoupled_async", proximal={"source": "arrival"}, band=1.03, **more)
    run(config, tmp_path / "run")
    found = fields_of(tmp_path / "run")
    assert found["kept"] < config.proximal.reset_below
    clip, band = events_of(tmp_path / "run", "warning")
    assert (clip.name, clip.figures) == ("no-clip", {"minibatches_per_update": 1, "clipped": 0})
    assert (band.name, band.version) == ("tight-band", 0)
    assert band.figures == {"band": 1.03, "kept": found["kept"], "tau": 0.9}
    [update] = events_of(tmp_path / "run", "update")
    assert update.metrics["mask/rho_clip"] == 1  # the warning is right
    assert update.metrics["mask/rho_band"] == pytest.approx(found["kept"], abs=1e-6)
    said = capsys.readouterr().out
    page = (tmp_path / "run" / "report.html").read_text()
    for message in (str(clip.message), str(band.message)):
        assert said.count(f"warning: {message}\n") == 1
        assert page.count(f"<li>Warning: {message}".replace("'", "&#39;")) == 1
    assert "   *1.03 " in said
    assert "The engine&#39;s own noise" in page
    assert "1.03 (this run)" in page


@pytest.mark.slow
@pytest.mark.parametrize(
    "variant, source",
    [("ppo_ewma_train_infer", "ewma"), ("aged_train_infer", "aged"), ("rescore_train_infer", "rescore")],
)
def test_where_nothing_is_stale_one_step_starts_at_the_proximal_policy_and_the_warning_says_so(
    variant, source, tiny_folder, tmp_path
):
    more = {"max_staleness": 0, "lockstep": {"max_lag": 0}, "trainer": {"minibatches_per_update": 1}}
    config = recipe(
        tiny_folder, variant=variant, proximal={"source": source}, num_updates=2, engine={"precision": "int4"}, **more
    )
    assert run(config, tmp_path / "run").error is None
    assert "no-clip" in names_of(tmp_path / "run")
    tokens = tokens_of(tmp_path / "run", "log_r_s", "log_r_d", "clip_mask")
    assert abs(tokens["log_r_s"]).max() < 1e-4 < abs(tokens["log_r_d"]).max()
    assert tokens["clip_mask"].all()


@pytest.mark.slow
@pytest.mark.parametrize("variant, source", [("decoupled_exact", "snapshot"), ("loglinear_prox", "none")])
def test_training_is_the_same_bit_for_bit_with_and_without_it(variant, source, tiny_folder, tmp_path):
    def train(num: int) -> Path:
        more = {"engine": {"precision": "int4"}, "eval": {"num_episodes": 0, "num_calibration": num}}
        config = recipe(tiny_folder, variant=variant, proximal={"source": source}, num_updates=3, **more)
        assert run(config, tmp_path / str(num)).error is None
        return tmp_path / str(num)

    without, with_it = train(0), train(5)
    one, other = (load_file(out / "checkpoints/v000003/model/model.safetensors") for out in (without, with_it))
    assert all(np.array_equal(one[name], other[name]) for name in one)
    for version in (1, 2, 3):
        name = f"tokens/v{version:06d}.parquet"
        assert (without / name).read_bytes() == (with_it / name).read_bytes()
    assert (without / "episodes.jsonl").read_bytes() == (with_it / "episodes.jsonl").read_bytes()

    def plain(out: Path) -> list[object]:
        lines = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
        kept = [line for line in lines if line["kind"] not in ("calibration", "warning")]
        return [{key: value for key, value in without_wall_clock(line).items() if key != "seq"} for line in kept]

    assert plain(without) == plain(with_it)
    assert fields_of(with_it)["num_trajectories"] == 5
    assert events_of(without, "calibration") == []
    assert without_wall_clock(summary_of(without)) == without_wall_clock(summary_of(with_it))
    assert read_run(without).calibration is None


@pytest.mark.slow
def test_a_resumed_run_is_not_calibrated_again_and_its_report_says_each_warning_once(tiny_folder, tmp_path):
    config = recipe(tiny_folder, num_updates=1, max_staleness=0, lockstep={"max_lag": 0}, trainer={"minibatches_per_update": 1})
    run(config, tmp_path / "run")
    run(replace(config, num_updates=2), tmp_path / "run", resume=True)
    assert len(events_of(tmp_path / "run", "update")) == 2
    assert [event.version for event in events_of(tmp_path / "run", "calibration")] == [0]
    assert names_of(tmp_path / "run") == ["no-clip", "no-clip"]
    assert len(read_run(tmp_path / "run").warnings) == 1


def test_an_engine_without_log_probs_ends_the_run_before_anything_is_trained(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(SlotTable, "output_logprobs", lambda self, request, start=0: [])
    result = run(recipe(tiny_folder), tmp_path / "run")
    assert isinstance(result.error, MissingLogprobError)
    assert result.error.fix.startswith("ask the engine for the log-probs")
    assert result.summary.num_updates == 0
    assert events_of(tmp_path / "run", "update") == []


class Trainer:
    """OLD as given."""

    def __init__(self, old):
        self.old = np.array(old, np.float32)

    async def score(self, tokens, at):
        assert at is None
        return self.old[tokens]


def calibrated_on(batch, config, old, expected_noise=0.0):
    """Calibrate on a batch that a trainer gives these log-probs; what was measured."""
    told = []
    calibrator = replace(config, trainer=Trainer(old), events=SimpleNamespace(emit=told.append))
    calibrator.expect(SimpleNamespace(engine_probe_logps=np.array([expected_noise]), probe_logps=np.zeros(1)))
    asyncio.run(calibrator.measure(batch, version=0))
    return told[0]


@pytest.mark.parametrize("expected_noise, mu, old, refused", [
    (1e-3, (-1.0, -0.5), (-1.0, -0.5), True),
    (2e-5, (-1.0, -0.5), (-1.0, -0.500005), True),
    (1e-3, (-1.0, -0.5), (-1.0, -0.501), False),
    (1e-3, (-1e-7, -1e-7), (-1e-7, -1e-7), False),  # certain tokens: every engine gives them 1
    (9e-6, (-1.0, -0.5), (-1.0, -0.5), False),  # fp32, or weights on the engine's grid: no noise to expect
])  # fmt: skip
def test_log_probs_that_cannot_be_the_engines_own_are_refused(expected_noise, mu, old, refused):
    batch = batch_of([trajectory([1], sampled([2, 3], logp=mu))])
    config = config_of(engine={"precision": "fp8"})
    if refused:
        with pytest.raises(MissingLogprobError, match="r_d is 1 on all 2 tokens, though the engine computes in fp8"):
            calibrated_on(batch, config, old, expected_noise)
    else:
        assert calibrated_on(batch, config, old, expected_noise).num_tokens == 2


def rounded_to_bf16(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    for file in to.glob("*.safetensors"):
        weights = {name: values.bfloat16().float().contiguous() for name, values in load_torch(file).items()}
        save_torch(weights, file, metadata={"format": "pt"})
    return to


@pytest.mark.slow
def test_a_checkpoint_that_lies_on_the_engines_grid_trains_though_r_d_is_1_at_version_0(tiny_folder, tmp_path):
    model = rounded_to_bf16(tiny_folder, tmp_path / "model")
    config = recipe(model, num_updates=2, engine={"precision": "bf16"})
    result = run(config, tmp_path / "run")
    assert (result.error, result.summary.num_updates) == (None, 2)
    found = fields_of(tmp_path / "run")
    assert found["log_r_d_abs_max"] <= ROUNDING
    assert found["num_tokens"] > 0
    tokens = tokens_of(tmp_path / "run", "log_r_d", "version")
    assert abs(tokens["log_r_d"]).max() > ROUNDING, "after a step the weights are off the grid"


@pytest.mark.slow
def test_log_probs_of_the_trainer_in_place_of_the_engines_end_the_run(tiny_folder, tmp_path, monkeypatch):
    measured = Calibrator.measure

    async def substituted(calibrator, batch, **known):
        calibrator.trainer = Trainer(batch.logp_mu[batch.loss_mask])
        await measured(calibrator, batch, **known)

    monkeypatch.setattr(Calibrator, "measure", substituted)
    result = run(recipe(tiny_folder, engine={"precision": "bf16"}), tmp_path / "run")
    assert isinstance(result.error, MissingLogprobError)
    assert "though the engine computes in bf16" in result.error.what
    assert events_of(tmp_path / "run", "update") == []


def test_the_trajectories_measured_are_evenly_spaced_over_the_batch():
    """Trajectory i has one token of r_d 1 + i / 100."""
    trajectories = [trajectory([1], sampled([2]), id=f"g0.{i}") for i in range(9)]
    old = [-1 + math.log(1 + i / 100) for i in range(9)]
    for num, chosen in ((1, [0]), (2, [0, 8]), (3, [0, 4, 8]), (5, [0, 2, 4, 6, 8]), (100, range(9))):
        config = config_of(eval={"num_calibration": num})
        found = calibrated_on(batch_of(trajectories), config, old)
        assert found.num_trajectories == len(chosen)
        assert found.r_d_mean == pytest.approx(1 + sum(chosen) / len(chosen) / 100, rel=1e-6)


# The figures and the doubts alone.


def config_of(variant="decoupled_exact", **table):
    return Calibrator.of(config_from_table({"variant": variant, **table}), None, None)


def measured(log_r_d, sequence=None, config=None):
    sequence = range(len(log_r_d)) if sequence is None else sequence
    return (config or config_of()).figures(np.array(log_r_d, np.float32), np.array(sequence, np.int64), version=0)


@pytest.mark.slow
@given(st.lists(st.floats(-1.5, 1.5, width=32), min_size=1, max_size=40), st.floats(1.005, 4))
def test_a_wider_band_never_masks_more_and_each_share_counts_the_tokens_outside(log_r_d, band):
    found = measured(log_r_d, config=config_of(band=band))
    assert list(found.bands) == sorted({*BANDS, band})
    assert list(found.masked) == sorted(found.masked, reverse=True)
    for bound, share in zip(found.bands, found.masked, strict=True):
        edge = np.float32(math.log(bound))
        assert share == pytest.approx(sum(abs(np.float32(x)) > edge for x in log_r_d) / len(log_r_d))
        assert bound != band or found.kept == pytest.approx(1 - share)


def test_a_token_without_a_finite_ratio_counts_as_masked_and_not_into_the_means():
    found = measured([0.0, math.log(1.25), NAN, INF])
    assert found.masked[BANDS.index(1.2)] == 0.75
    assert found.masked[BANDS.index(3.0)] == 0.5
    assert found.log_r_d_abs_mean == pytest.approx(math.log(1.25) / 2)
    assert found.r_d_mean == pytest.approx(1.125)
    nothing = measured([NAN, NAN])
    assert nothing.masked == (1,) * len(BANDS)
    assert list(config_of("ppo_clip").doubts(nothing)) == []


def test_the_standard_error_counts_trajectories_not_tokens():
    """Two trajectories of two tokens, r_d 1.5 and 0.5: cluster sums of deviations 1 and -1; sqrt(2 / 1 * 2) / 4 = 0.5."""
    high, low = math.log(1.5), math.log(0.5)
    assert measured([high, high, low, low], [0, 0, 1, 1]).r_d_mean_error == pytest.approx(0.5)
    assert measured([high, low, high, low], [0, 0, 1, 1]).r_d_mean_error == pytest.approx(0)
    assert measured([high, low], [7, 7]).r_d_mean_error == INF


QUIET = Calibrated(
    version=0, num_trajectories=9, num_tokens=99, log_r_d_abs_mean=0.0, log_r_d_abs_max=0.0, r_d_mean=1.0, r_d_mean_error=1e-3,
    bands=(1.1, 1.5, 2.0), masked=(0.3, 0.1, 0.0), kept=1.0,
)  # fmt: skip


@pytest.mark.parametrize("num_calibration", [0, 2])
@pytest.mark.parametrize("kind", ["packing", "rounding"])
@pytest.mark.parametrize(
    ("band", "noise", "warned"),
    [(1.01, 0.02, True), (1.02, 0.02, True), (1.05, 0.02, False), (1.01, NAN, False), (INF, 9.0, False)],
)
def test_a_band_inside_the_packing_noise_is_warned_of_with_figures_whether_the_engine_is_measured_or_not(
    num_calibration, kind, band, noise, warned
):
    """What bf16 rounds off bounds what other packings do than those that were tried, which may agree to the bit."""
    told = []
    config = config_of(band=band, eval={"num_calibration": num_calibration})
    calibrator = replace(config, trainer=Trainer([-1.0, -0.5]), events=SimpleNamespace(emit=told.append))
    batch = batch_of([trajectory([1], sampled([2, 3], logp=(-1.0, -0.5)))])
    given = {"packing_noise": 0.0, "rounding_noise": 0.0, f"{kind}_noise": noise}
    asyncio.run(calibrator.measure(batch, version=0, **given))
    found = [event for event in told if getattr(event, "name", "") == "band-in-noise"]
    assert len(found) == warned
    if warned:
        assert found[0].figures == {"band": band, "noise_max": noise}
        assert "a band of 1.041 or more stands above it" in found[0].message
        assert "same-shape" not in found[0].message, "the band is on OLD / MU, and MU is of no micro-batch"


def doubted(found, config):
    return {caution.name: caution for caution in config.doubts(found)}


@pytest.mark.parametrize("kept, expected", [(0.9, set()), (0.8999, {"tight-band"}), (0.0, {"tight-band"})])
def test_a_band_that_keeps_less_than_tau_at_lag_0_is_warned_of_with_one_that_would_do(kept, expected):
    found = doubted(replace(QUIET, kept=kept), config_of(band=1.1))
    assert found.keys() == expected
    for caution in found.values():
        assert caution.figures == {"band": 1.1, "kept": kept, "tau": 0.9}
        assert "band = 1.5 would keep enough" in caution.message
    assert doubted(replace(QUIET, kept=kept), config_of("ppo_clip")) == {}  # has no band
    assert doubted(replace(QUIET, kept=0.95), config_of(proximal={"reset_below": 0.99})).keys() == {"tight-band"}
    no_band_does = replace(QUIET, kept=0.5, masked=(0.6, 0.5, 0.4))
    assert "would keep enough" not in doubted(no_band_does, config_of(band=1.1))["tight-band"].message


@pytest.mark.parametrize("variant", ["ppo_clip", "ppo_ewma", "linear_prox", "loglinear_prox", "ppo_clip_train_infer"])
def test_a_mismatch_that_r_d_leaves_alone_is_warned_of_above_the_threshold(variant):
    assert doubted(replace(QUIET, log_r_d_abs_mean=MISMATCH), config_of(variant)) == {}
    found = doubted(replace(QUIET, log_r_d_abs_mean=1.5 * MISMATCH), config_of(variant))
    assert found["mismatch"].figures == {"log_r_d_abs_mean": 1.5 * MISMATCH, "threshold": MISMATCH}
    where = "the clipped ratio" if variant == "ppo_clip_train_infer" else "the gradient, uncorrected"
    assert f"between the engines in {where}: mean |log r_d| = 0.015 nats" in found["mismatch"].message
    assert doubted(replace(QUIET, log_r_d_abs_mean=1.5 * MISMATCH), config_of("decoupled_exact")) == {}


def test_a_mean_of_r_d_beyond_four_standard_errors_and_rounding_is_warned_of():
    for mean, error, expected in ((1.0039, 1e-3, 0), (1.0041, 1e-3, 1), (0.9959, 1e-3, 1), (1.0009, 0, 0), (0.9989, 0, 1)):
        found = doubted(replace(QUIET, r_d_mean=mean, r_d_mean_error=error), config_of())
        assert len(found) == expected, (mean, error)
        assert all(caution.figures == {"r_d_mean": mean, "r_d_mean_error": error} for caution in found.values())


@pytest.mark.parametrize("truncated", [False, True])
def test_an_engine_that_samples_from_a_part_of_the_support_is_found_out_by_the_mean(truncated):
    """top-p 0.9 with renormalised log-probs: the mean of old/mu is the mass that is left; with full support it is 1."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (400, 30))
    noisy = logits + rng.normal(0, 0.1, logits.shape)  # the engine's
    old, mu = (np.exp(x) / np.exp(x).sum(axis=1, keepdims=True) for x in (logits, noisy))
    if truncated:
        order = np.argsort(-mu, axis=1)
        before = np.cumsum(np.take_along_axis(mu, order, 1), axis=1) - np.take_along_axis(mu, order, 1)
        np.put_along_axis(mu, order, np.where(before < 0.9, np.take_along_axis(mu, order, 1), 0), 1)
        mu /= mu.sum(axis=1, keepdims=True)
    drawn = [rng.choice(30, p=p) for p in mu]
    log_r_d = [math.log(o[t] / m[t]) for o, m, t in zip(old, mu, drawn, strict=True)]
    found = measured(log_r_d, [i // 8 for i in range(400)], config=config_of(band=3.0))
    assert ("two-distributions" in doubted(found, config_of(band=3.0))) is truncated
    placeholder = measured([math.log(o[t]) for o, t in zip(old, drawn, strict=True)])  # log mu = 0 for want of a log-prob
    assert "two-distributions" in doubted(placeholder, config_of())
