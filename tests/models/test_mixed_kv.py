"""The mixed-version forward against a cache that grows one token at a time."""

import random

import numpy as np
import pytest

from benchmarks.families.folders import write_folder
from benchmarks.families.shapes import FAMILIES as FAMILY_OF
from benchmarks.families.shapes import WINDOW
from oldlogits.core.errors import MissingLogprobError
from oldlogits.models.load import load_model, point_at
from oldlogits.models.mixed_kv import MixedForward
from oldlogits.models.scorer import score_tokens

from ..builders import batch_of, sampled, trajectory
from ..engines.reference import VOCAB, kept_logprobs, make_model, perturbed, weights_of

FAMILIES = ("llama", "qwen2", "qwen3", "qwen3 top-2 of 4 experts")


def make_trajectories(seed, num=7):
    """One to three turns; versions change within turns, over stale entries, and between them, over stale or fresh ones."""
    rng, made = random.Random(seed), []
    for i in range(num):
        version, segments, temperature = rng.randint(0, 1), [], rng.choice([0.7, 1.0])
        for _ in range(rng.randint(1, 3)):
            segments.append(rng.choices(range(VOCAB), k=rng.randint(1, 6)))
            for k in range(rng.randint(1, 3)):
                said = rng.choices(range(VOCAB), k=rng.randint(1, 5))
                kv = "mixed" if k or (len(segments) > 1 and rng.random() < 0.6) else "fresh"
                segments.append(sampled(said, version, kv=kv, temperature=temperature))
                version = min(version + rng.randint(1, 2), 5)
            version += rng.randint(0, version < 5)
        made.append(trajectory(*segments, id=f"g0.{i}"))
    return made


@pytest.fixture(scope="module", params=FAMILIES)
def world(request):
    """The model, weights of six versions, trajectories, and what the engine gave their tokens."""
    model = make_model(request.param)
    first = weights_of(model)
    versions = {v: perturbed(first, v, 0.05) for v in range(6)}
    made = make_trajectories(seed=1)
    oracle = make_model(request.param)
    return model, versions, made, np.array([p for one in made for p in kept_logprobs(oracle, versions, one.segments)])


def mixed_logps(model, versions, batch, budget=4096):
    forward = MixedForward(model, batch, micro_batch_tokens=budget, head_chunk_tokens=16)
    for version in batch.versions:
        point_at(model, versions[version])
        forward.score(version)
    return forward.logps


def recomputed_logps(model, versions, batch):
    """A full forward at the version of each token."""
    values = np.zeros(batch.num_tokens, np.float32)
    for version in batch.versions:
        point_at(model, versions[version])
        tokens = np.flatnonzero(batch.loss_mask & (batch.version == version))
        values[tokens] = score_tokens(model, batch, tokens, micro_batch_tokens=4096, head_chunk_tokens=16)
    return values[batch.loss_mask]


@pytest.mark.slow
@pytest.mark.parametrize("budget", [1, 24, 4096])
def test_every_token_has_the_log_prob_of_an_engine_that_kept_the_entries_of_older_versions(world, budget):
    model, versions, made, expected = world
    batch = batch_of(made)
    np.testing.assert_allclose(mixed_logps(model, versions, batch, budget), expected, rtol=0, atol=1e-5)
    recomputed = np.abs(recomputed_logps(model, versions, batch) - expected)
    mixed = batch.mixed_kv[batch.loss_mask]
    assert recomputed[mixed].max() > 1e-1, "the entries matter, or nothing was tested"
    assert recomputed[~mixed].max() < 1e-5


@pytest.mark.slow
def test_it_tells_which_version_scored_each_token_and_which_tokens_none_has(world):
    model, versions, made, _ = world
    batch = batch_of(made)
    forward = MixedForward(model, batch, micro_batch_tokens=4096, head_chunk_tokens=16)
    tags = batch.version[batch.loss_mask]
    for version in batch.versions:
        expected = np.where(tags < version, tags, -1)
        assert forward.computed_at.tolist() == expected.tolist()
        assert np.isnan(forward.logps).tolist() == (expected < 0).tolist()
        point_at(model, versions[version])
        forward.score(version)
    assert forward.computed_at.tolist() == tags.tolist()


@pytest.mark.slow
def test_nothing_of_one_sequence_reaches_another(world):
    model, versions, made, expected = world
    alone = np.concatenate([mixed_logps(model, versions, batch_of([one])) for one in reversed(made)][::-1])
    np.testing.assert_allclose(alone, expected, rtol=0, atol=1e-5)


def test_without_stale_entries_the_values_are_those_of_the_scorer_bit_for_bit(world):
    model, versions, made, _ = world
    batch = batch_of(made)
    batch.mixed_kv[:] = False
    assert mixed_logps(model, versions, batch).tolist() == recomputed_logps(model, versions, batch).tolist()


def test_a_trajectory_of_many_versions_is_read_once(world):
    """What one forward over the whole sequence would read, and no entry twice."""
    model, versions, *_ = world
    said = [s for v in range(6) for s in ([v, v], sampled([v, v + 1, v + 2], v, kv="mixed" if v else "fresh"))]
    batch = batch_of([trajectory(*said)])
    read = []
    embedding = model.get_input_embeddings()
    with embedding.register_forward_hook(lambda module, arguments, out: read.extend(arguments[0].flatten().tolist())):
        logps = mixed_logps(model, versions, batch)
    assert read == batch.token_ids[:-1].tolist()
    assert np.isfinite(logps).all()


@pytest.mark.parametrize(
    ("name", "is_window"), [("Mistral", True), ("Gemma 3", True), ("Mamba 2", False), ("Qwen3-Next", False)]
)
def test_a_model_whose_layers_do_not_attend_to_all_earlier_tokens_is_refused(name, is_window, tmp_path):
    model = load_model(write_folder(FAMILY_OF[name], tmp_path))

    def forward(num_tokens):
        segments = [sampled([3] * (num_tokens - 2), 0), sampled([4, 5], 1, kv="mixed")]
        return MixedForward(model, batch_of([trajectory([1], *segments)]), micro_batch_tokens=64, head_chunk_tokens=16)

    with pytest.raises(MissingLogprobError, match=r"attend to all earlier tokens.*engine\.kv = 'recompute'"):
        forward(WINDOW + 1)
    if is_window:
        assert forward(WINDOW).num_entries == WINDOW
