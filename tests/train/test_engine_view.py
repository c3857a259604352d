"""The trainer's view of the engine's numerics against the engine itself."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch

from oldlogits.core.engine import EngineSpec, Sampling
from oldlogits.engines.embedded.engine import EngineCore
from oldlogits.engines.embedded.numerics import Numerics
from oldlogits.models.load import load_model, named_weights
from oldlogits.run.specs import trainer_spec
from oldlogits.train.trainer import Trainer
from oldlogits.train.weights import engine_view
from oldlogits.train.weights.engine_view import EngineView, engine_weights

from ..builders import batch_of, sampled, trajectory
from ..engines.reference import MODELS, VOCAB, load, logp_of, make_model, perturbed, save, weights_of

ALL = get_args(Numerics)
EXACT = [name for name in ALL if name != "fp8_dynamic"]


def random_ids(num: int, seed: int = 0) -> list[int]:
    return torch.randint(VOCAB, (num,), generator=torch.Generator().manual_seed(seed)).tolist()


def view_logps(model, ids: list[int], numerics: Numerics) -> np.ndarray:
    return np.array(logp_of(EngineView(model, numerics).model, ids), np.float32)


def engine_of(folder, numerics) -> EngineCore:
    return EngineCore(EngineSpec(model_path=str(folder), numerics=numerics, max_num_seqs=2, max_context=128))


def logps_of(core: EngineCore, ids: list[int]) -> np.ndarray:
    core.add("probe", ids, Sampling(max_tokens=1, prompt_logprobs=True))
    [(_, generation)] = core.step()
    return np.array(generation.prompt_logprobs, np.float32)


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "qwen3", "qwen3 top-1 of 4 experts"])
def test_with_rounded_activations_the_view_is_the_engine_but_where_a_last_bit_changes_a_code(name, tmp_path):
    errors = []
    for seed in range(7):
        model, ids = make_model(name, seed), random_ids(40, seed)
        core = engine_of(save(model, tmp_path / str(seed)), "fp8_dynamic")
        errors.append(np.abs(view_logps(model, ids, "fp8_dynamic") - logps_of(core, ids)))
    assert np.median([error.max() for error in errors]) <= 1e-4
    assert max(error.mean() for error in errors) <= 0.03


def test_rounded_weights_send_a_few_tokens_to_another_expert_and_those_differ_most():
    model = make_model("qwen3 top-1 of 4 experts")
    ids = torch.randint(VOCAB, (8, 60), generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def look(model) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs of all tokens of the vocabulary, and the expert in every layer."""
        experts: list[torch.Tensor] = []
        hooks = [
            layer.mlp.gate.register_forward_hook(lambda *seen: experts.append(seen[-1][2])) for layer in model.model.layers
        ]
        logps = torch.log_softmax(model(ids).logits, -1).flatten(0, 1)
        for hook in hooks:
            hook.remove()
        return logps, torch.cat(experts, 1)

    logps, experts = look(model)
    rounded, others = look(EngineView(model, "fp8").model)
    flipped = (experts != others).any(1)
    distance = (logps - rounded).abs().mean(1)
    assert 0 < flipped.float().mean() < 0.1
    assert distance[flipped].mean() > 2 * distance[~flipped].mean()


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


@pytest.mark.slow
@pytest.mark.parametrize("numerics", EXACT)
def test_a_publication_carries_both_views_of_the_probe(numerics, tiny_folder, recipe):
    probe_ids = [3, 9, 10, 11, 12, 2, 4, 13]
    trainer = Trainer(trainer_spec(recipe(engine={"precision": numerics})), tiny_folder, probe_ids)
    published = trainer.publish()
    np.testing.assert_allclose(published.probe_logps, logp_of(load_model(tiny_folder), probe_ids), rtol=0, atol=2e-6)
    expected = logps_of(engine_of(tiny_folder, numerics), probe_ids)
    np.testing.assert_allclose(published.engine_probe_logps, expected, rtol=0, atol=1e-5)
    assert (published.engine_probe_logps.tolist() == published.probe_logps.tolist()) is (numerics == "fp32")
    stored = named_weights(load_model(tiny_folder))
    assert all(torch.equal(stored[name], weight) for name, weight in published.update.tensors.items())


NO_SOURCE = {"variant": "ppo_clip_train_infer", "proximal": {"source": "none"}}
PROBE = [3, 9, 10, 11, 12, 2, 4, 13]
SAID = [[14, 15, 16, 17, 2], [18, 2], [19, 20, 21]]


def batch_at(version: int, temperature: float):
    """Three sequences of different lengths; the last is sampled at temperature 1."""
    logps = [[-0.5 - 0.1 * i for i in range(len(said))] for said in SAID]
    made = [
        trajectory([3, 9], sampled(said, version, logp=logp, temperature=t), id=f"g0.{i}")
        for i, (said, logp, t) in enumerate(zip(SAID, logps, (temperature, temperature, 1.0), strict=True))
    ]
    return batch_of(made, [1.0, -1.0, 0.5]), [logp for one in logps for logp in one]


