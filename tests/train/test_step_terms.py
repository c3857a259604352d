"""An update with a reference and an entropy bonus: loss and gradient in plain float64, over micro-batches and ranks."""

import copy
import dataclasses
import math
import statistics

import numpy as np
import pytest
import torch

from oldlogits.core.policies import OLD
from oldlogits.models.ranks import ALONE, Ranks
from oldlogits.run.specs import trainer_spec
from oldlogits.train import step as step_module
from oldlogits.train.loss_tokens import LossTokens, TokenRecord
from oldlogits.train.optimizer import Optimizer
from oldlogits.train.step import update

from .test_step import VERSION, assert_same_gradient, case, config_of, logps, one_step, oracle, perturbed, run  # noqa: F401

BONUS, COEFFICIENT = 0.07, 0.3


@pytest.fixture(scope="module")
def reference(case):  # noqa: F811
    """float32 [loss token]: log-probs of another model."""
    with torch.no_grad():
        found = logps(copy.deepcopy(perturbed(case.model, 0.3, 11)).double(), case.batch)
    return found[case.batch.loss_mask].float().numpy()


def entropies(model, batch):
    """float64 [loss token], with a graph: of each token's distribution at the temperature that sampled it."""
    pieces = []
    for start, end in zip(batch.starts[:-1], batch.starts[1:], strict=True):
        ids = torch.from_numpy(batch.token_ids[start:end])
        heat = torch.from_numpy(batch.temperature[start:end, None]).double().roll(-1, 0)
        found = torch.log_softmax(model(ids[None]).logits[0].double() / heat, 1)[:-1]
        pieces += [torch.zeros(1, dtype=torch.float64), -(found.exp() * found).sum(1)]
    return torch.cat(pieces)[torch.from_numpy(batch.loss_mask)]


def added(case, reference, estimator):  # noqa: F811
    """What the terms add to the loss, with its gradient by name: a mean over tokens, one by one."""
    theta, spread = logps(case.double, case.batch)[case.batch.loss_mask], entropies(case.double, case.batch)
    total = 0.0
    for i, logp in enumerate(theta):
        ratio = (float(reference[i]) - logp).exp()
        kl = {"none": 0 * logp, "k2": ratio.log() ** 2 / 2, "k3": ratio - 1 - ratio.log()}[estimator]
        total = total + (COEFFICIENT * kl - BONUS * spread[i]) / len(theta)
    case.double.zero_grad()
    total.backward()
    return float(total.detach()), {name: p.grad.clone() for name, p in case.double.named_parameters()}


def keys(estimator):
    kl = {} if estimator == "none" else {"kl_coefficient": COEFFICIENT, "kl_estimator": estimator}
    return {"entropy_bonus": BONUS, **kl}


def batch_with(case, reference, estimator):  # noqa: F811
    return dataclasses.replace(one_step(case.batch), logp_reference=None if estimator == "none" else reference)


@pytest.mark.parametrize("estimator", ["none", "k2", "k3"])
def test_loss_and_gradient_are_the_papers_and_what_the_terms_add(case, recipe, reference, estimator):  # noqa: F811
    config = config_of(recipe, "decoupled_exact", objective=keys(estimator))
    result, (found,) = run(case, config, case.scored(OLD), batch=batch_with(case, reference, estimator))
    more, grads = added(case, reference, estimator)
    loss, plain, _, _ = oracle(case, "decoupled_exact")
    assert result.metrics["loss/value"] == pytest.approx(loss + more, abs=3e-6)
    assert_same_gradient(found, {name: plain[name] + grads[name] for name in plain})
    assert max(float((grads[name]).abs().max()) for name in grads) > 0.01 * max(float(g.abs().max()) for g in plain.values())
    assert result.metrics["policy/entropy"] == pytest.approx(
        float(entropies(case.double, case.batch).detach().mean()), abs=1e-5
    )


def test_metrics_say_how_far_theta_is_from_its_reference(case, recipe, reference):  # noqa: F811
    config = config_of(recipe, "decoupled_exact", objective={"kl_coefficient": 1e-9})
    broken = reference.copy()
    broken[3] = np.nan
    result, _ = run(case, config, case.scored(OLD), batch=batch_with(case, broken, "k3"))
    theta = logps(case.double, case.batch)[case.batch.loss_mask].tolist()
    ratios = [float(reference[i]) - theta[i] for i in range(len(theta)) if i != 3]
    k1, k3 = -sum(ratios) / len(ratios), sum(math.exp(r) - 1 - r for r in ratios) / len(ratios)
    assert result.metrics["kl/theta_ref_k1"] == pytest.approx(k1, abs=1e-5)
    assert result.metrics["kl/theta_ref_k3"] == pytest.approx(k3, abs=1e-5)
    assert math.isfinite(result.metrics["loss/value"])
    without, _ = run(case, config_of(recipe, "decoupled_exact"), case.scored(OLD), batch=one_step(case.batch))
    assert not any("theta_ref" in name for name in without.metrics)


