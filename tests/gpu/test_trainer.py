"""What the trainer computes on a device is what it computes on the CPU; exactness does not depend on where it is."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from oldlogits.batch.pad import micro_batches
from oldlogits.config.load import config_from_table
from oldlogits.core.engine import EngineSpec, Sampling
from oldlogits.core.policies import MU, OLD, THETA, VARIANTS
from oldlogits.core.scoring import Scored
from oldlogits.engines.embedded.engine import EngineCore
from oldlogits.loop.probe import EXACT
from oldlogits.models.forward import Arithmetic, round_at_use
from oldlogits.models.load import load_model
from oldlogits.models.scorer import head_logps, score_tokens
from oldlogits.objective import split_ratio, surrogate, token_weights, weighted_loss
from oldlogits.run.specs import trainer_spec
from oldlogits.train.trainer import Trainer

from ..builders import batch_of, sampled, trajectory

pytestmark = pytest.mark.gpu

CPU = torch.device("cpu")
PROBE = [3, 9, 10, 11, 12, 2, 4, 13]


def batch_at(*versions):
    """Two groups of two; each trajectory has one turn at each of the versions."""
    made = []
    for i in range(4):
        segments = [s for v in versions for s in ([3, 9 + i], sampled([12, 13 + i, 2], v, logp=-3.4, temperature=0.8))]
        made.append(trajectory(*segments, id=f"g{i // 2}.{i % 2}", group=f"g{i // 2}", reward=float(i % 2)))
    return batch_of(made, [-1.0, 1.0, -1.0, 1.0], num_steps=2)


def trainer_on(device, folder, *, compute="fp32", forward_dtype="auto", **proximal):
    trainer = {"device": device.type, "minibatches_per_update": 2, "warmup_steps": 0, "lr": 1e-4, "max_grad_norm": 1e9}
    trainer["compute"] = compute
    config = config_from_table({"trainer": trainer, "model": {"forward_dtype": forward_dtype}, "proximal": proximal})
    return Trainer(trainer_spec(config), folder, PROBE)


def update(trainer, *versions):
    """Publish, score each token at its own version, train; the update's result."""
    trainer.publish()
    batch = batch_at(*versions)
    trainer.put_batch(batch)
    tags = batch.version[batch.loss_mask]
    values = np.zeros(len(tags), np.float32)
    for version in np.unique(tags):
        values[tags == version] = trainer.scorer.score(np.flatnonzero(tags == version), int(version))
    return trainer.train(Scored(policy=OLD, values=values, computed_at=tags, num_switches=len(np.unique(tags))))


def loss_and_gradient(logps, advantages, device):
    theta = logps[THETA].to(device).requires_grad_()
    here = {policy: values.to(device) for policy, values in logps.items()} | {THETA: theta}
    mask = torch.ones(len(theta), dtype=torch.bool, device=device)
    knobs = {"band": 1.3, "eps_low": 0.2, "eps_high": 0.28, "dual_clip": 3.0, "discrepancy": "weight_and_mask"}
    tokens = surrogate(split_ratio(VARIANTS["decoupled_exact"], here), advantages.to(device), mask, **knobs)
    value = weighted_loss(tokens.values, token_weights(mask, mode="token-mean"))
    (gradient,) = torch.autograd.grad(value, theta)
    return value.detach().cpu(), gradient.cpu()


def test_loss_and_gradient_are_those_of_the_cpu(device):
    g = torch.Generator().manual_seed(0)
    old = -5 * torch.rand(500, generator=g)
    logps = {OLD: old, MU: old + 0.2 * torch.randn(500, generator=g), THETA: old + 0.3 * torch.randn(500, generator=g)}
    advantages = torch.randn(500, generator=g)
    for found, expected in zip(
        loss_and_gradient(logps, advantages, device), loss_and_gradient(logps, advantages, CPU), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)


