import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from oldlogits.core.errors import ModelFolderError
from oldlogits.models.load import load_model, load_tokenizer, named_weights, point_at


@pytest.fixture
def folder(tiny_folder, tmp_path):
    """A copy that a test may break."""
    shutil.copytree(tiny_folder, tmp_path / "model")
    return tmp_path / "model"


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_model_is_loaded_bit_for_bit_in_fp32_and_without_dropout(folder):
    model = load_model(folder)
    stored = load_file(folder / "model.safetensors")
    weights = named_weights(model)
    assert set(weights) == set(stored)
    assert all(torch.equal(weights[name], stored[name]) for name in stored)
    assert {w.dtype for w in weights.values()} == {torch.float32}
    assert not model.training


def test_half_precision_weights_become_fp32(folder):
    stored = {name: w.bfloat16() for name, w in load_file(folder / "model.safetensors").items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    weights = named_weights(load_model(folder))
    assert all(torch.equal(weights[name], w.float()) for name, w in stored.items())


def test_a_weight_that_is_missing_is_refused_not_drawn_at_random(folder):
    stored = load_file(folder / "model.safetensors")
    del stored["model.layers.1.mlp.up_proj.weight"]
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelFolderError, match=r"without model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(folder)


def test_a_weight_of_another_shape_is_refused(folder):
    edit_config(folder, intermediate_size=40)
    with pytest.raises(ModelFolderError, match="the model folder cannot be loaded"):
        load_model(folder)


@pytest.mark.parametrize("name, content", [("model.safetensors", b"x"), ("config.json", b"{"), ("config.json", b"{}")])
def test_a_broken_file_is_a_model_folder_error(folder, name, content):
    (folder / name).write_bytes(content)
    with pytest.raises(ModelFolderError, match=r"the model folder cannot be loaded; got: .*; allowed: .*llama, qwen2, qwen3"):
        load_model(folder)


def test_a_model_whose_head_is_more_than_a_linear_layer_is_refused_by_what_it_computes(tmp_path):
    from transformers import RobertaConfig, RobertaForCausalLM

    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8, "vocab_size": 8}
    RobertaForCausalLM(RobertaConfig(**shape, is_decoder=True)).save_pretrained(tmp_path)
    with pytest.raises(ModelFolderError, match=r"more than a linear head.*model_type 'roberta'"):
        load_model(tmp_path)


def test_a_tokenizer_needs_a_chat_template(folder):
    assert load_tokenizer(folder).chat_template
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ModelFolderError, match="the tokenizer has no chat template"):
        load_tokenizer(folder)


def test_a_folder_without_tokenizer_is_refused(folder):
    for path in folder.glob("*token*"):
        path.unlink()
    with pytest.raises(ModelFolderError, match=r"the tokenizer cannot be loaded; got: .*no tokenizer file"):
        load_tokenizer(folder)


def test_named_weights_are_views_and_hold_tied_ones_once(tiny_folder):
    model = load_model(tiny_folder)
    weights = named_weights(model)
    assert "lm_head.weight" not in weights
    with torch.no_grad():
        model.get_output_embeddings().weight[0, 0] = 7.0
    assert weights["model.embed_tokens.weight"][0, 0] == 7.0


def test_pointing_at_weights_shares_their_storage_and_leaves_the_model_they_came_from(tiny_folder):
    model, other = load_model(tiny_folder), load_model(tiny_folder)
    before = {name: w.clone() for name, w in named_weights(model).items()}
    others = {name: w + 1.0 for name, w in named_weights(other).items()}
    point_at(other, others)
    assert all(p.data_ptr() == others[name].data_ptr() for name, p in other.named_parameters())
    assert other.get_output_embeddings().weight.data_ptr() == others["model.embed_tokens.weight"].data_ptr()
    assert all(torch.equal(w, before[name]) for name, w in named_weights(model).items())
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert not torch.allclose(other(ids).logits, model(ids).logits)
        point_at(other, before)
        assert torch.equal(other(ids).logits, model(ids).logits)
