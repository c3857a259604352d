import json

import pytest
import torch
from safetensors.torch import load_file

from oldlogits.core.errors import ModelFolderError
from oldlogits.engines.embedded.attention import TILE, DecodeAttention, PrefillAttention
from oldlogits.engines.embedded.decoder import Decoder
from oldlogits.engines.embedded.model_folder import read_config, read_weights
from oldlogits.engines.embedded.numerics import round_linear

from .reference import MODELS, VOCAB, load, make_model, perturbed, save, weights_of

CONTEXT = 40


def open_decoder(folder, numerics="fp32"):
    return Decoder(read_config(folder), read_weights(folder), numerics, CONTEXT)


def random_ids(*shape, seed=0):
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def hf_logits(model, ids):
    return model(ids).logits


@torch.inference_mode()
def prefill(decoder, cache, ids, slots, starts, counts):
    """Logits of tokens ``[start, start + count)`` of each row of `ids`."""
    attention = PrefillAttention(slots, starts, counts, cache)
    packed = torch.cat([row[start : start + count] for row, start, count in zip(ids, starts, counts, strict=True)])
    hidden = decoder.forward(packed, attention.positions, cache, attention)
    return decoder.logits(hidden).split(counts)


@torch.inference_mode()
def decode(decoder, cache, tokens, positions, active=None):
    """Logits of one token of each slot from 0."""
    seen = (positions + 1) * (torch.ones_like(positions) if active is None else active)
    crops = [int(tile.max()) for tile in seen.split(TILE)]
    attention = DecodeAttention(torch.arange(len(positions)), positions, crops, cache)
    return decoder.logits(decoder.forward(tokens, positions, cache, attention))


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_prefill_and_decode_agree_with_transformers_for_every_family(name, tmp_path):
    model = make_model(name)
    save(model, tmp_path)
    decoder = open_decoder(tmp_path)
    cache, ids = decoder.new_cache(3), random_ids(3, 30)
    expected = hf_logits(model, ids)
    lengths = [20, 1, 13]
    for row, logits in enumerate(prefill(decoder, cache, ids, [0, 1, 2], [0, 0, 0], lengths)):
        close(logits, expected[row, : lengths[row]])
    positions = torch.tensor(lengths)
    for _ in range(10):
        rows = torch.arange(3)
        close(decode(decoder, cache, ids[rows, positions], positions), expected[rows, positions])
        positions += 1


def test_a_prefill_continues_what_the_cache_holds(tmp_path):
    model = make_model("qwen3")
    save(model, tmp_path)
    decoder = open_decoder(tmp_path)
    cache, ids = decoder.new_cache(8), random_ids(2, 30)
    prefill(decoder, cache, ids, [5, 2], [0, 0], [7, 16])
    second = prefill(decoder, cache, ids, [5, 2], [7, 16], [20, 3])
    expected = hf_logits(model, ids)
    close(second[0], expected[0, 7:27])
    close(second[1], expected[1, 16:19])


@pytest.mark.parametrize(("starts", "counts", "is_causal"), [([7, 0], [20, 16], True), ([16, 5], [6, 2], False)])
def test_a_prefill_is_causal_where_most_entries_are_new_and_masked_once_where_few_are(starts, counts, is_causal, tmp_path):
    model = make_model("llama")
    save(model, tmp_path)
    decoder = open_decoder(tmp_path)
    cache, ids = decoder.new_cache(4), random_ids(2, 30)
    prefill(decoder, cache, ids, [3, 1], [0, 0], [max(1, start) for start in starts])
    attention = PrefillAttention([3, 1], starts, counts, cache)
    assert (attention._bias is None) is is_causal
    expected = hf_logits(model, ids)
    for row, logits in enumerate(prefill(decoder, cache, ids, [3, 1], starts, counts)):
        close(logits, expected[row, starts[row] : starts[row] + counts[row]])


def test_a_pass_that_only_fills_the_cache_fills_it_with_the_same_entries(tmp_path):
    save(make_model("qwen3"), tmp_path)
    decoder, ids = open_decoder(tmp_path), random_ids(20)
    caches = [decoder.new_cache(1) for _ in range(2)]
    for cache, only_cache in zip(caches, (False, True), strict=True):
        attention = PrefillAttention([0], [0], [20], cache)
        decoder.forward(ids, attention.positions, cache, attention, only_cache=only_cache)
    assert caches[0][-1].abs().sum() > 0
    assert torch.equal(*caches)


def test_rows_of_several_tiles_and_idle_tiles_do_not_disturb_each_other(tmp_path):
    model = make_model("llama")
    save(model, tmp_path)
    decoder = open_decoder(tmp_path)
    num_rows = 2 * TILE + 3
    cache, ids = decoder.new_cache(num_rows), random_ids(num_rows, 12)
    prefill(decoder, cache, ids, list(range(num_rows)), [0] * num_rows, [10] * num_rows)
    positions, active = torch.full((num_rows,), 10), torch.ones(num_rows, dtype=torch.int64)
    active[TILE : 2 * TILE] = 0
    logits = decode(decoder, cache, ids[:, 10], positions, active)
    expected = hf_logits(model, ids)[:, 10]
    close(logits[active == 1], expected[active == 1])
    assert logits.isfinite().all()
    close(decode(decoder, cache, ids[:, 10], positions), expected)  # an idle row decodes later as if nothing had happened


