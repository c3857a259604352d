"""Wider heads are the same model."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from oldlogits.engines.protocols.wide_heads import Widening, widening_of, write_wide

from .reference import make_model, save


@pytest.mark.parametrize("name", ["qwen3", "llama", "qwen2"])
def test_a_model_with_wider_heads_computes_the_same(name, tmp_path):
    model = make_model(name)
    folder, wide = tmp_path / "narrow", tmp_path / "wide"
    save(model, folder)
    widening = widening_of(folder)
    assert widening is not None
    assert widening.narrow < widening.wide == 32
    write_wide(folder, widening, wide)
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8] * 4])
    with torch.no_grad():
        expected = torch.log_softmax(model(ids).logits, dim=-1)
        found = torch.log_softmax(AutoModelForCausalLM.from_pretrained(wide)(ids).logits, dim=-1)
    assert (found - expected).abs().max() <= 2e-5
    assert widening_of(wide) is None


def test_halves_of_heads_move_apart():
    widened = Widening(narrow=4, wide=8, qk_norm=True).weights({"model.layers.0.self_attn.v_proj.bias": torch.arange(8.0)})
    assert widened["model.layers.0.self_attn.v_proj.bias"].tolist() == [0, 1, 0, 0, 2, 3, 0, 0, 4, 5, 0, 0, 6, 7, 0, 0]
