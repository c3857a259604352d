"""verl's own trainer, client, correction and loss, with `old_log_probs` at the version of each token."""

import asyncio
import copy
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transfer_queue as tq
from omegaconf import OmegaConf
from verl.protocol import DataProto
from verl.trainer.config.algorithm import RolloutCorrectionConfig
from verl.trainer.ppo.core_algos import compute_policy_loss_vanilla
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_add_to_batch
from verl.utils.tensordict_utils import list_of_dict_to_tensordict
from verl.workers.config import ActorConfig
from verl.workers.rollout.llm_server import LLMServerClient
from verl.workers.rollout.replica import TokenOutput

from oldlogits.core.errors import ConfigError, TrajectoryError, VersionEvictedError
from oldlogits.integrations.verl import SPANS, ExactOldTrainer, SpanClient, versions_of
from reports import verl_7196

from .conftest import BAND, DUAL_CLIP, EPS_HIGH, EPS_LOW

pytestmark = pytest.mark.peers


class Workers(verl_7196.Workers):
    """A worker group of one worker, in this process, which notes what it is asked for."""

    def __init__(self, model):
        super().__init__(model)
        self.calls = []

    def __getattr__(self, name):
        def call(*args):
            self.calls.append((name, *args))
            return getattr(self.worker, name)(*args)

        return call


CONFIG = {
    "algorithm": {"rollout_correction": {"bypass_mode": False}},
    "actor_rollout_ref": {
        "rollout": {"temperature": 1.0, "calculate_log_probs": True},
        "actor": {"loss_agg_mode": "token-mean", "loss_scale_factor": None},
    },
}


@pytest.fixture
def trainer(several):
    """A trainer that has published the versions 0 to 3, in the middle of whose next cycle the weights are none of them."""
    made = ExactOldTrainer.__new__(ExactOldTrainer)
    made.config, made.max_staleness = OmegaConf.create(CONFIG), 3
    model = several.blank()
    made.actor_rollout_wg = Workers(model)
    for version in range(4):
        model.load_state_dict(several.models[version].state_dict())
        made.global_steps = version
        made._publish()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    return made


def rollout(several, seed, versions, noise=None, *, prompt_len=4):
    """One trajectory as verl's agent loops put it into the queue: pieces at versions, with a tool's two tokens before each."""
    ids = np.random.default_rng(seed).integers(3, 20, prompt_len + 8 * len(versions))
    tags, spans = np.full(len(ids), -1), []
    for i, version in enumerate(versions):
        start = prompt_len + 8 * i + 2
        tags[start : start + 6] = version
        spans.append((start, start + 6, version))
    mu = torch.from_numpy(several.old(ids, tags)).float()
    mu = mu + noise(mu.shape, seed) if noise else mu
    mask = torch.from_numpy(tags >= 0)
    whole = {"input_ids": torch.from_numpy(ids), "prompts": torch.from_numpy(ids[:prompt_len])}
    response = {
        "responses": torch.from_numpy(ids),
        "response_mask": mask.long(),
        "rollout_log_probs": torch.where(mask, mu, 0.0),
    }
    fields = whole | {name: value[prompt_len:] for name, value in response.items()}
    return fields | {"extra_fields": {"min_global_steps": versions[0], SPANS: spans}}, tags


def put(rollouts, partition):
    keys = [f"{partition}_{i}" for i in range(len(rollouts))]
    fields, tags = list_of_dict_to_tensordict([fields for fields, _ in rollouts]), [{"seq_len": 1} for _ in keys]
    return tq.kv_batch_put(keys=keys, partition_id=partition, fields=fields, tags=tags)


def get(batch, *names):
    return tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=list(names))


def batch_of(several, noise, partition):
    rollouts = [rollout(several, 0, [0, 3], noise), rollout(several, 1, [1, 2, 3], noise), rollout(several, 2, [2], noise)]
    return rollouts, put(rollouts, partition)


def test_old_log_probs_are_the_direct_forward_at_each_tokens_version(transfer_queue, trainer, several, noise):
    rollouts, batch = batch_of(several, noise, "exact")
    before = copy.deepcopy(trainer.actor_rollout_wg.worker.actor.engine.module.state_dict())
    found = get(trainer._compute_old_log_prob(batch, {}), "old_log_probs")["old_log_probs"].unbind()
    for (fields, tags), values in zip(rollouts, found, strict=True):
        np.testing.assert_allclose(values.numpy(), several.old(fields["input_ids"].numpy(), tags)[4:], atol=1e-5)
    lent = [call[1] for call in trainer.actor_rollout_wg.calls if call[0] == "lend_version"]
    assert lent == [3, 2, 1, 0]
    after = trainer.actor_rollout_wg.worker.actor.engine.module.state_dict()
    assert all(torch.equal(before[name], value) for name, value in after.items())


