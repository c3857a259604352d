"""The real chain: bf16 forward, fp32 masters that begin at bf16 values, AdamW on the package's own text."""

from pathlib import Path

import pytest
import torch

from oldlogits.bench.chains import LENGTH, NUM_SEQUENCES, RealModel, batches
from oldlogits.models.load import load_tokenizer


@pytest.fixture
def model(chatml_llama: Path) -> RealModel:
    return RealModel(chatml_llama, lr=1e-3)


@pytest.mark.slow
def test_the_masters_begin_at_bf16_values_and_leave_them(model: RealModel):
    before = {name: master.clone() for name, master in model.masters.items()}
    assert all(torch.equal(master, master.bfloat16().float()) for master in before.values())
    assert {master.dtype for master in before.values()} == {torch.float32}
    model.step()
    changed = {name for name, master in model.masters.items() if not torch.equal(master, before[name])}
    assert changed == set(before)
    assert not all(torch.equal(master, master.bfloat16().float()) for master in model.masters.values())


@pytest.mark.slow
def test_the_first_step_is_adams_of_size_lr(model: RealModel):
    """With moments at zero, m / sqrt(v) is the gradient's sign; where it is zero nothing moves."""
    before = {name: master.clone() for name, master in model.masters.items()}
    model.step()
    moved = torch.cat([(model.masters[name] - before[name]).abs().flatten() for name in before])
    assert moved.max().item() == pytest.approx(1e-3, rel=1e-2)
    assert (moved[moved > 0].median().item()) == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.slow
def test_the_same_steps_give_the_same_masters(chatml_llama: Path):
    first, second = RealModel(chatml_llama, lr=1e-3), RealModel(chatml_llama, lr=1e-3)
    for _ in range(2):
        first.step()
        second.step()
    assert all(torch.equal(first.masters[name], second.masters[name]) for name in first.masters)


@pytest.mark.slow
def test_the_forward_reads_the_masters_in_bf16(model: RealModel):
    model.step()
    for name, parameter in model._model.named_parameters():
        assert torch.equal(parameter.data, model.masters[name].bfloat16())


@pytest.mark.slow
def test_batches_are_of_the_packages_text(chatml_llama: Path):
    tokenizer = load_tokenizer(chatml_llama)
    batch = next(batches(tokenizer))
    assert batch.shape == (NUM_SEQUENCES, LENGTH)
    assert batch.dtype == torch.int64
