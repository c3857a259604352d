"""The embedded model: a standard folder, repeatable weights, and one token a word."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from oldlogits.core.errors import ConfigError
from order_desk.tiny import ROLES, TinyMoeSize, TinySize, save_tiny, tiny_model, tiny_tokenizer

WORDS = ("red", "green", "blue", "red")


def _model(seed: int):
    return tiny_model(TinySize(hidden=16, layers=1, heads=2, kv_heads=1, mlp=24), 20, end_id=2, pad_id=0, seed=seed)


@pytest.mark.parametrize("size", [TinySize(), TinyMoeSize()])
def test_a_saved_folder_loads_with_the_auto_classes_and_computes_the_same(size: TinySize, tmp_path: Path):
    tokenizer = tiny_tokenizer(WORDS)
    model = tiny_model(size, len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id, seed=3).eval()
    save_tiny(tmp_path, model, tokenizer)
    loaded, reader = AutoModelForCausalLM.from_pretrained(tmp_path).eval(), AutoTokenizer.from_pretrained(tmp_path)
    ids = torch.tensor([reader.encode("<user> red blue green <end>", add_special_tokens=False)])
    assert ids.tolist() == [tokenizer.encode("<user> red blue green <end>", add_special_tokens=False)]
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.generation_config.eos_token_id == reader.eos_token_id == model.config.eos_token_id
    assert reader.chat_template == tokenizer.chat_template
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= {
        p.name for p in tmp_path.iterdir()
    }


def test_the_head_is_the_embedding_and_everything_is_fp32():
    model = _model(0)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_the_default_size_counts_as_the_architecture_says():
    vocabulary = 134
    attention = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 2 * 16  # q, k and v, o, the norms of query and key heads
    layer = attention + 3 * 64 * 160 + 2 * 64  # gate, up, down, two norms
    model = tiny_model(TinySize(), vocabulary, end_id=2, pad_id=0, seed=0)
    assert sum(parameter.numel() for parameter in model.parameters()) == vocabulary * 64 + 2 * layer + 64 == 94_976
    mixture = tiny_model(TinyMoeSize(), vocabulary, end_id=2, pad_id=0, seed=0)
    more = 4 * 64 + 3 * 3 * 64 * 160  # a router, and three more experts
    assert sum(parameter.numel() for parameter in mixture.parameters()) == 94_976 + 2 * more == 279_808


def test_one_expert_serves_a_token_times_its_probability():
    model = tiny_model(TinyMoeSize(hidden=16, layers=1, heads=2, kv_heads=1, mlp=24), 20, end_id=2, pad_id=0, seed=0)
    block = model.model.layers[0].mlp
    x = torch.randn(30, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        served = block(x[None])[0]
        for token, out in zip(x, served, strict=True):
            probs = [float(p) for p in torch.softmax(block.gate.weight @ token, 0)]
            expert = probs.index(max(probs))
            gate, up = (block.experts.gate_up_proj[expert] @ token).chunk(2)
            expected = probs[expert] * (block.experts.down_proj[expert] @ (gate * torch.sigmoid(gate) * up))
            torch.testing.assert_close(out, expected)


def test_weights_depend_on_the_seed_alone_and_the_global_generator_is_left_alone():
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    first, again, other = _model(5), _model(5), _model(6)
    assert torch.equal(torch.rand(3), expected)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(first.state_dict()[name], again.state_dict()[name])
    assert not torch.equal(first.state_dict()[name], other.state_dict()[name])


def test_every_word_is_one_token_and_unknown_words_are_marked():
    tokenizer = tiny_tokenizer(WORDS)
    ids = tokenizer.encode("<user> red mauve <end>", add_special_tokens=False)
    assert tokenizer.convert_ids_to_tokens(ids) == ["<user>", "red", "<unk>", "<end>"]
    assert len(tokenizer) == len({*tokenizer.get_vocab()}) == 3 + len(ROLES) + 2 + 2 + 3
    assert tokenizer.decode(ids) == "<user> red <unk> <end>"


def test_the_template_writes_role_content_and_end_and_names_the_tools_once():
    messages = [{"role": "system", "content": "red"}, {"role": "user", "content": "green"}]
    tools = [{"type": "function", "function": {"name": name}} for name in ("paint", "mix")]
    text = tiny_tokenizer(WORDS).apply_chat_template(messages, tools=tools, add_generation_prompt=True, tokenize=False)
    assert text == "<system> red tools : paint mix <end> <user> green <end> <assistant>"


@pytest.mark.parametrize(
    "sizes", [{"hidden": 20, "heads": 4}, {"heads": 4, "kv_heads": 3}, {"layers": 0}, {"mlp": -1}, {"experts": 0}]
)
def test_sizes_that_do_not_divide_are_refused(sizes: dict[str, int]):
    with pytest.raises(ConfigError, match="sizes of the tiny model"):
        TinyMoeSize(**sizes)
