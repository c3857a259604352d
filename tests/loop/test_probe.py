"""The probe: an engine that does not hold the published version is stopped, whatever its numerics."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from oldlogits.core.engine import EngineSpec, Generation, Span
from oldlogits.core.errors import ProbeError
from oldlogits.core.weights import FullWeights
from oldlogits.engines.embedded.engine import EngineCore
from oldlogits.engines.embedded.numerics import Numerics
from oldlogits.engines.embedded.stepwise import EmbeddedEngine
from oldlogits.loop.probe import AllowedError, ProbeResult, allowed_error, probe
from oldlogits.models.load import load_model, named_weights
from oldlogits.run.run import run
from oldlogits.train.consistency import is_routed
from oldlogits.train.reports import ProbeNoise, PublishedVersion
from oldlogits.train.weights.engine_view import EngineView
from order_desk.tiny import TinyMoeSize, TinySize, save_tiny, tiny_model, tiny_tokenizer

from ..engines.reference import logp_of
from ..runs import events_of, recipe, summary_of

ALL = get_args(Numerics)
EXACT = [name for name in ALL if name != "fp8_dynamic"]
PROBE = torch.randint(12, 99, (60,), generator=torch.Generator().manual_seed(0)).tolist()


class Fixed:
    """An engine that gives every prompt the same log-probs."""

    def __init__(self, *logps: float, version: int = 3) -> None:
        self._logps, self._version = logps, version

    async def generate(self, prompt_ids, sampling, request_id) -> Generation:
        assert sampling.prompt_logprobs
        spans = (Span(version=self._version, start=0, end=1),)
        return Generation(output_ids=(0,), logprobs=(-1.0,), spans=spans, finish_reason="length", prompt_logprobs=self._logps)


def probed(engine: Fixed, *expected: float, allowed: AllowedError) -> ProbeResult:
    return asyncio.run(probe(engine, [1, 2, 3], np.array(expected, np.float32), version=3, allowed=allowed))


def of_publish(
    *, changed: float = 0.0, packing_max: float = 0.0, bf16_mean: float = 0.0, routed: bool = False
) -> PublishedVersion:
    """A version whose probe tokens the engine's numerics change by `changed` nats, and what was measured of noise."""
    logps = np.array([-1.0, -2.0], np.float32)
    return PublishedVersion(
        version=3,
        update=FullWeights(tensors={}),
        probe_logps=logps,
        engine_probe_logps=logps + np.array([changed, -changed], np.float32),
        is_routed=routed,
        probe_noise=ProbeNoise(packing_max=packing_max, bf16_mean=bf16_mean),
        store_bytes=0,
        store_s=0.0,
        publication=None,
    )


MAX, MEAN = AllowedError(statistic="max", nats=0.25), AllowedError(statistic="mean", nats=0.25)
TIES = AllowedError(statistic="max", nats=0.25, routed=True)


def test_the_result_tells_largest_and_mean_difference():
    result = probed(Fixed(-1.0, -2.5), -1.0, -2.25, allowed=MAX)
    assert (result.max_abs_error, result.mean_abs_error, result.num_tokens, result.num_above) == (0.25, 0.125, 2, 0)


@pytest.mark.parametrize(
    ("allowed", "logps", "passes"),
    [
        (MAX, (-1.0, -2.25), True),
        (MAX, (-1.0, -2.25001), False),
        (MAX, (-0.5, -2.0), False),
        (TIES, (-1.0, -2.75), True),  # a tie may move half of the tokens
        (TIES, (-1.5, -2.75), False),
        (MEAN, (-1.0, -2.5), True),
        (MEAN, (-1.25, -2.25), True),
        (MEAN, (-1.0, -2.50001), False),
    ],
)
def test_an_error_as_large_as_allowed_passes_and_a_larger_one_does_not(allowed, logps, passes):
    if passes:
        result = probed(Fixed(*logps), -1.0, -2.0, allowed=allowed)
        assert result.num_above == sum(abs(got - expected) > 0.25 for got, expected in zip(logps, (-1.0, -2.0), strict=True))
        return
    with pytest.raises(ProbeError, match=f"does not hold version 3 as .*; allowed: {allowed.statistic} <= 2e-01 and version 3"):
        probed(Fixed(*logps), -1.0, -2.0, allowed=allowed)