@pytest.mark.parametrize("name", ["qwen3", "qwen2", "qwen3 top-1 of 4 experts"])
@pytest.mark.parametrize("numerics", ["bf16", "int8", "int4", "fp8"])
def test_low_numerics_are_a_forward_of_rounded_weights(name, numerics, tmp_path):
    model = make_model(name)
    save(model, tmp_path)
    ids = random_ids(1, 20)
    decoder = open_decoder(tmp_path, numerics)
    logits = prefill(decoder, decoder.new_cache(1), ids, [0], [0], [20])[0]
    weights = weights_of(model)
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    exact = hf_logits(model, ids)[0]
    rounded = {
        key: round_linear(tensor, numerics) if "proj" in key and "bias" not in key else tensor
        for key, tensor in weights.items()
    }
    if numerics == "bf16":
        rounded = {key: tensor.bfloat16().float() for key, tensor in weights.items()}
    load(model, rounded)
    with torch.no_grad():
        expected = model.model(ids).last_hidden_state[0] @ round_linear(head, numerics).t()
    torch.testing.assert_close(logits, expected, rtol=0, atol=3e-5)
    assert (logits - exact).abs().max() > 1e-3


def test_dynamic_fp8_also_rounds_what_enters_each_linear(tmp_path):
    save(make_model("llama"), tmp_path)
    ids = random_ids(1, 20)
    static, dynamic = open_decoder(tmp_path, "fp8"), open_decoder(tmp_path, "fp8_dynamic")
    calm = prefill(static, static.new_cache(1), ids, [0], [0], [20])[0]
    noisy = prefill(dynamic, dynamic.new_cache(1), ids, [0], [0], [20])[0]
    hidden = torch.tensor([[448.0, 100.3, -0.7, *[0.0] * 29]])
    rounded = torch.tensor([[448.0, 104.0, -0.6875, *[0.0] * 29]])  # steps of 8 near 100, of 1/16 near 0.7
    torch.testing.assert_close(dynamic.logits(hidden), static.logits(rounded), rtol=1e-6, atol=0)
    assert 1e-3 < (calm - noisy).abs().mean() < 1.0


def test_sharded_weights_are_the_same_weights(tmp_path):
    model = make_model("llama")
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    one, many = read_weights(tmp_path / "one"), read_weights(tmp_path / "many")
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_loading_copies_the_weights_and_a_failed_load_keeps_the_old_ones(tmp_path):
    model = make_model("llama")
    save(model, tmp_path)
    decoder, ids = open_decoder(tmp_path), random_ids(1, 10)

    def logits():
        return prefill(decoder, decoder.new_cache(1), ids, [0], [0], [10])[0]

    live = perturbed(weights_of(model), seed=1)
    decoder.load(live)
    expected = hf_logits(load(model, live), ids)[0]
    close(logits(), expected)
    for tensor in live.values():
        tensor.zero_()
    close(logits(), expected)
    incomplete = load_file(tmp_path / "model.safetensors")
    del incomplete["model.layers.1.mlp.down_proj.weight"]
    with pytest.raises(ModelFolderError, match=r"model\.layers\.1\.mlp\.down_proj\.weight: missing"):
        decoder.load(incomplete)
    with pytest.raises(ModelFolderError, match=r"model\.norm\.weight: \(3,\); allowed: model\.norm\.weight of shape \(32,\)"):
        decoder.load({**load_file(tmp_path / "model.safetensors"), "model.norm.weight": torch.ones(3)})
    close(logits(), expected)


def test_a_rope_base_at_the_top_of_an_older_config_is_read(tmp_path):
    model = make_model("llama")
    save(model, tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"] / 4
    path.write_text(json.dumps(config))
    assert read_config(tmp_path).rope_theta == 2500.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma"}, r"model_type = 'gemma'.*allowed: model_type = 'llama' or 'qwen2' or 'qwen3'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, r"rope_parameters\.rope_type = 'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, r"rope_scaling\.rope_type = 'linear'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, r"partial_rotary_factor = 0\.5"),
        ({"use_sliding_window": True}, r"use_sliding_window = True"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, r"layer_types = 'sliding_attention'"),
        ({"hidden_act": "gelu"}, r"hidden_act = 'gelu'"),
        ({"mlp_bias": True}, r"mlp_bias = True"),
        ({"hidden_size": "32"}, r"hidden_size = '32'.*an integer"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(change, message, tmp_path):
    save(make_model("llama"), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ModelFolderError, match=message):
        read_config(tmp_path)


def test_a_folder_without_config_or_weights_is_refused(tmp_path):
    with pytest.raises(ModelFolderError, match=r"no config\.json"):
        read_config(tmp_path)
    with pytest.raises(ModelFolderError, match=r"no model\.safetensors in"):
        read_weights(tmp_path)