def step(trainer: Trainer, version: int) -> None:
    """An update of its own kind, so that versions differ."""
    batch, _ = batch_at(version, 0.7)
    trainer.put_batch(batch)
    trainer.train(None)


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch_tokens", [1, 1000])
@pytest.mark.parametrize("numerics", EXACT)
def test_a_batch_is_scored_with_the_published_weights_in_the_engines_numerics(
    numerics, micro_batch_tokens, tiny_folder, recipe
):
    sizes = {"micro_batch_tokens": micro_batch_tokens, "head_chunk_tokens": 2}
    trainer = Trainer(trainer_spec(recipe(**NO_SOURCE, engine={"precision": numerics}, trainer=sizes)), tiny_folder, PROBE)
    trainer.publish()
    step(trainer, 0)
    weights = {name: weight.clone() for name, weight in trainer.publish().update.tensors.items()}
    model = EngineView(load(load_model(tiny_folder), weights), numerics).model
    batch, mu = batch_at(1, 0.7)
    trainer.put_batch(batch)
    expected = [logp for said, t in zip(SAID, (0.7, 0.7, 1.0), strict=True) for logp in logp_of(model, [3, 9, *said], t)[1:]]
    found = trainer.scorer.score_engine(np.arange(len(expected)))
    np.testing.assert_allclose(found.values, expected, rtol=0, atol=5e-6)
    np.testing.assert_array_equal(found.logp_mu, np.float32(mu))
    some = trainer.scorer.score_engine(np.array([1, 4, 8]))
    np.testing.assert_allclose(some.values, np.array(expected)[[1, 4, 8]], rtol=0, atol=5e-6)
    np.testing.assert_array_equal(some.logp_mu, np.float32(mu)[[1, 4, 8]])


def test_the_weights_are_rounded_once_per_version(tiny_folder, recipe, monkeypatch):
    trainer, rounded = Trainer(trainer_spec(recipe(**NO_SOURCE, engine={"precision": "fp8"})), tiny_folder, PROBE), []
    monkeypatch.setattr(engine_view, "engine_weights", lambda *args: rounded.append(1) or engine_weights(*args))
    for version in range(2):
        trainer.publish()
        batch, _ = batch_at(version, 1.0)
        trainer.put_batch(batch)
        for _ in range(3):
            trainer.scorer.score_engine(np.arange(10))
        step(trainer, version)
    assert len(rounded) == 2


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_the_view_keeps_its_storage_and_shares_none(name):
    model = make_model(name)
    view = EngineView(model, "int8")
    held = [weight.data_ptr() for weight in view.model.parameters()]
    assert len(set(held)) == len(held)
    assert not {*held} & {weight.data_ptr() for weight in model.parameters()}
    weights = perturbed(weights_of(model), seed=1)
    view.hold(load(model, weights))
    assert [weight.data_ptr() for weight in view.model.parameters()] == held
    ids = random_ids(20)
    assert logp_of(view.model, ids) == logp_of(EngineView(model, "int8").model, ids)


@pytest.mark.slow
def test_scoring_as_the_engine_changes_neither_the_trainers_own_scores_nor_its_training(tiny_folder, recipe):
    ended = []
    for looks in (False, True):
        trainer = Trainer(trainer_spec(recipe(**NO_SOURCE, engine={"precision": "fp8_dynamic"})), tiny_folder, PROBE)
        for version in range(2):
            trainer.publish()
            batch, _ = batch_at(version, 0.7)
            trainer.put_batch(batch)
            if looks:
                trainer.scorer.score_engine(np.arange(10))
            scores = trainer.scorer.score(np.arange(10), None)
            trainer.train(None)
        ended.append((scores.tolist(), {name: w.clone() for name, w in trainer.publish().update.tensors.items()}))
    assert ended[0][0] == ended[1][0]
    assert all(torch.equal(weight, ended[1][1][name]) for name, weight in ended[0][1].items())


@pytest.mark.slow
@pytest.mark.parametrize("window", [0, 2])
def test_the_noise_of_the_probe_is_kept_for_the_versions_within_the_bound(window, tiny_folder, recipe):
    trainer = Trainer(trainer_spec(recipe(**NO_SOURCE, engine={"precision": "int4"}, max_staleness=window)), tiny_folder, PROBE)
    expected = {}
    for version in range(5):
        published = trainer.publish()
        expected[version] = published.engine_probe_logps - published.probe_logps
        batch, _ = batch_at(version, 0.7)
        trainer.put_batch(batch)
        noise = trainer.scorer.score_engine(np.arange(1)).noise
        assert list(noise) == list(range(max(0, version - window), version + 1))
        assert all(np.array_equal(noise[v], expected[v]) and np.abs(noise[v]).max() > 1e-3 for v in noise)
        step(trainer, version)


def test_an_fp32_engine_scores_as_the_trainer(tiny_folder, recipe):
    trainer = Trainer(trainer_spec(recipe(**NO_SOURCE)), tiny_folder, PROBE)
    trainer.publish()
    batch, _ = batch_at(0, 0.7)
    trainer.put_batch(batch)
    found = trainer.scorer.score_engine(np.arange(10))
    assert found.values.tolist() == trainer.scorer.score(np.arange(10), None).tolist()
    assert not found.noise[0].any()
