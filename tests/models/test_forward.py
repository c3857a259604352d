"""bf16 forward weights: what is read of fp32 masters, against a model whose weights were rounded by hand."""

import copy

import numpy as np
import pytest
import torch

from oldlogits.models.forward import round_at_use
from oldlogits.models.load import load_model, model_of, named_weights, point_at, recompute_layers
from order_desk.tiny import TinyMoeSize, TinySize, save_tiny, tiny_model, tiny_tokenizer

SIZES = {
    "dense": TinySize(hidden=32, layers=2, heads=2, kv_heads=1, mlp=48, max_context=128),
    "experts": TinyMoeSize(hidden=32, layers=2, heads=2, kv_heads=1, mlp=48, max_context=128),
}
IDS = torch.arange(40).remainder(27).view(2, 20)


@pytest.fixture(scope="module", params=SIZES)
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    tokenizer = tiny_tokenizer([f"w{i}" for i in range(20)])
    model = tiny_model(SIZES[request.param], len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id, seed=3)
    save_tiny(path, model, tokenizer)
    return path


@pytest.fixture
def masters(folder):
    return load_model(folder)


def by_hand(model):
    """The same model, its weights rounded."""
    rounded = copy.deepcopy(model)
    for parameter in rounded.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).to(torch.float32)
    return rounded


def rounding(model):
    rounded = copy.deepcopy(model)
    round_at_use(rounded, torch.bfloat16)
    return rounded


def loss_of(model):
    return torch.log_softmax(model(input_ids=IDS).logits, -1)[..., 5].mean()


def test_a_forward_reads_the_rounded_weights_and_the_masters_keep_their_bits(masters):
    before = {name: weight.clone() for name, weight in named_weights(masters).items()}
    found, expected = (model(input_ids=IDS).logits for model in (rounding(masters), by_hand(masters)))
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    assert float((found - masters(input_ids=IDS).logits).detach().abs().max()) > 1e-4, "rounding is seen"
    assert all(torch.equal(weight, before[name]) for name, weight in named_weights(masters).items())


def test_bf16_weights_in_place_of_the_masters_give_the_same_bits(masters):
    reader = rounding(masters).requires_grad_(False)
    expected = reader(input_ids=IDS).logits
    point_at(reader, {name: weight.to(torch.bfloat16) for name, weight in named_weights(masters).items()})
    assert torch.equal(reader(input_ids=IDS).logits, expected)


def test_the_gradient_of_the_rounded_weights_reaches_the_masters_in_fp32(masters):
    found, expected = rounding(masters), by_hand(masters)
    loss_of(found).backward()
    loss_of(expected).backward()
    for (name, a), b in zip(found.named_parameters(), expected.parameters(), strict=True):
        assert a.grad.dtype == torch.float32
        assert torch.equal(a.grad, b.grad), name
    assert max(float(p.grad.abs().max()) for p in found.parameters()) > 1e-4


def test_small_steps_reach_the_masters_though_no_bit_of_the_forward_weights_changes(masters):
    model = rounding(masters)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).to(torch.float32)
    before = model(input_ids=IDS).logits
    for parameter in model.parameters():
        parameter.data *= 1 + 1e-5
    assert torch.equal(model(input_ids=IDS).logits, before)
    for parameter in model.parameters():
        parameter.data *= 1 + 1e-2
    assert not torch.equal(model(input_ids=IDS).logits, before)


def test_fp32_changes_nothing(masters):
    model = copy.deepcopy(masters)
    round_at_use(model, torch.float32)
    assert all("forward" not in vars(module) for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputed_layers_give_the_same_gradient_bit_for_bit(masters, dtype):
    plain, recomputed = copy.deepcopy(masters), copy.deepcopy(masters)
    recompute_layers(recomputed)
    for model in (plain, recomputed):
        round_at_use(model, dtype)
        loss_of(model).backward()
    for a, b in zip(plain.parameters(), recomputed.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_recomputed_layers_keep_fewer_activations(masters):
    kept = []
    for recompute in (False, True):
        model, sizes = copy.deepcopy(masters), []
        if recompute:
            recompute_layers(model)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: (sizes.append(t.numel()), t)[1], lambda t: t):
            loss_of(model)
        kept.append(sum(sizes))
    assert kept[1] < 0.5 * kept[0]


def test_a_written_folder_holds_the_version_and_says_its_dtype(masters, tmp_path):
    weights = {name: weight.to(torch.bfloat16) for name, weight in named_weights(masters).items()}
    model_of(masters.config, masters.generation_config, weights).save_pretrained(tmp_path)
    again = load_model(tmp_path)
    assert {name: w.float().numpy().tobytes() for name, w in weights.items()} == {
        name: w.numpy().tobytes() for name, w in named_weights(again).items()
    }
    assert '"dtype": "bfloat16"' in (tmp_path / "config.json").read_text()
    np.testing.assert_array_equal(
        again(input_ids=IDS).logits.detach().numpy(), by_hand(masters)(input_ids=IDS).logits.detach().numpy()
    )