def test_log_probs_of_the_head_and_their_gradient_are_those_of_the_cpu(tiny_folder, device):
    batch = batch_at(0, 0)
    (micro,) = micro_batches(batch, np.flatnonzero(batch.loss_mask), 1000)
    states = torch.randn(*micro.input_ids.shape, 32, generator=torch.Generator().manual_seed(1))

    def on(where, chunk):
        model = load_model(tiny_folder).to(where)
        hidden = states.clone().to(where).detach().requires_grad_()
        logps = head_logps(model, hidden, micro.to(where), head_chunk_tokens=chunk)
        (gradient,) = torch.autograd.grad(logps.sum(), hidden)
        return logps.detach().cpu(), gradient.cpu()

    for found, expected in zip(on(device, 3), on(CPU, 1000), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_bf16_head_with_float32_sums_is_that_of_the_cpu(tiny_folder, device):
    g = torch.Generator().manual_seed(2)
    states, upstream = torch.randn(6, 32, generator=g).to(torch.bfloat16), torch.randn(6, 27, generator=g)

    def on(where):
        model = load_model(tiny_folder).to(where)
        round_at_use(model, torch.bfloat16, Arithmetic(compute=torch.bfloat16))
        head, hidden = model.get_output_embeddings(), states.clone().to(where).detach().requires_grad_()
        logits = head(hidden)
        logits.backward(upstream[:, :1].to(where).expand_as(logits))
        return logits.detach().cpu(), hidden.grad.float().cpu(), head.weight.grad.cpu()

    logits, hidden, weight = on(device)
    expected = on(CPU)
    torch.testing.assert_close(logits, expected[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(hidden, expected[1], rtol=0.02, atol=0.02)  # a bf16 number
    torch.testing.assert_close(weight, expected[2], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("scoring", ["prefix", "same-shape"])
def test_in_bf16_lag_0_is_exact_and_the_same_shape_leaves_no_noise(tiny_folder, device, scoring):
    trainer = trainer_on(device, tiny_folder, compute="bf16", scoring=scoring, current_version="scored")
    exact = update(trainer, 0, 0)
    errors = trainer.state().consistency
    assert exact.rescored_max_abs_error <= (0 if scoring == "same-shape" else max(1e-5, 10 * errors.packing_max_abs_error))
    trainer = trainer_on(device, tiny_folder, compute="bf16", scoring=scoring)
    for versions in ((0, 0), (0, 1), (1, 2)):
        result = update(trainer, *versions)
        assert not result.lag0_max_abs_error > 0
    assert trainer.state().consistency.publish_max_abs_error == 0


def test_scores_are_those_of_the_cpu(tiny_folder, device):
    batch = batch_at(0, 0, 0)
    tokens = np.flatnonzero(batch.loss_mask)

    def on(where):
        model = load_model(tiny_folder).to(where)
        return score_tokens(model, batch, tokens, micro_batch_tokens=40, head_chunk_tokens=4)

    np.testing.assert_allclose(on(device), on(CPU), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_updates_are_those_of_the_cpu_and_old_log_probs_exact(tiny_folder, device, dtype):
    here, there = (trainer_on(where, tiny_folder, forward_dtype=dtype) for where in (device, CPU))
    for versions in ((0, 0), (0, 1), (1, 2)):
        found, expected = update(here, *versions), update(there, *versions)
        assert found.staleness_counts == expected.staleness_counts
        np.testing.assert_allclose(found.table["logp_theta"], expected.table["logp_theta"], rtol=0, atol=5e-3)
    assert max(update(here, 3).lag0_max_abs_error, 0.0) <= 1e-5
    stored = here.stored_versions
    assert stored == tuple(range(4))
    batch = batch_at(0)
    here.put_batch(batch)
    tokens = np.arange(int(batch.loss_mask.sum()))
    here.publish()
    first = [here.scorer.score(tokens, version).tolist() for version in stored]
    assert [here.scorer.score(tokens, version).tolist() for version in reversed(stored)] == first[::-1]
    assert max(vars_of(here.state().consistency)) <= 1e-5


def vars_of(errors):
    """The numbers of the consistency checks that were made."""
    values = [getattr(errors, name) for name in errors.__dataclass_fields__]
    return [value for value in values if isinstance(value, float) and value == value]


def test_engine_and_trainer_agree_on_the_probe_at_every_version(tiny_folder, device):
    trainer = trainer_on(device, tiny_folder)
    spec = EngineSpec(model_path=str(tiny_folder), max_num_seqs=4, max_context=64, device=device.type)
    core = EngineCore(spec)
    for version in range(3):
        published = trainer.publish()
        core.pause("keep", "recompute")
        core.update_weights(trainer.full_weights().tensors, version)
        core.resume()
        core.add(f"probe/{version}", PROBE, Sampling(max_tokens=1, prompt_logprobs=True))
        ((_, generation),) = core.step()
        assert generation.spans[0].version == version
        np.testing.assert_allclose(generation.prompt_logprobs, published.probe_logps, rtol=0, atol=EXACT)
        trainer.put_batch(batch_at(version))
        tokens = np.arange(int(batch_at(version).loss_mask.sum()))
        values = trainer.scorer.score(tokens, version)
        tags = np.full(len(tokens), version)
        trainer.train(Scored(policy=OLD, values=values, computed_at=tags, num_switches=1))


def test_a_checkpoint_of_a_device_goes_on_there(tiny_folder, device, tmp_path):
    trainer, other = trainer_on(device, tiny_folder), trainer_on(device, tiny_folder)
    update(trainer, 0)
    trainer.begin_checkpoint(tmp_path / "checkpoint", {})
    trainer.end_checkpoint(wait=True)
    other.restore(tmp_path / "checkpoint")
    left, right = (one.publish().probe_logps.tolist() for one in (trainer, other))
    assert left == right
    here, there = (update(one, 1).table["logp_theta"].tolist() for one in (trainer, other))
    assert here == there
