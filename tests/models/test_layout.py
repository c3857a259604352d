"""Packed rows, with what sequences begin with read once, against padded ones: the same log-probs and gradients."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, FalconConfig

from benchmarks.families.checks import Checked, plain_logps
from benchmarks.families.folders import write_folder
from benchmarks.families.shapes import FAMILIES
from oldlogits.models.layout import decoder
from oldlogits.models.layout.decoder import lay_out, layout_of
from oldlogits.models.load import load_model, recompute_layers
from oldlogits.models.ranks import ALONE
from oldlogits.models.scorer import action_logps, rank_micro_batches, score_and_count

from ..batch.test_trie import forests, sequences_of
from ..builders import batch_of, sampled, trajectory

PACKED = ("shared", "packed")


@pytest.fixture(scope="module")
def models(tiny_folder):
    """One model for each layout."""
    return made_of(tiny_folder)


def made_of(folder):
    found = {"padded": load_model(folder)}
    for layout in PACKED:
        found[layout] = copy.deepcopy(found["padded"])
        assert not lay_out(found[layout], layout)
    return found


def trained(model, batch, tokens, budget):
    """float32 [token] and the gradient by name, of ``sum_i (1 + i) logp_i``, so that a token in the wrong place shows."""
    model.zero_grad(set_to_none=True)
    logps = torch.zeros(len(tokens))
    for one in rank_micro_batches(model, batch, tokens, budget, ALONE):
        found = action_logps(model, one.micro, head_chunk_tokens=64)
        at = torch.from_numpy(np.searchsorted(tokens, one.micro.flat.numpy()))
        (found * (at + 1)).sum().backward()
        logps[at] = found.detach()
    return logps, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_same(models, batch, tokens, budget, rounding=1e-6):
    expected, gradient = trained(models["padded"], batch, tokens, 10**6)
    for layout in PACKED:
        assert layout_of(models[layout]) == layout
        found, other = trained(models[layout], batch, tokens, budget)
        scored, _ = score_and_count(models[layout], batch, tokens, micro_batch_tokens=budget, head_chunk_tokens=64)
        torch.testing.assert_close(found, expected, rtol=rounding, atol=rounding)
        torch.testing.assert_close(torch.from_numpy(scored), found, rtol=rounding, atol=rounding)
        scale = max(float(g.abs().max()) for g in gradient.values())
        assert max(float((other[name] - g).abs().max()) for name, g in gradient.items()) <= rounding * scale


@settings(max_examples=15)
@given(forests().filter(lambda lists: max(map(len, lists)) > 1), st.integers(1, 80))
def test_log_probs_and_gradients_are_those_of_padded_rows_whatever_is_shared(models, lists, budget):
    batch = sequences_of(lists)
    check_same(models, batch, np.setdiff1d(np.arange(batch.num_tokens), batch.starts[:-1]), budget)


def group(num, prompt, *lengths, first=0):
    """Members of a group, and branches of an episode: a prompt, a turn that two of three share, and turns of their own."""
    ids = [3 + i % 20 for i in range(first, first + prompt)]
    for i in range(num):
        turn = sampled([4 + (i // 2) % 9] * 20, logp=-1.0)
        rest = [5 + (i * j) % 19 for j in range(1, lengths[i % len(lengths)] + 1)]
        yield trajectory(ids, turn, [7, 8], sampled(rest), id=f"g{first}.{i}", group=f"g{first}")


@pytest.mark.parametrize("family", ["Llama 3", "Gemma 3", "Phi-3", "GPT-2", "Qwen3-MoE"])
def test_so_they_are_with_windows_learned_positions_and_experts_and_activations_computed_again(family, tmp_path):
    models = made_of(write_folder(FAMILIES[family], tmp_path / "model"))
    batch = batch_of([*group(5, 24, 3, 9, 1), *group(2, 11, 7, first=50), trajectory([9], sampled([2]), id="a", group="a")])
    recompute_layers(models["shared"])
    check_same(models, batch, np.flatnonzero(batch.loss_mask), 100, rounding=5e-6)


def test_a_prompt_is_read_once_for_all_members_of_its_group(models):
    prompt, members, length = 431, 8, 6
    batch = batch_of([trajectory([5] * prompt, sampled([6 + i, *[9] * (length - 1)]), id=f"g0.{i}") for i in range(members)])
    tokens = np.flatnonzero(batch.loss_mask)
    read = {
        layout: score_and_count(model, batch, tokens, micro_batch_tokens=8192, head_chunk_tokens=64)[1]
        for layout, model in models.items()
    }
    whole = prompt + length - 1  # the last token is predicted, not read
    assert read == {"padded": members * whole, "packed": members * whole, "shared": prompt + members * (length - 1)}


@pytest.mark.parametrize(
    "family, why",
    [
        ("Gemma 2", "its attention is computed as 'eager', not as 'sdpa'"),
        ("GPT-OSS", "its attention is computed as 'eager', not as 'sdpa'"),
        ("Mamba 2", "its attention is computed as 'eager', not as 'sdpa'"),
        ("Qwen3-Next", "its layers mix tokens by more than attention"),
        ("Granite 4", "its layers mix tokens by more than attention"),
        ("Falcon-H1", "its layers mix tokens by more than attention"),
    ],
)
def test_a_family_that_cannot_read_packed_rows_is_padded_and_says_why(family, why, tmp_path):
    model = load_model(write_folder(FAMILIES[family], tmp_path / "model"))
    before = model.config.get_text_config()._attn_implementation
    assert lay_out(model, "shared").startswith(why)
    assert layout_of(model) == "padded"
    assert model.config.get_text_config()._attn_implementation == before


def test_the_trainer_of_such_a_family_tells_the_run_and_scores_it_padded(tmp_path):
    checked = Checked(write_folder(FAMILIES["Qwen3-Next"], tmp_path / "model"))
    assert checked.trainer.state().padded_because.startswith("its layers mix tokens by more than attention")
    np.testing.assert_allclose(checked.scored(), plain_logps(checked.folder, checked.batch), rtol=0, atol=2e-5)


def falcon():
    """A family whose layers call torch's attention themselves, whatever attention transformers is told to take."""
    return AutoModelForCausalLM.from_config(
        FalconConfig(vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.3)
    ).eval()


def test_a_family_that_computes_attention_by_itself_is_padded_and_says_why():
    model = falcon()
    assert lay_out(model, "shared") == "its attention cannot be replaced"
    assert layout_of(model) == "padded"


def test_a_model_in_which_members_of_a_group_do_not_read_their_common_beginning_is_not_taken_for_one_that_packs():
    """Transformers takes positions that begin anew for another sequence: half of what is read in a packed row is right."""
    assert decoder._why_padded(falcon()).startswith("its layers mix tokens by more than attention")


def test_an_attention_that_computes_with_its_mask_is_told_by_name(tiny_folder):
    model = load_model(tiny_folder)
    attention = model.base_model.layers[0].self_attn
    forward = attention.forward
    attention.forward = lambda *a, **k: forward(*a, **{**k, "attention_mask": alibi(k["attention_mask"])})
    assert lay_out(model, "packed").startswith("it takes no packed rows (unsupported operand")


def alibi(mask):
    return mask if mask is None else mask + 1.0
