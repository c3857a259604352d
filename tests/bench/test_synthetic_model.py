"""The random model has the shape, the steps and the change rates that it is documented with."""

import math

import pytest
import torch

from oldlogits.bench.chains import BETAS, UPDATE_STD, SyntheticModel, llama_shapes

NUM_PARAMS = 1_000_000


def flat(model: SyntheticModel) -> torch.Tensor:
    return torch.cat([master.flatten() for master in model.masters.values()])


@pytest.mark.parametrize("num_params", [100_000, 200_000, 1_000_000, 24_000_000, 128_000_000, 1_000_000_000, 4_000_000_000])
def test_a_model_has_about_the_parameters_that_are_asked_for(num_params: int):
    shapes = llama_shapes(num_params)
    assert sum(math.prod(shape) for shape in shapes.values()) == pytest.approx(num_params, rel=0.3 if num_params < 1e6 else 0.1)
    assert "model.embed_tokens.weight" in shapes
    assert "lm_head.weight" not in shapes


def test_the_usual_model_is_the_documented_one():
    shapes = llama_shapes(128_000_000)
    assert shapes["model.embed_tokens.weight"] == (49152, 576)
    assert shapes["model.layers.27.mlp.down_proj.weight"] == (576, 1536)
    assert "model.layers.28.mlp.down_proj.weight" not in shapes
    assert sum(math.prod(shape) for shape in shapes.values()) == 127_434_816


def test_the_short_run_has_tensors_of_the_same_sizes():
    full, short = llama_shapes(128_000_000), llama_shapes(24_000_000)
    assert all(shape == full[name] for name, shape in short.items() if "layers" in name)


def test_the_masters_are_views_of_one_buffer_that_a_step_changes():
    model = SyntheticModel(num_params=NUM_PARAMS, lr=1e-3)
    before = flat(model)
    model.step()
    assert not torch.equal(before, flat(model))
    assert len({master.untyped_storage().data_ptr() for master in model.masters.values()}) == 1
    assert before.std().item() == pytest.approx(0.02, rel=0.01)


def test_the_first_update_is_like_every_other():
    model = SyntheticModel(num_params=NUM_PARAMS, lr=1e-3)
    updates = []
    for _ in range(3):
        before = flat(model)
        model.step()
        updates.append((flat(model) - before) / 1e-3)
    for update in updates:
        assert update.std().item() == pytest.approx(UPDATE_STD, rel=0.01)
        assert update.mean().item() == pytest.approx(0, abs=0.001)
    correlation = torch.corrcoef(torch.stack(updates))[0]
    assert correlation[1].item() == pytest.approx(BETAS[0], abs=0.01)
    assert correlation[2].item() == pytest.approx(BETAS[0] ** 2, abs=0.01)


@pytest.mark.parametrize("lr, share", [(1e-6, 0.0096), (5e-6, 0.0373), (1e-5, 0.0652), (1e-4, 0.343)])
def test_the_shares_of_changed_bf16_values_are_those_of_large_models(lr: float, share: float):
    model = SyntheticModel(num_params=NUM_PARAMS, lr=lr)
    before = flat(model).bfloat16().view(torch.int16)
    model.step()
    changed = before != flat(model).bfloat16().view(torch.int16)
    assert changed.double().mean().item() == pytest.approx(share, rel=0.05)


def test_learning_rates_see_the_same_weights_and_gradients():
    slow, fast = (SyntheticModel(num_params=100_000, lr=lr) for lr in (1e-6, 1e-4))
    assert torch.equal(flat(slow), flat(fast))
    start = flat(slow)
    slow.step()
    fast.step()
    torch.testing.assert_close((flat(fast) - start) / 100, flat(slow) - start, atol=1e-8, rtol=0.01)