@pytest.mark.parametrize(
    "allowed", [MAX, MEAN, allowed_error("fp32", 1e9, of_publish()), allowed_error("fp8_dynamic", "auto", of_publish()), TIES]
)
@pytest.mark.parametrize(("engine", "trainer"), [(math.nan, -1.0), (-1.0, math.nan), (-math.inf, -1.0), (-math.inf, -math.inf)])
def test_one_log_prob_that_is_not_finite_is_refused(allowed, engine, trainer):
    with pytest.raises(ProbeError, match=r"max (nan|inf), mean (nan|inf) on 2 tokens"), np.errstate(invalid="ignore"):
        probed(Fixed(-2.0, engine), -2.0, trainer, allowed=allowed)


@pytest.mark.parametrize("version", [2, 4])
def test_another_version_tag_is_refused_though_the_log_probs_agree(version):
    with pytest.raises(ProbeError, match=rf"max 0\.00e\+00, .* tagged with versions \[{version}\]"):
        probed(Fixed(-1.0, -2.0, version=version), -1.0, -2.0, allowed=MAX)


def test_numerics_of_weights_allow_rounding_on_any_token_and_a_configured_tolerance_is_a_mean():
    assert {allowed_error(name, "auto", of_publish()) for name in EXACT} == {AllowedError(statistic="max", nats=1e-4)}
    assert {allowed_error(name, 0.0, of_publish(routed=True)) for name in ALL} == {AllowedError(statistic="mean", nats=0.0)}
    assert allowed_error("fp8", 0.5, of_publish(packing_max=1.0)) == AllowedError(statistic="mean", nats=0.5)


def test_what_is_allowed_follows_from_what_was_measured_on_the_probe():
    """10 times the packing noise; 4 times what bf16 arithmetic changes; with fp8_dynamic half of what the numerics change."""
    assert allowed_error("int8", "auto", of_publish(packing_max=2e-3)).nats == pytest.approx(2e-2)
    noisy = of_publish(changed=0.25, bf16_mean=0.02)
    assert allowed_error("bf16", "auto", noisy, arithmetic="bf16") == AllowedError(statistic="mean", nats=pytest.approx(0.08))
    assert allowed_error("fp8_dynamic", "auto", noisy) == AllowedError(statistic="mean", nats=0.125)
    assert allowed_error("fp8_dynamic", "auto", noisy, arithmetic="bf16").nats == pytest.approx(0.205)


@pytest.fixture(scope="module")
def sure_folder(tmp_path_factory) -> Path:
    """A tiny model that is as sure of itself as one after its warm start."""
    return save_sure(TinySize(hidden=32, layers=2, heads=2, kv_heads=1, mlp=48, max_context=128), tmp_path_factory)


@pytest.fixture(scope="module")
def sure_mixture(tmp_path_factory) -> Path:
    """The same with experts."""
    return save_sure(TinyMoeSize(hidden=32, layers=2, heads=2, kv_heads=1, mlp=48, max_context=128), tmp_path_factory)


def save_sure(size: TinySize, tmp_path_factory) -> Path:
    tokenizer = tiny_tokenizer([f"w{i}" for i in range(88)])
    model = tiny_model(size, len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0 if parameter.dim() > 1 else 1.0)
    folder = tmp_path_factory.mktemp("sure")
    save_tiny(folder, model, tokenizer)
    return folder


