"""Adapters: what is added to the base, what a version consists of, and the folder that peft reads."""

from __future__ import annotations

import copy
import json
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from oldlogits.core.errors import ConfigError, ModelFolderError
from oldlogits.models.adapters import A_SUFFIX, B_SUFFIX, is_adapter, merge, merged, plain_name
from oldlogits.models.load import load_model, named_weights, point_at
from oldlogits.models.lora import add_adapters, check_targets, write_adapters

from ..engines.reference import make_model

TARGETS = ("q_proj", "v_proj", "down_proj")
LORA = {"rank": 3, "alpha": 6.0, "targets": TARGETS}
ATTENTION = ["k_proj", "o_proj", "q_proj", "v_proj"]
IDS = torch.arange(12).reshape(1, 12)


def with_adapters(model, seed: int = 0):
    """Adapters that are not zero."""
    torch.manual_seed(seed)
    add_adapters(model, **LORA)
    for name, weight in named_weights(model).items():
        if name.endswith(B_SUFFIX):
            weight.normal_(std=0.3)
    return model


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_merged_is_the_base_and_the_scaled_product():
    base, a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]), torch.tensor([[5.0]])
    assert merged(base, a, b, 0.5).tolist() == [[8.5, 12.0]]


def test_merged_rows_are_the_rows_of_the_merged():
    generator = torch.Generator().manual_seed(0)
    base, a, b = (torch.randn(shape, generator=generator) for shape in ((9, 7), (3, 7), (9, 3)))
    whole = merged(base, a, b, 0.7)
    assert torch.equal(torch.cat([merged(base[i : i + 2], a, b[i : i + 2], 0.7) for i in range(0, 9, 2)]), whole)
    exact = base.double() + 0.7 * torch.einsum("or,ri->oi", b.double(), a.double())
    assert (whole - exact).abs().max() < 2e-7


def test_the_base_is_read_in_the_dtype_of_the_adapters():
    base, zero = torch.tensor([[1.0 + 2**-12]]), torch.zeros(1, 1)
    assert merged(base, zero, zero, 1.0).item() == 1.0 + 2**-12
    assert merged(base, zero.bfloat16(), zero.bfloat16(), 1.0).item() == 1.0


def test_fresh_adapters_change_nothing_and_are_all_that_is_trained():
    model = make_model("qwen3")
    before, num = logits(model), sum(p.numel() for p in model.parameters())
    add_adapters(model, **LORA)
    assert torch.equal(logits(model), before)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == set(named_weights(model)) == set(filter(is_adapter, dict(model.named_parameters())))
    per_layer = [(64, 32), (32, 32), (32, 48)]  # q_proj, v_proj, down_proj: out, in
    assert sum(p.numel() for p in model.parameters()) - num == 2 * sum(3 * (rows + columns) for rows, columns in per_layer)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_merged_weights_are_a_plain_model_with_the_same_logits(name):
    plain = make_model(name)
    base = {name: p.data.clone() for name, p in plain.named_parameters()}
    model = with_adapters(copy.deepcopy(plain))
    expected = logits(model)
    assert (expected - logits(plain)).abs().max() > 0.01
    point_at(plain, merge(base, named_weights(model), 2.0))
    assert torch.allclose(logits(plain), expected, atol=2e-6)


def test_adapters_of_another_model_are_refused():
    adapters = named_weights(with_adapters(make_model("qwen3")))
    base = dict(make_model("qwen3").named_parameters())
    del base["model.layers.1.self_attn.q_proj.weight"]
    with pytest.raises(ModelFolderError, match=r"no weight of model\.layers\.1\.self_attn\.q_proj"):
        merge(base, adapters, 2.0)
    with pytest.raises(ModelFolderError, match="adapters of the layers"):
        merge(base, base, 2.0)


def test_a_switch_of_versions_switches_the_adapters_and_leaves_the_base():
    model = with_adapters(make_model("qwen3"))
    base = {name: p.data_ptr() for name, p in model.named_parameters() if not is_adapter(name)}
    first, other = named_weights(model), named_weights(with_adapters(make_model("qwen3"), seed=1))
    before = logits(model)
    point_at(model, other)
    assert not torch.equal(logits(model), before)
    point_at(model, first)
    assert torch.equal(logits(model), before)
    assert base == {name: p.data_ptr() for name, p in model.named_parameters() if not is_adapter(name)}


def test_names_of_the_base_are_those_of_a_plain_model():
    model = with_adapters(make_model("qwen3"))
    plain = {name for name, _ in make_model("qwen3").named_parameters()}
    assert {plain_name(name) for name, _ in model.named_parameters() if not is_adapter(name)} == plain
    layers = {name.removesuffix(A_SUFFIX) + ".weight" for name in named_weights(model) if name.endswith(A_SUFFIX)}
    assert layers < plain


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks transformers for it
def test_peft_reads_the_adapter_folder_on_top_of_the_base(tiny_folder, tmp_path):
    from peft import PeftModel  # it takes seconds

    model = with_adapters(load_model(tiny_folder))
    write_adapters(tmp_path, named_weights(model), base=str(tiny_folder), **LORA)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder), tmp_path)
    assert torch.equal(logits(theirs.eval()), logits(model))
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"], written["base_model_name_or_path"]) == (3, 6.0, str(tiny_folder))


@pytest.mark.parametrize("name, target", [("qwen3", "gate"), ("qwen3", "lm_head"), ("qwen3 top-1 of 4 experts", "down_proj")])
def test_layers_that_are_not_there_or_not_linear_are_refused(name, target):
    with pytest.raises(ConfigError, match=f"got: {target}; allowed: .*q_proj"):
        add_adapters(make_model(name), rank=2, alpha=4.0, targets=("q_proj", target))


@pytest.mark.parametrize("named, left", [(("q_proj", "up_proj", "k_proj"), ["q_proj", "k_proj"]), (("gate",), ATTENTION)])
def test_the_remedy_for_targets_that_are_not_there_is_the_list_to_set(named, left):
    with pytest.raises(ConfigError) as found:
        check_targets(make_model("qwen3 top-1 of 4 experts"), named)
    assert found.value.fix == f"set model.lora_targets = {json.dumps(left)}"


def test_without_peft_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"fix: pip install 'oldlogits\[lora\]'"):
        add_adapters(make_model("qwen3"), **LORA)
