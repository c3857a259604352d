"""AReaL's own actor and loss, with its proximal policy scored at the version of each token."""

import copy

import numpy as np
import pytest
import torch
from areal.api.cli_args import OptimizerConfig, PPOActorConfig, RejectionSamplingConfig

from oldlogits.core.errors import ConfigError, TrajectoryError, VersionEvictedError
from oldlogits.integrations.areal import ExactProxLogp
from reports.areal_1569 import PlainActor

from .conftest import BAND, DUAL_CLIP, EPS_HIGH, EPS_LOW

pytestmark = pytest.mark.peers


class CpuActor(PlainActor):
    """The actor of the report, which also trains; its loss is kept."""

    loss = None

    def train(self):
        self.model.train()

    def train_batch(self, batch, loss_fn, loss_weight_fn):
        logps = self.logps(batch)
        self.seen = {**batch, "theta": logps}
        self.loss = loss_fn(logps, torch.zeros_like(logps), batch)
        return {}


class ExactActor(ExactProxLogp, CpuActor):
    max_staleness = 3


def config(**changes):
    band = RejectionSamplingConfig(level="token", action="mask", metric="ratio", upper=BAND, lower=1 / BAND)
    settings = {"eps_clip": EPS_LOW, "eps_clip_higher": EPS_HIGH, "c_clip": DUAL_CLIP, "rejection_sampling": band}
    settings |= {"use_decoupled_loss": True, "prox_logp_method": "recompute", "kl_ctl": 0.0, "ppo_n_minibatches": 1}
    settings |= {"adv_norm": None, "reward_norm": None, "recompute_logprob": True, "optimizer": OptimizerConfig()}
    return PPOActorConfig(**settings | changes)


@pytest.fixture
def actor(several):
    """An actor that has been at versions 0 to 3, and is at 3 with a step's weights that are none of them."""
    made = ExactActor(config(), several.blank())
    warm = trajectory(several, 0, [0], reward=1.0)
    for version in range(4):
        made.version = version
        made.model.load_state_dict(several.models[version].state_dict())
        made.compute_logp([warm])
    return made


def trajectory(several, seed, versions, *, reward, noise=None):
    """One trajectory as AReaL's workflows return it: [1, token] tensors."""
    draw = np.random.default_rng(seed)
    num = 5 + 6 * len(versions)  # the last token is sampled: a reward is given there
    ids, tags = draw.integers(3, 20, num), np.full(num, -1)
    for i, version in enumerate(versions):
        tags[6 + 6 * i : 11 + 6 * i] = version
    mu = torch.from_numpy(several.old(ids, tags)).float()
    mu = mu + noise(mu.shape, seed) if noise else mu
    mask = torch.from_numpy(tags >= 0)
    fields = {"input_ids": torch.from_numpy(ids), "loss_mask": mask.int(), "versions": torch.from_numpy(tags)}
    fields |= {"attention_mask": torch.ones(len(ids), dtype=torch.bool), "logprobs": torch.where(mask, mu, 0.0)}
    return {name: value[None] for name, value in fields.items()} | {"rewards": torch.tensor([reward])}


def batch(several, noise):
    made = ([0, 3], 1.0), ([1, 2, 3], -1.0), ([2], 0.5), ([0, 1], -0.7)
    return [trajectory(several, i, versions, reward=reward, noise=noise) for i, (versions, reward) in enumerate(made)]


def test_prox_logp_is_the_direct_forward_at_each_tokens_version(actor, several, noise):
    data = batch(several, noise)
    before = copy.deepcopy(actor.model.state_dict())
    found = actor.compute_logp(data)
    for one, values in zip(data, found, strict=True):
        wanted = several.old(one["input_ids"][0].numpy(), one["versions"][0].numpy())
        np.testing.assert_allclose(values[0].numpy(), np.roll(wanted, -1), atol=1e-5)
    assert all(torch.equal(before[name], value) for name, value in actor.model.state_dict().items())


def test_areals_decoupled_loss_is_the_objective_with_exact_old_logits(actor, several, noise, objective):
    data = batch(several, noise)
    for one, values in zip(data, actor.compute_logp(data), strict=True):
        one["prox_logp"] = values
    data = actor.actor.compute_advantages(data)
    with torch.no_grad():
        for parameter in actor.model.parameters():  # theta is ahead of every version
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    actor.actor.ppo_update(data)
    seen, old = actor.seen, actor.seen["prox_logp"]
    wanted = objective(seen["logprobs"], old, seen["theta"], seen["advantages"], seen["loss_mask"])
    assert actor.loss.item() == pytest.approx(wanted.item(), abs=1e-6)
    names, parameters = zip(*actor.model.named_parameters(), strict=True)
    theirs = torch.autograd.grad(actor.loss, parameters, retain_graph=True)
    for name, a, b in zip(names, theirs, torch.autograd.grad(wanted, parameters), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4, msg=name)


def test_what_areal_itself_recomputes_is_another_policy(actor, several):
    data = [trajectory(several, 5, [0, 1], reward=1.0)]
    mask = data[0]["loss_mask"].bool().roll(-1, dims=-1)
    theirs, ours = CpuActor.compute_logp(actor, data)[0], actor.compute_logp(data)[0]
    assert (theirs - ours)[mask].abs().mean() > 0.01


def test_a_version_that_is_gone_a_missing_tag_and_missing_versions_are_errors(actor, several):
    actor.version = 6
    actor.model.load_state_dict(several.models[0].state_dict())
    with pytest.raises(VersionEvictedError, match="version 1"):
        actor.compute_logp([trajectory(several, 1, [1, 3], reward=1.0)])
    untagged = trajectory(several, 1, [3], reward=1.0)
    untagged["versions"][0, 7] = -1
    with pytest.raises(TrajectoryError, match="1 of 5 tokens"):
        actor.compute_logp([untagged])
    del untagged["versions"]
    with pytest.raises(TrajectoryError, match="no versions"):
        actor.compute_logp([untagged])


def test_tags_that_are_not_as_many_as_the_tokens_are_an_error(actor, several):
    one = trajectory(several, 1, [3], reward=1.0)
    one["versions"] = one["versions"][:, :-1]
    with pytest.raises(TrajectoryError):
        actor.compute_logp([one])


@pytest.mark.parametrize("changes", [{"prox_logp_method": "loglinear"}, {"use_decoupled_loss": False}])
def test_settings_that_ask_for_another_proximal_policy_are_refused(several, changes):
    with pytest.raises(ConfigError, match="prox_logp_method"):
        ExactActor(config(**changes), several.blank()).compute_logp([trajectory(several, 1, [0], reward=1.0)])


def test_a_reference_model_computes_what_it_always_does(several):
    reference = ExactActor(config(optimizer=None), copy.deepcopy(several.models[2]))
    one = trajectory(several, 1, [0], reward=1.0)
    one["versions"].fill_(99)
    wanted = CpuActor.compute_logp(reference, [one])[0]
    assert torch.equal(reference.compute_logp([one])[0], wanted)
