"""Mixtures of experts in the embedded engine: transformers is the oracle, also of the names that weights come under."""

import json

import pytest
import torch
from safetensors.torch import load_file

from oldlogits.core.engine import EngineSpec, Sampling, Span
from oldlogits.core.errors import ModelFolderError
from oldlogits.engines.embedded.attention import PrefillAttention
from oldlogits.engines.embedded.decoder import Decoder
from oldlogits.engines.embedded.engine import EngineCore
from oldlogits.engines.embedded.model_folder import read_config, read_weights
from oldlogits.engines.embedded.numerics import round_linear

from .reference import MODELS, VOCAB, expected_logprobs, make_model, perturbed, save, weights_of

MIXTURES = [name for name in MODELS if "experts" in name]
TOP_1 = "qwen3 top-1 of 4 experts"
IDS = torch.randint(VOCAB, (24,), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def hidden_of(decoder):
    cache = decoder.new_cache(1)
    attention = PrefillAttention([0], [0], [len(IDS)], cache)
    return decoder.forward(IDS, attention.positions, cache, attention)


@pytest.mark.parametrize("name", MIXTURES)
def test_after_an_update_in_mid_flight_every_token_belongs_to_its_version(name, tmp_path):
    model = make_model(name)
    core = EngineCore(EngineSpec(model_path=save(model, tmp_path), max_num_seqs=5, max_context=96))
    versions = {0: weights_of(model), 1: perturbed(weights_of(model), 1, 0.05)}
    prompts = {str(i): IDS[: 3 + 4 * i].tolist() for i in range(5)}
    for request, prompt in prompts.items():
        core.add(request, prompt, Sampling(max_tokens=20))
    for _ in range(9):
        assert not core.step()
    core.pause("keep", "recompute")
    core.update_weights(versions[1], 1)
    core.resume()
    finished = {}
    while not core.idle:
        finished.update(core.step())
    for request, generation in finished.items():
        assert generation.spans == (Span(version=0, start=0, end=9), Span(version=1, start=9, end=20))
        expected = expected_logprobs(model, versions, prompts[request], generation)
        assert list(generation.logprobs) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("numerics", ["fp32", "fp8"])
def test_experts_of_a_folder_and_the_stacked_ones_of_a_model_are_the_same_weights(numerics, tmp_path):
    model = make_model(TOP_1)
    save(model, tmp_path)
    stored = read_weights(tmp_path)
    assert "model.layers.1.mlp.experts.3.up_proj.weight" in stored
    assert "model.layers.1.mlp.experts.gate_up_proj" in weights_of(model)
    decoder = Decoder(read_config(tmp_path), stored, numerics, len(IDS))
    from_folder = hidden_of(decoder)
    decoder.load(weights_of(model))
    assert torch.equal(hidden_of(decoder), from_folder)


def test_every_output_channel_of_every_expert_is_rounded_with_its_own_scale():
    stacked = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 9.0, 0.01])[:, None, None]
    for numerics in ("fp8", "int8", "int4"):
        assert torch.equal(round_linear(stacked, numerics), torch.stack([round_linear(one, numerics) for one in stacked]))


def test_the_router_is_rounded_by_bf16_only(tmp_path):
    model = make_model(TOP_1)
    save(model, tmp_path)
    weights = weights_of(model)
    for numerics, unmoved in (("fp8", False), ("int4", False), ("bf16", True)):
        decoder = Decoder(read_config(tmp_path), weights, numerics, len(IDS))
        before = hidden_of(decoder)
        moved = {key: w.bfloat16().float() if key.endswith("mlp.gate.weight") else w for key, w in weights.items()}
        decoder.load(moved)
        assert torch.equal(hidden_of(decoder), before) is unmoved


def test_an_expert_that_is_missing_is_named_and_the_old_weights_stay(tmp_path):
    save(make_model(TOP_1), tmp_path)
    decoder = Decoder(read_config(tmp_path), read_weights(tmp_path), "fp32", len(IDS))
    before = hidden_of(decoder)
    incomplete = load_file(tmp_path / "model.safetensors")
    del incomplete["model.layers.1.mlp.experts.2.down_proj.weight"]
    with pytest.raises(ModelFolderError, match=r"model\.layers\.1\.mlp\.experts\.2\.down_proj\.weight: missing"):
        decoder.load(incomplete)
    assert torch.equal(hidden_of(decoder), before)


def test_the_number_of_experts_is_read_under_either_name(tmp_path):
    save(make_model(TOP_1), tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    expected = read_config(tmp_path)
    assert (expected.num_experts, expected.num_experts_per_tok, expected.norm_topk_prob) == (4, 1, False)
    config["num_experts"] = config.pop("num_local_experts")
    path.write_text(json.dumps(config))
    assert read_config(tmp_path) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mlp_only_layers": [0]}, r"mlp_only_layers = \[0\]"),
        ({"decoder_sparse_step": 2}, r"decoder_sparse_step = 2"),
        ({"moe_intermediate_size": 30}, r"moe_intermediate_size % 4 = 2"),
        ({"num_experts_per_tok": 5}, r"num_experts_per_tok = 5 .*allowed: num_experts_per_tok = 1 or 2 or 3 or 4;"),
    ],
)
def test_mixtures_that_the_decoder_cannot_compute_are_refused_by_name(change, message, tmp_path):
    save(make_model(TOP_1), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ModelFolderError, match=message):
        read_config(tmp_path)
