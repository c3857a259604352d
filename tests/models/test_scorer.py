"""The scorer against an independent float64 forward of one sequence at a time."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oldlogits.batch.pad import micro_batches
from oldlogits.models.load import load_model
from oldlogits.models.scorer import action_logps, score_tokens

from ..builders import batch_of, sampled, trajectory


@pytest.fixture(scope="module")
def model(tiny_folder):
    return load_model(tiny_folder)


BATCH = batch_of(
    [
        trajectory([3, 9, 10], sampled([11, 12, 2], temperature=0.7), [13, 14], sampled([15, 2], temperature=0.7)),
        trajectory([9], sampled([2]), id="g0.1"),
        trajectory([8, 8, 8, 8, 8, 8, 8], sampled([16], temperature=2.5), id="g0.2"),
        trajectory([3, 9, 10], sampled([11, 20, 21, 22, 23, 24]), id="g0.3"),
    ]
)
TOKENS = np.flatnonzero(BATCH.loss_mask)


def oracle(model, batch, tokens):
    """``log_softmax(logits / T)`` in float64, each sequence by itself and whole; index i of the result is tokens[i]."""
    double = copy.deepcopy(model).double()
    logps = {}
    for start, end in zip(batch.starts[:-1], batch.starts[1:], strict=True):
        logits = double(torch.from_numpy(batch.token_ids[start:end])[None]).logits[0]
        for i in range(start + 1, end):
            scaled = logits[i - start - 1] / float(batch.temperature[i])
            logps[i] = torch.log_softmax(scaled, 0)[batch.token_ids[i]]
    return torch.stack([logps[int(i)] for i in tokens]), double


def scores(model, batch, tokens, budget, chunk):
    """float32 [token of the batch]; NaN where nothing was asked for."""
    out = torch.full((batch.num_tokens,), torch.nan)
    found = score_tokens(model, batch, tokens, micro_batch_tokens=budget, head_chunk_tokens=chunk)
    out[torch.from_numpy(tokens)] = torch.from_numpy(found)
    return out


@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize("budget", [1, 16, 1000])
def test_scores_are_those_of_a_float64_forward_of_each_sequence_alone(model, budget, chunk):
    expected, _ = oracle(model, BATCH, TOKENS)
    out = scores(model, BATCH, TOKENS, budget, chunk)
    torch.testing.assert_close(out[TOKENS].double(), expected.detach(), rtol=0, atol=2e-6)


@settings(max_examples=20)
@given(st.sets(st.sampled_from(TOKENS.tolist()), min_size=1), st.integers(1, 40), st.integers(1, 8))
def test_any_part_of_the_tokens_gets_the_scores_of_the_whole(model, chosen, budget, chunk):
    tokens = np.array(sorted(chosen))
    whole = scores(model, BATCH, TOKENS, 1000, 1000)
    part = scores(model, BATCH, tokens, budget, chunk)
    torch.testing.assert_close(part[tokens], whole[tokens], rtol=0, atol=2e-6)


def test_context_and_padding_of_the_batch_do_not_change_a_score(model):
    alone = batch_of([trajectory([9], sampled([2]))])
    in_batch = scores(model, BATCH, TOKENS, 1000, 100)[BATCH.starts[1] + 1]
    torch.testing.assert_close(scores(model, alone, np.array([1]), 100, 100)[1], in_batch, rtol=0, atol=2e-6)


def test_a_low_temperature_sharpens_and_the_probabilities_of_all_tokens_add_up_to_one(model):
    vocabulary = model.config.vocab_size
    for temperature in (0.25, 1.0, 4.0):
        every = batch_of([trajectory([3, 9], sampled([i], temperature=temperature), id=f"g0.{i}") for i in range(vocabulary)])
        logps = scores(model, every, np.flatnonzero(every.loss_mask), 1000, 7)[every.loss_mask]
        assert float(logps.double().exp().sum()) == pytest.approx(1, abs=1e-6)


def gradients(model, batch, budget, chunk):
    """Of ``sum_i i * logp_i``, so that a token in the wrong place shows."""
    model.zero_grad(set_to_none=True)
    for micro in micro_batches(batch, TOKENS, budget):
        logps = action_logps(model, micro, head_chunk_tokens=chunk)
        (logps * torch.from_numpy(np.searchsorted(TOKENS, micro.flat.numpy()) + 1.0)).sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_the_gradient_is_that_of_float64_whatever_the_chunk_of_the_head(model, chunk):
    expected, double = oracle(model, BATCH, TOKENS)
    (expected * torch.arange(1, len(TOKENS) + 1)).sum().backward()
    found = gradients(model, BATCH, 1000, chunk)
    for name, parameter in double.named_parameters():
        scale = float(parameter.grad.abs().max())
        torch.testing.assert_close(
            found[name].double(), parameter.grad, rtol=0, atol=1e-5 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_scoring_leaves_no_gradient_and_an_empty_request_gets_nothing(model):
    assert score_tokens(model, BATCH, np.zeros(0, np.int64), micro_batch_tokens=10, head_chunk_tokens=4).shape == (0,)
    scores(model, BATCH, TOKENS, 1000, 3)
    assert all(p.grad is None for p in model.parameters())


def test_the_temperature_is_each_tokens_own(model):
    hot = dataclasses.replace(BATCH, temperature=np.where(TOKENS[0] == np.arange(BATCH.num_tokens), 9, BATCH.temperature))
    hot = dataclasses.replace(hot, temperature=hot.temperature.astype(np.float32))
    changed = scores(model, hot, TOKENS, 1000, 100)[TOKENS] != scores(model, BATCH, TOKENS, 1000, 100)[TOKENS]
    assert changed.tolist() == [True] + [False] * (len(TOKENS) - 1)
