"""Where the moments are and how many bits they have: what a step makes of it, and what a checkpoint goes on from."""

import pytest
import torch

from oldlogits.core.errors import RunFolderError
from oldlogits.models.load import named_weights
from oldlogits.run.specs import trainer_spec
from oldlogits.train.optimizer import Optimizer
from oldlogits.train.trainer import Trainer
from order_desk.tiny import TinySize, save_tiny, tiny_model, tiny_tokenizer

from .test_trainer import PROBE, batch_at, old_of

KINDS = {
    "adamw": {},
    "adamw on the host": {"offload_optimizer": True},
    "8 bits": {"optimizer": "adamw-8bit"},
    "8 bits on the host": {"optimizer": "adamw-8bit", "offload_optimizer": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose matrices are large enough for moments in 8 bits."""
    path, tokenizer = tmp_path_factory.mktemp("model"), tiny_tokenizer([f"w{i}" for i in range(20)])
    size = TinySize(hidden=64, layers=1, heads=2, kv_heads=1, mlp=128, max_context=128)
    save_tiny(path, tiny_model(size, len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id, seed=3), tokenizer)
    return path


def trainer_of(folder, recipe, kind):
    if "8 bits" in kind:
        pytest.importorskip("bitsandbytes")
    keys = {"lr": 1e-3, "warmup_steps": 0, "minibatches_per_update": 2, "weight_decay": 0.1, **KINDS[kind]}
    trainer = Trainer(trainer_spec(recipe(trainer=keys)), folder, PROBE)
    trainer.publish()
    return trainer


def update(trainer, version):
    trainer.put_batch(batch := batch_at(version, offset=version))
    result = trainer.train(old_of(trainer, batch))
    trainer.publish()
    return result


def weights_of(trainer):
    return {name: weight.clone() for name, weight in named_weights(trainer.live.model).items()}


def test_adamw_is_fused(folder, recipe):
    assert trainer_of(folder, recipe, "adamw").optimizer.adamw.defaults["fused"]


@pytest.mark.parametrize(("here", "on_host"), [("adamw", "adamw on the host"), ("8 bits", "8 bits on the host")])
def test_a_step_in_the_hosts_memory_is_to_the_last_bit_the_step_where_the_masters_are(folder, recipe, here, on_host):
    trainers = [trainer_of(folder, recipe, kind) for kind in (here, on_host)]
    for version in range(3):
        results = [update(trainer, version) for trainer in trainers]
        assert results[0].metrics["grad/norm"] == results[1].metrics["grad/norm"]
    left, right = map(weights_of, trainers)
    assert all(torch.equal(left[name], right[name]) for name in left)
    master = next(iter(trainers[1].live.model.parameters()))
    assert master not in trainers[1].optimizer.adamw.state, "moments are of the copies"


def test_moments_in_8_bits_take_a_quarter_of_the_bytes_and_steps_go_where_those_of_float32_go(folder, recipe):
    full, small = (trainer_of(folder, recipe, kind) for kind in ("adamw", "8 bits"))
    before = weights_of(full)
    for version in range(2):
        for trainer in (full, small):
            update(trainer, version)
    moved = {name: (weights_of(full)[name] - before[name], weights_of(small)[name] - before[name]) for name in before}
    for name, (exact, coarse) in moved.items():
        assert float(torch.cosine_similarity(exact.flatten(), coarse.flatten(), dim=0)) > 0.95, name
    state = small.optimizer.state()
    codes = [value for key, value in state.items() if key.startswith("state") and value.dtype == torch.uint8]
    assert sum(value.numel() for value in codes) > 0.8 * 2 * sum(value.numel() for value in before.values())


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_goes_on_from_its_checkpoint_steps_to_the_last_bit_as_one_that_did_not_end(folder, recipe, kind, tmp_path):
    trainer = trainer_of(folder, recipe, kind)
    for version in range(2):
        update(trainer, version)
    trainer.save(tmp_path / "checkpoint")
    resumed = Trainer(trainer._spec, folder, PROBE)
    resumed.restore(tmp_path / "checkpoint")
    resumed.publish()
    for one in (trainer, resumed):
        update(one, 2)
        update(one, 3)
    left, right = weights_of(trainer), weights_of(resumed)
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize(("written", "read", "fix"), [("adamw", "8 bits", "adamw"), ("8 bits", "adamw", "adamw-8bit")])
def test_moments_of_another_optimizer_are_refused(folder, recipe, written, read, fix):
    trainer = trainer_of(folder, recipe, written)
    update(trainer, 0)
    state = trainer.optimizer.state()
    other = Optimizer(trainer.live.model, trainer_of(folder, recipe, read)._spec)
    with pytest.raises(RunFolderError, match=f"another optimizer.*fix: set trainer.optimizer = '{fix}'"):
        other.load(state, 2)


def test_adapters_alone_have_moments_on_the_host(folder, recipe):
    keys = {"offload_optimizer": True, "minibatches_per_update": 1}
    spec = trainer_spec(recipe(trainer=keys, model={"lora_rank": 2}))
    trainer = Trainer(spec, folder, PROBE)
    held = sum(one.numel() for group in trainer.optimizer.adamw.param_groups for one in group["params"])
    assert held == trainer.live.num_trained < trainer.live.num_parameters