def test_in_the_reward_the_reference_adds_nothing_to_the_loss(case, recipe, reference):  # noqa: F811
    """What it costs is in the advantages already, `tests/loop/test_reference.py`."""
    objective = {"kl_coefficient": COEFFICIENT, "kl_in": "reward"}
    result, (found,) = run(
        case,
        config_of(recipe, "decoupled_exact", objective=objective),
        case.scored(OLD),
        batch=batch_with(case, reference, "k1"),
    )
    plain, (expected,) = run(case, config_of(recipe, "decoupled_exact"), case.scored(OLD), batch=one_step(case.batch))
    assert result.metrics["loss/value"] == plain.metrics["loss/value"]
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert "kl/theta_ref_k3" in result.metrics


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("micro", [1, 12, 1000])
def test_ranks_and_micro_batches_leave_the_gradient_as_it_is(case, recipe, reference, num_ranks, micro):  # noqa: F811
    batch = batch_with(case, reference, "k3")

    def of(micro, ranks):
        model = copy.deepcopy(case.model)
        config = config_of(recipe, "decoupled_exact", trainer={"micro_batch_tokens": micro}, objective=keys("k3"))
        tokens = LossTokens.of(batch, case.scored(OLD), VERSION)
        seen = TokenRecord.empty(len(tokens.flat), torch.device("cpu"))
        step_module._accumulate(model, batch, tokens, 0, seen, trainer_spec(config), ranks)
        return {name: p.grad for name, p in model.named_parameters()}

    whole = of(1000, ALONE)
    parts = [of(micro, Ranks(rank=rank, num_ranks=num_ranks, mesh=None)) for rank in range(num_ranks)]
    average = {name: sum(part[name] for part in parts) / num_ranks for name in whole}
    assert_same_gradient(average, whole, tolerance=1e-6)


class Watching:
    """An optimizer that notes by how much each step's learning rate is scaled."""

    lr = 0.25

    def __init__(self, model):
        self.model, self.scales = model, []

    def zero_grad(self):
        self.model.zero_grad(set_to_none=True)

    def step(self, lr_scale=1.0):
        self.scales.append(lr_scale)


@pytest.mark.parametrize("behind", [0, 3])
def test_the_learning_rate_of_a_step_falls_with_the_mean_staleness_of_its_own_tokens(case, recipe, behind):  # noqa: F811
    trainer = {"minibatches_per_update": 2, "lr_by_staleness": "inverse"}
    spec, optimizer = trainer_spec(config_of(recipe, "ppo_clip_train_infer", trainer=trainer)), Watching(case.model)
    result = update(case.model, optimizer, case.batch, None, version=VERSION + behind, spec=spec)
    lags, steps = VERSION + behind - case.batch.version, case.batch.step[case.batch.sequence]
    means = [statistics.mean(lags[case.batch.loss_mask & (steps == step)].tolist()) for step in (0, 1)]
    assert optimizer.scales == pytest.approx([1 / max(1, mean) for mean in means])
    assert result.metrics["train/lr"] == 0.25
    assert result.metrics["train/lr_scale"] == pytest.approx(sum(optimizer.scales) / 2)
    assert (optimizer.scales == [1, 1]) == (behind == 0)


def test_a_scaled_step_moves_by_as_much_less_and_leaves_the_schedule_as_it_is(case, recipe):  # noqa: F811
    moved = []
    for scale in (1.0, 0.25):
        model = copy.deepcopy(case.model)
        optimizer = Optimizer(model, trainer_spec(recipe(trainer={"warmup_steps": 4})))
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step(scale)
        moved.append({name: p.detach() - before[name] for name, p in model.named_parameters()})
        assert optimizer.lr == pytest.approx(0.01 * 2 / 5), "that of the next step"
    for name, whole in moved[0].items():
        torch.testing.assert_close(moved[1][name], 0.25 * whole, rtol=1e-3, atol=1e-6)