def test_verls_correction_and_loss_are_the_objective_with_exact_old_logits(transfer_queue, trainer, several, noise, objective):
    _, batch = batch_of(several, noise, "loss")
    batch = trainer._compute_old_log_prob(batch, {})
    data = get(batch, "old_log_probs", "rollout_log_probs", "response_mask", "input_ids")
    module = trainer.actor_rollout_wg.worker.actor.engine.module
    rows = []
    for ids, mask in zip(data["input_ids"].unbind(), data["response_mask"].unbind(), strict=True):
        logps = module(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        rows.append(logps[-len(mask) :])
    theta = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    proto = DataProto(batch=data.select("old_log_probs", "rollout_log_probs", "response_mask").to_padded_tensor())
    mask, mu, old = (proto.batch[name].clone() for name in ("response_mask", "rollout_log_probs", "old_log_probs"))
    correction = RolloutCorrectionConfig(rollout_is="token", rollout_is_threshold=f"{1 / BAND}_{BAND}", bypass_mode=False)
    proto, _ = compute_rollout_correction_and_add_to_batch(proto, correction)
    advantages = torch.tensor([1.0, -1.0, 0.5])[:, None].expand_as(theta)
    clips = {"clip_ratio_low": EPS_LOW, "clip_ratio_high": EPS_HIGH, "clip_ratio_c": DUAL_CLIP}
    config = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, **clips)
    loss, _ = compute_policy_loss_vanilla(
        proto.batch["old_log_probs"], theta, advantages, proto.batch["response_mask"], "token-mean", config,
        proto.batch["rollout_is_weights"],
    )  # fmt: skip
    wanted = objective(mu, old, theta, advantages, mask)
    assert loss.item() == pytest.approx(wanted.item(), abs=1e-6)


def test_versions_that_are_gone_and_missing_spans_are_errors_and_the_weights_come_back(transfer_queue, trainer, several):
    trainer.global_steps = 6
    trainer._publish()
    module = trainer.actor_rollout_wg.worker.actor.engine.module
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(VersionEvictedError, match="version 1"):
        trainer._compute_old_log_prob(put([rollout(several, 0, [1, 3])], "gone"), {})
    fields, _ = rollout(several, 0, [3])
    del fields["extra_fields"][SPANS]
    with pytest.raises(TrajectoryError, match="0 pieces"):
        trainer._compute_old_log_prob(put([(fields, None)], "missing"), {})
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_pieces_that_leave_a_sampled_token_out_overlap_or_lie_in_the_prompt_are_errors():
    mask = torch.tensor([1, 1, 0, 1])
    assert versions_of([(5, 7, 2), (8, 9, 4)], 5, mask).tolist() == [2, 2, -1, 4]
    with pytest.raises(TrajectoryError, match="1 of 3 tokens"):
        versions_of([(5, 7, 2)], 5, mask)
    for wrong in ([(5, 7, 2), (6, 9, 4)], [(4, 9, 2)]):
        with pytest.raises(TrajectoryError, match="contradict"):
            versions_of(wrong, 5, mask)


def test_bypass_mode_is_refused(trainer):
    trainer.config.algorithm.rollout_correction.bypass_mode = True
    with pytest.raises(ConfigError, match="bypass"):
        trainer._compute_old_log_prob(None, {})


def test_a_worker_lends_one_version_at_a_time(several):
    workers = Workers(copy.deepcopy(several.models[0]))
    with pytest.raises(ConfigError, match="none was published"):
        workers.lend_version(0)
    workers.publish_version(0, 0)
    workers.lend_version(0)
    with pytest.raises(ConfigError, match="another one"):
        workers.lend_version(0)
    workers.return_version()
    workers.return_version()


@pytest.fixture
def client(monkeypatch):
    """verl's resuming client over a server that answers from a list."""
    answers = []

    async def generate(self, request_id, *, prompt_ids, sampling_params, **asked):
        ids, version, reason = answers.pop(0)
        extra = {"global_steps": version} if version is not None else {}
        return TokenOutput(token_ids=ids, log_probs=[-1.0] * len(ids), stop_reason=reason, num_preempted=0, extra_fields=extra)

    monkeypatch.setattr(LLMServerClient, "generate", generate)
    monkeypatch.setattr(asyncio, "sleep", lambda seconds, sleep=asyncio.sleep: sleep(0))
    rollout_config = SimpleNamespace(response_length=64, name="vllm")
    made = SpanClient(config=SimpleNamespace(actor_rollout_ref=SimpleNamespace(rollout=rollout_config)))
    made.answers = answers
    return made


def test_a_rollouts_pieces_keep_their_versions_over_resumes_and_turns(client):
    async def play():
        client.answers += [([7, 8], 4, "aborted"), ([], 4, "aborted"), ([9], 5, "completed"), ([3, 3, 3], 6, "completed")]
        first = await client.generate("a", prompt_ids=[1, 2, 3], sampling_params={})
        kept = dict(first.extra_fields)  # verl's tool agent loop keeps those of the first turn
        await client.generate("a", prompt_ids=[1, 2, 3, 7, 8, 9, 5, 5], sampling_params={})
        client.answers.append(([4], 6, "completed"))
        other = await client.generate("b", prompt_ids=[1], sampling_params={})
        return first.token_ids, kept, other.extra_fields

    ids, kept, other = asyncio.run(play())
    assert ids == [7, 8, 9]
    assert kept[SPANS] == [(3, 5, 4), (5, 6, 5), (8, 11, 6)]
    assert (kept["min_global_steps"], kept["max_global_steps"]) == (4, 5)  # all that verl itself keeps
    assert other[SPANS] == [(1, 2, 6)]
    assert len(client._rollouts) == 2
    del kept, other
    assert len(client._rollouts) == 0


def test_a_server_without_a_version_is_an_error(client):
    client.answers.append(([7], None, "completed"))
    with pytest.raises(TrajectoryError, match="global_steps"):
        asyncio.run(client.generate("a", prompt_ids=[1], sampling_params={}))


def test_a_client_and_its_spans_can_be_sent_to_another_process(client):
    client.answers.clear()
    spans = client.spans_of("a")
    spans.append((1, 2, 3))
    state = pickle.loads(pickle.dumps({"state": client.__getstate__().keys() - {"config"}, "spans": spans}))
    assert "_rollouts" not in state["state"]
    assert state["spans"] == [(1, 2, 3)]