def one_step_later(folder: Path, lr: float = 5e-4) -> PreTrainedModel:
    """The model after one step of AdamW on other tokens."""
    model = load_model(folder)
    ids = torch.randint(12, 99, (4, 30), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    torch.autograd.backward(model(ids, labels=ids).loss)
    optimizer.step()
    return model


async def probe_of_engine(engine: EmbeddedEngine, held: PreTrainedModel, published: PreTrainedModel, **how) -> ProbeResult:
    """Version 1 is published; the engine is told so, and given the weights of `held`."""
    await engine.pause("keep", "recompute")
    await engine.update_weights(FullWeights(tensors=named_weights(held)), 1)
    await engine.resume()
    numerics = engine.core.spec.numerics
    expected = np.array(logp_of(EngineView(published, how.pop("view", numerics)).model, PROBE), np.float32)
    changed = float(np.abs(expected - np.array(logp_of(published, PROBE), np.float32)).mean())
    measured = of_publish(changed=changed, routed=is_routed(published))
    allowed = how.pop("allowed", allowed_error(numerics, "auto", measured))
    task = asyncio.create_task(probe(engine, PROBE, expected, version=1, allowed=allowed))
    while not task.done():
        engine.drive_once()
        await asyncio.sleep(0)
    return await task


def engine_at(folder: Path, numerics: str) -> EmbeddedEngine:
    return EmbeddedEngine(EngineCore(EngineSpec(model_path=str(folder), numerics=numerics, max_num_seqs=2, max_context=128)))


@pytest.mark.slow
@pytest.mark.parametrize("numerics", ALL)
def test_an_engine_that_holds_the_published_version_passes(sure_folder, numerics):
    new = one_step_later(sure_folder)
    result = asyncio.run(probe_of_engine(engine_at(sure_folder, numerics), new, new))
    assert result.num_tokens == len(PROBE) - 1
    if numerics in EXACT:
        assert result.max_abs_error <= 2e-5


@pytest.mark.slow
@pytest.mark.parametrize("numerics", EXACT)
def test_an_engine_one_small_step_behind_is_caught(sure_folder, numerics):
    old, new = load_model(sure_folder), one_step_later(sure_folder)
    with pytest.raises(ProbeError, match="does not hold version 1"):
        asyncio.run(probe_of_engine(engine_at(sure_folder, numerics), old, new))


@pytest.mark.slow
@pytest.mark.parametrize("numerics", EXACT)
def test_an_engine_with_experts_passes_and_is_caught_one_small_step_behind(sure_mixture, numerics):
    old, new = load_model(sure_mixture), one_step_later(sure_mixture)
    assert asyncio.run(probe_of_engine(engine_at(sure_mixture, numerics), new, new)).num_above == 0
    with pytest.raises(ProbeError, match="does not hold version 1"):
        asyncio.run(probe_of_engine(engine_at(sure_mixture, numerics), old, new))


@pytest.mark.slow
@pytest.mark.parametrize("lr", [5e-4, 3e-3])
def test_an_engine_with_fp8_dynamic_is_caught_when_it_is_behind_by_a_step_that_moves_tokens_as_its_numerics_do(sure_folder, lr):
    old, new = load_model(sure_folder), one_step_later(sure_folder, lr=lr)
    with pytest.raises(ProbeError, match="does not hold version 1"):
        asyncio.run(probe_of_engine(engine_at(sure_folder, "fp8_dynamic"), old, new))


def test_against_live_weights_an_engine_with_fp8_can_hardly_be_told_from_one_that_is_behind(sure_folder):
    """Why the trainer applies the engine's numerics: what the numerics alone explain is as large as a step."""
    old, new = load_model(sure_folder), one_step_later(sure_folder)
    errors = {}
    for name, held in (("right", new), ("behind", old)):
        coarse = {"view": "fp32", "allowed": AllowedError(statistic="mean", nats=0.5)}
        errors[name] = asyncio.run(probe_of_engine(engine_at(sure_folder, "fp8"), held, new, **coarse)).mean_abs_error
    assert errors["right"] > 0.02
    assert errors["behind"] < 2 * errors["right"]


@pytest.fixture
def stuck(monkeypatch):
    """An engine that takes each version's number and, from version 2 on, keeps the weights of version 1."""
    update, kept = EmbeddedEngine.update_weights, {}

    async def keep(self, weights, version):
        if version <= 1:
            kept.update({name: tensor.clone() for name, tensor in weights.tensors.items()})
        await update(self, FullWeights(tensors=kept), version)

    monkeypatch.setattr(EmbeddedEngine, "update_weights", keep)


def low_run(folder: Path, out: Path):
    return run(recipe(folder, num_updates=3, engine={"precision": "fp8"}, trainer={"lr": 5e-4}), out)


@pytest.mark.slow
def test_a_run_stops_at_the_first_version_that_an_fp8_engine_does_not_take_over(stuck, tiny_folder, tmp_path):
    result = low_run(tiny_folder, tmp_path / "run")
    assert isinstance(result.error, ProbeError)
    assert "does not hold version 2" in str(result.error)
    assert [event.version for event in events_of(tmp_path / "run", "probe")] == [0, 1]


@pytest.mark.slow
def test_the_largest_error_of_a_sound_run_is_rounding_with_coarse_numerics_too(tiny_folder, tmp_path):
    assert low_run(tiny_folder, tmp_path / "run").error is None
    assert 0 < summary_of(tmp_path / "run")["probe_max_abs_error"] <= 1e-4
    assert summary_of(tmp_path / "run")["log_r_d_mean_abs"] > 1e-3, "the discrepancy that is trained on stays"
