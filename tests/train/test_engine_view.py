"""The trainer's view of the engine's numerics against the engine itself."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch

from oldlogits.core.protocols import Sampling
from oldlogits.policy.model import load_model, named_weights
from oldlogits.rollout.embedded import EngineCore
from oldlogits.rollout.numerics import Numerics
from oldlogits.rollout.spec import EngineSpec
from oldlogits.train.engine_view import EngineView
from oldlogits.train.trainer import Trainer

from ..rollout.reference import MODELS, VOCAB, load, logp_of, make_model, perturbed, save, weights_of

ALL = get_args(Numerics)
EXACT = [name for name in ALL if name != "fp8_dynamic"]


def random_ids(num: int, seed: int = 0) -> list[int]:
    return torch.randint(VOCAB, (num,), generator=torch.Generator().manual_seed(seed)).tolist()


def view_logps(model, ids: list[int], numerics: Numerics) -> np.ndarray:
    return np.array(logp_of(EngineView(model, numerics).model, ids), np.float32)


def engine_of(folder, numerics) -> EngineCore:
    return EngineCore(EngineSpec(model_path=str(folder), numerics=numerics, num_slots=2, max_context=128))


def logps_of(core: EngineCore, ids: list[int]) -> np.ndarray:
    core.add("probe", ids, Sampling(max_tokens=1, prompt_logprobs=True))
    [(_, generation)] = core.step()
    return np.array(generation.prompt_logprobs, np.float32)


@pytest.mark.parametrize("name", MODELS)  # tied and untied, with and without biases and norms of queries and keys
@pytest.mark.parametrize("numerics", EXACT)
def test_the_view_is_what_an_engine_of_the_same_weights_returns(name, numerics, tmp_path):
    model, ids = make_model(name), random_ids(100)
    core = engine_of(save(model, tmp_path), numerics)
    np.testing.assert_allclose(view_logps(model, ids, numerics), logps_of(core, ids), rtol=0, atol=1e-5)
    weights = perturbed(weights_of(model), seed=1)
    core.pause("keep", "recompute")
    core.update_weights(weights, 1)
    core.resume()
    np.testing.assert_allclose(view_logps(load(model, weights), ids, numerics), logps_of(core, ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "qwen3", "qwen3 top-1 of 4 experts"])
def test_with_rounded_activations_the_view_is_the_engine_but_where_a_last_bit_changes_a_code(name, tmp_path):
    errors = []
    for seed in range(7):
        model, ids = make_model(name, seed), random_ids(40, seed)
        core = engine_of(save(model, tmp_path / str(seed)), "fp8_dynamic")
        errors.append(np.abs(view_logps(model, ids, "fp8_dynamic") - logps_of(core, ids)))
    assert np.median([error.max() for error in errors]) <= 1e-4
    assert max(error.mean() for error in errors) <= 0.03


@pytest.mark.parametrize("numerics", ALL)
def test_the_view_moves_away_from_the_live_weights_with_coarse_numerics_only(numerics):
    model, ids = make_model("qwen3"), random_ids(60)
    difference = np.abs(view_logps(model, ids, numerics) - logp_of(model, ids)).mean()
    low, high = {"fp32": (0, 1e-5), "bf16": (1e-3, 0.02), "int8": (1e-3, 0.05)}.get(numerics, (0.02, 0.5))
    assert low <= difference <= high


@pytest.mark.parametrize("numerics", ALL)
def test_looking_leaves_the_model_as_it_was(numerics):
    model, ids = make_model("qwen3"), random_ids(20)
    before, logps = weights_of(model), logp_of(model, ids)
    view_logps(model, ids, numerics)
    assert all(torch.equal(before[name], weight) for name, weight in model.named_parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight, "a tied head stays tied"
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert logp_of(model, ids) == logps, "nothing goes on rounding"


@pytest.mark.parametrize("numerics", EXACT)
def test_a_publication_carries_both_views_of_the_probe(numerics, tiny_folder, recipe):
    probe_ids = [3, 9, 10, 11, 12, 2, 4, 13]
    trainer = Trainer(recipe(engine={"numerics": numerics}), tiny_folder, probe_ids)
    published = trainer.publish()
    np.testing.assert_allclose(published.probe_logps, logp_of(load_model(tiny_folder), probe_ids), rtol=0, atol=2e-6)
    expected = logps_of(engine_of(tiny_folder, numerics), probe_ids)
    np.testing.assert_allclose(published.engine_probe_logps, expected, rtol=0, atol=1e-5)
    assert (published.engine_probe_logps.tolist() == published.probe_logps.tolist()) is (numerics == "fp32")
    stored = named_weights(load_model(tiny_folder))
    assert all(torch.equal(stored[name], weight) for name, weight in published.weights.items())
