"""TRL's own trainers: the loss that they compute from our log-probs is the objective, OLD that of each token's version."""

import asyncio
import json
import queue
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator, PartialState
from datasets import Dataset
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer
from trl.experimental.async_grpo.async_grpo_trainer import (
    AsyncGRPOTrainer,
    DataCollatorForRollout,
    FixedCountBatcher,
    RolloutQueueDataset,
)
from trl.experimental.async_grpo.async_rollout_worker import (
    AsyncRolloutWorker,
    RolloutSample,
    TurnRecord,
)

from oldlogits.batch.token_table import read_token_table
from oldlogits.core.errors import ConfigError, ExactnessError, MissingLogprobError, TrajectoryError, VersionEvictedError
from oldlogits.integrations.trl import VersionedRolloutLoop, make_exact
from oldlogits.integrations.trl_sync import SplitRatios, discrepancy_weights
from oldlogits.integrations.trl_tokens import TokenTables
from reports.trl_6945 import Offline, OverTree

from .conftest import BAND, DUAL_CLIP, EPS_HIGH, EPS_LOW

pytestmark = pytest.mark.peers


@pytest.fixture(autouse=True, scope="module")
def _accelerate():
    """What TRL's processes do before they log."""
    PartialState(cpu=True)


class RecordedLoop(Offline, VersionedRolloutLoop):
    """TRL's loop with a server that answers from a list: tokens, their log-probs, and the version that it has afterwards."""

    def __init__(self, answers, version, *, lora_name=None):
        super().__init__(version, lora_name=lora_name)
        self.answers, self.asked = list(answers), []

    async def _post(self, path, payload, timeout, max_retries=3):
        ids, logps, version = self.answers.pop(0)
        self.asked.append(payload["model"])
        self._model_version_value.value = version
        return {"choices": [{"token_ids": ids, "logprobs": {"token_logprobs": logps}}]}

    async def play(self, prompts):
        """Play conversations of as many turns as the answers of each, and make samples of them."""
        conversations, oldest = [], self.model_version
        for prompt, num_turns in prompts:
            turns, context = [], list(prompt)
            for _ in range(num_turns):
                ids, logps = await self._generate_one_turn(context)
                turns.append(TurnRecord(context, ids, logps))
                context = [*context, *ids, 3, 4]
            conversations.append(turns)
        return await self.scored(conversations, version=oldest)


class Worker:
    """A rollout worker in this process, as TRL's protocol allows, whose samples were recorded."""

    _loop_cls = AsyncRolloutWorker._loop_cls

    def __init__(self, samples=()):
        self.rollout_buffer, self.metrics_queue, self.version, self._loop_kwargs = queue.Queue(), queue.Queue(), 0, {}
        for sample in samples:
            self.rollout_buffer.put(sample)

    def start(self): ...

    def stop(self): ...

    def update_model_version(self, version):
        self.version = version

    def check_health(self, stale_after_s):
        raise queue.Empty


class Transfer:
    """A weight transfer that notes what happens, and takes half of what it is sent."""

    def __init__(self, worker):
        self.worker, self.seen = worker, []

    def init_weight_transfer(self): ...

    def destroy(self): ...

    def pause(self):
        self.seen.append("pause")

    def send_weights(self, iterator):
        self.seen.append(next(iterator)[0])

    def resume(self):
        self.seen.append(("resume", self.worker.version))


def answer(several, context, length, version, seed, noise=None, *, then=None):
    """What an engine at a version answers: tokens, their log-probs with its noise, the version that it has afterwards."""
    ids = np.random.default_rng(seed).integers(5, 20, length)
    logps = several.direct(version, [*context, *ids])[-length:]
    logps = logps + noise(logps.shape, seed).numpy() if noise else logps
    return ids.tolist(), logps.tolist(), version if then is None else then


@pytest.fixture
def recorded(several, noise):
    """Two conversations of two turns: the first with both at version 1, the second with turns at 2 and 3."""
    first, second = [3, 9, 4], [3, 9, 5]
    a = answer(several, first, 6, 1, 10, noise)
    b = answer(several, [*first, *a[0], 3, 4], 7, 1, 11, noise, then=2)
    c = answer(several, second, 8, 2, 12, noise, then=3)
    d = answer(several, [*second, *c[0], 3, 4], 9, 3, 13, noise)
    return [a, (*b[:2], 1), (*c[:2], 2), d], [(first, 2), (second, 2)]


@pytest.fixture
def samples(recorded):
    """The samples of the recorded conversations; between the turns, but within none, the version moves on."""
    answers, prompts = recorded
    loop = RecordedLoop(answers, 1)
    versions = iter([1, 1, 2, 3])

    async def turn(prompt_ids, inner=loop._generate_one_turn):
        loop._model_version_value.value = next(versions)
        return await inner(prompt_ids)

    loop._generate_one_turn = turn
    return asyncio.run(loop.play(prompts))


def trainer_of(worker, transfer=None, *, lora_dir="", **args):
    """What is read and replaced of a trainer that has not begun."""
    settings = {"temperature": 1.0, "max_staleness": 2, "top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0}
    lora = {"_lora_sync": bool(lora_dir), "_lora_dir": lora_dir, "_lora_name": "trl-policy"}
    return SimpleNamespace(args=SimpleNamespace(**settings | args), rollout_worker=worker, weight_transfer=transfer, **lora)


@pytest.fixture
def exact(several):
    """An adapter whose trainer has sent the versions 1, 2 and 3, with its worker and transfer."""
    inner = Worker()
    trainer = trainer_of(inner, Transfer(inner))
    made = make_exact(trainer, several.blank(), band=BAND)
    worker, transfer = trainer.rollout_worker, trainer.weight_transfer
    assert trainer.rollout_queue is worker.rollout_buffer
    assert inner._loop_cls is VersionedRolloutLoop
    for version in (1, 2, 3):
        transfer.pause()
        transfer.send_weights(iter(several.weights(version).items()))
        transfer.resume()
        worker.update_model_version(version)
    return made, inner, worker, transfer


def test_versions_travel_with_each_turn_and_through_the_reconciliation_of_turns(samples):
    tags = [sample.versions[sample.completion_mask.astype(bool)] for sample in samples]
    assert tags[0].tolist() == [1] * 13
    assert tags[1].tolist() == [2] * 8 + [3] * 9
    assert all((sample.versions[~sample.completion_mask.astype(bool)] == -1).all() for sample in samples)
    assert [sample.model_version for sample in samples] == [1, 1]


def test_a_turn_across_an_update_is_not_trained_and_counted_but_with_adapters_it_has_one_version(several):
    crossed, clean = answer(several, [3, 9], 5, 1, 0, then=2), answer(several, [3, 9], 4, 2, 1)
    for lora_name, kept, asked in ((None, 1, "base"), ("policy", 2, "policy-v1")):
        loop = RecordedLoop([crossed, clean], 1, lora_name=lora_name)
        found = asyncio.run(loop.play([([3, 9], 1), ([3, 9], 1)]))
        assert len(found) == kept
        assert loop._metrics_queue.get_nowait()["exact/crossed_update_tokens_total"] == (0 if lora_name else 5)
        assert loop.asked[0] == asked
        assert found[-1].versions[-4:].tolist() == [2] * 4
    assert found[0].versions[-5:].tolist() == [1] * 5


def test_an_engine_that_returns_fewer_log_probs_than_tokens_is_an_error(several):
    ids, logps, version = answer(several, [3, 9], 5, 1, 0)
    for short in (logps[:-1], [*logps[:-1], None]):
        with pytest.raises(TrajectoryError, match="5 and 4"):
            asyncio.run(RecordedLoop([(ids, short, version)], 1)._generate_one_turn([3, 9]))


def test_what_is_sent_is_a_version_which_turns_name_before_the_engine_goes_on(exact, several):
    made, inner, _, transfer = exact
    assert made.held.versions == (1, 2, 3)
    first = next(iter(several.weights(1)))
    assert transfer._inner.seen == ["pause", first, ("resume", 1), "pause", first, ("resume", 2), "pause", first, ("resume", 3)]
    assert inner.version == 3


def test_old_log_probs_are_the_direct_forward_at_each_tokens_version(exact, samples, several):
    scored, told = exact[0].scored(samples)
    for before, after in zip(samples, scored, strict=True):
        mask = before.completion_mask.astype(bool)
        old = several.old(before.input_ids, before.versions)
        np.testing.assert_allclose(after.old_log_probs[mask], old[mask], atol=1e-5)
        in_band = np.abs(old - before.old_log_probs) <= np.log(BAND)
        assert (after.completion_mask.astype(bool) == (mask & in_band)).all()
    assert told["exact/in_band"] == (sum(s.completion_mask.sum() for s in scored), 30)


def test_trls_asynchronous_loss_is_the_objective_with_exact_old_logits(exact, samples, several, objective):
    _, inner, worker, _ = exact
    for sample in samples:
        inner.rollout_buffer.put(sample)
    metrics = defaultdict(list)
    dataset = RolloutQueueDataset(worker.rollout_buffer, lambda: 3, worker.check_health, 1.0, metrics, max_staleness=2)
    rows = next(iter(FixedCountBatcher(dataset, num_processes=1, microbatch_size=2)))
    inputs = DataCollatorForRollout(pad_token_id=0)([rows])
    theta = several.models[0]
    trainer = SimpleNamespace(
        epsilon_low=EPS_LOW, epsilon_high=EPS_HIGH, accelerator=Accelerator(cpu=True), current_gradient_accumulation_steps=1,
        aux_loss_enabled=False, _metrics={"train": metrics}, _step_forward_tokens=0, _step_trained_tokens=0,
        _step_seq_len_weighted=0, _step_samples=0, _step_forward_s=0,
    )  # fmt: skip
    loss = AsyncGRPOTrainer.compute_loss(trainer, OverTree(theta), inputs)
    assert metrics["clip_ratio/region_mean"][-1] > 0
    columns = [[], [], [], [], []]
    for sample in samples:
        old = torch.from_numpy(several.old(sample.input_ids, sample.versions)).float()
        now = torch.from_numpy(several.direct(0, sample.input_ids)).float()
        advantages, mask = torch.full_like(old, sample.advantage), torch.from_numpy(sample.completion_mask)
        for column, value in zip(columns, (torch.from_numpy(sample.old_log_probs), old, now, advantages, mask), strict=True):
            column.append(value)
    flat = [torch.cat(column) for column in columns]
    wanted = objective(*flat, discrepancy="mask", denominator="token-mean-kept", dual_clip=None)
    assert loss.item() == pytest.approx(wanted.item(), abs=1e-6)


def test_versions_that_are_gone_samples_without_versions_and_lengths_that_differ_are_errors(exact, samples):
    made = exact[0]
    made.held.retain(2)
    with pytest.raises(VersionEvictedError, match="version 1"):
        made.scored(samples)
    plain = RolloutSample([], [], *[np.ones(3, np.int64)] * 2, np.zeros(3, np.float32), 1.0, 3, 0, {})
    with pytest.raises(MissingLogprobError, match="make_exact"):
        made.scored([plain])
    samples[1].old_log_probs = samples[1].old_log_probs[:-1]
    with pytest.raises(TrajectoryError, match="different lengths"):
        made.scored(samples[1:])


def test_a_sample_that_the_trainer_will_drop_for_its_age_passes_as_it_is(exact, samples):
    made = exact[0]
    made.version = 4
    made.held.retain(2)
    done, told = made.scored(samples)
    assert done == samples
    assert told == {"exact/samples_out_of_band_total": 0.0}


@pytest.mark.parametrize("args", [{"top_p": 0.9}, {"top_k": 20}, {"min_p": 0.1}, {"repetition_penalty": 1.1}])
def test_sampling_from_a_part_of_the_vocabulary_and_other_loops_are_refused(several, args):
    with pytest.raises(ConfigError, match=next(iter(args))):
        make_exact(trainer_of(Worker(), **args), several.blank())
    worker = Worker()
    worker._loop_cls = RecordedLoop
    with pytest.raises(ConfigError, match="RecordedLoop"):
        make_exact(trainer_of(worker), several.blank())
    assert make_exact(trainer_of(None), several.blank()) is None  # a rank without a worker


def test_a_rollout_worker_of_another_kind_is_refused_with_what_it_can_do_instead(several):
    class Own:
        """TRL's RolloutWorkerProtocol, and no more."""

        rollout_buffer, metrics_queue = queue.Queue(), queue.Queue()

    with pytest.raises(ConfigError, match="Own") as refused:
        make_exact(trainer_of(Own()), several.blank())
    assert "ExactOld" in str(refused.value)


def test_trls_checkpoints_keep_the_place_in_the_dataset(tmp_path, several):
    class TrlsOwn(Worker, AsyncRolloutWorker):
        """TRL's worker, as its trainer asks for it by type."""

    inner = TrlsOwn()
    inner._loop_kwargs["dataset_start_index"] = 10
    trainer = trainer_of(inner, Transfer(inner))
    make_exact(trainer, several.blank())
    trainer.accelerator, trainer.state = Accelerator(cpu=True), SimpleNamespace(global_step=3)
    trainer._trained_groups, trainer.model_version, trainer._get_output_dir = {0, 1, 3}, 2, lambda trial: tmp_path
    with pytest.raises(TypeError, match="super"):  # what comes after TRL's own part needs a whole trainer
        AsyncGRPOTrainer._save_checkpoint(trainer, None, None)
    kept = json.loads((tmp_path / "checkpoint-3" / "rollout_state.json").read_text())
    assert kept == {"prompt_index": 12, "model_version": 2}


def test_a_version_that_nobody_sent_is_an_error(exact):
    with pytest.raises(ExactnessError, match="version 5"):
        exact[2].update_model_version(5)


def test_the_queue_gives_what_the_worker_gives_and_ends_as_it_does(exact, samples):
    _, inner, worker, _ = exact
    with pytest.raises(queue.Empty):
        worker.rollout_buffer.get(timeout=0.01)
    for sample in samples:
        inner.rollout_buffer.put(sample)
    assert worker.rollout_buffer.qsize() == 2
    assert worker.rollout_buffer.get().versions is samples[0].versions
    assert worker.rollout_buffer.qsize() == 1
    assert worker.rollout_buffer.get().versions is samples[1].versions
    assert worker.metrics_queue.get_nowait()["exact/in_band"][1] == 30


def test_the_adapters_that_trl_keeps_for_its_server_are_versions(tmp_path, several):
    import copy

    from peft import LoraConfig, get_peft_model
    from trl.experimental.async_grpo.async_grpo_trainer import save_lora_adapter

    sizes = LoraConfig(r=2, target_modules=["q_proj"])
    model = get_peft_model(copy.deepcopy(several.models[0]), sizes)
    (tmp_path / ".vllm_lora").mkdir()
    for version in (1, 2):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.normal_(0, 0.2, generator=torch.Generator().manual_seed(version))
        save_lora_adapter(model, Accelerator(cpu=True), "default", str(tmp_path / ".vllm_lora" / f"trl-policy-v{version}"))
    ids = np.arange(4, 16)
    with torch.no_grad():
        logps = model.eval()(torch.from_numpy(ids)[None]).logits[0, :-1].log_softmax(-1)
    scoring = get_peft_model(copy.deepcopy(several.models[0]), sizes).get_base_model()
    trainer = trainer_of(Worker(), lora_dir=str(tmp_path / ".vllm_lora"))
    exact = make_exact(trainer, scoring)
    exact.moved_to(2)
    answers = [(ids[4:].tolist(), logps.gather(1, torch.from_numpy(ids)[1:, None])[3:, 0].tolist(), 2)]
    found = asyncio.run(RecordedLoop(answers, 2, lora_name="trl-policy").play([(ids[:4].tolist(), 1)]))
    done, told = exact.scored(found)
    np.testing.assert_allclose(done[0].old_log_probs[4:], found[0].old_log_probs[4:], atol=1e-5)
    assert told["exact/in_band"] == (8.0, 8.0)


class Recorded:
    """Stands where TRL samples: gives the batch that was recorded."""

    def _generate_and_score_completions(self, inputs):
        return dict(self.recorded)


class Trainer(SplitRatios, Recorded, GRPOTrainer):
    band = BAND


@pytest.fixture
def grpo(tmp_path, tiny_folder, several, noise):
    """TRL's synchronous trainer, past some steps over a batch that was sampled at version 1."""
    settings = {"epsilon": EPS_LOW, "epsilon_high": EPS_HIGH, "delta": DUAL_CLIP, "loss_type": "bnpo", "num_generations": 2}
    args = GRPOConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], per_device_train_batch_size=2, **settings
    )
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    rows = Dataset.from_dict({"prompt": ["w1", "w2"]})
    trainer = Trainer(
        several.models[3], lambda completions, **k: [0.0] * len(completions), args, rows, processing_class=tokenizer
    )
    trainer.use_vllm = trainer.vllm_importance_sampling_correction = True  # nothing is sampled here
    trainer.current_gradient_accumulation_steps = 1
    draw = torch.Generator().manual_seed(0)
    prompts, answers = torch.randint(3, 20, (4, 5), generator=draw), torch.randint(3, 20, (4, 12), generator=draw)
    mask = (torch.arange(12) < torch.tensor([12, 9, 12, 7])[:, None]).long()
    whole = torch.cat([prompts, answers], 1)
    old, _, _ = _scored_by_trl(trainer, several.models[1], whole, mask)
    trainer.recorded = {
        "prompt_ids": prompts, "prompt_mask": torch.ones_like(prompts), "completion_ids": answers, "completion_mask": mask,
        "advantages": torch.tensor([1.0, -1.0, 0.7, -0.7]), "old_per_token_logps": old, "num_items_in_batch": mask.sum(),
        "sampling_per_token_logps": old + noise(old.shape, 4), "tool_mask": (torch.arange(12) != 3).long().expand(4, 12),
    }  # fmt: skip
    return trainer


@torch.no_grad()
def _scored_by_trl(trainer, model, whole, mask):
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    attention = torch.cat([torch.ones(len(mask), whole.shape[1] - mask.shape[1], dtype=torch.int64), mask], 1)
    return trainer._get_per_token_logps_and_entropies(model, whole, attention, mask.shape[1])


def test_grpos_loss_with_the_ratio_of_the_engines_apart_is_the_objective(grpo, several, objective):
    batch = grpo._generate_and_score_completions(None)
    loss = grpo.compute_loss(grpo.model, batch)
    mask = batch["completion_mask"] * batch["tool_mask"]
    whole = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    theta = torch.stack([torch.from_numpy(several.direct(3, ids))[-12:].float() for ids in whole])
    advantages = batch["advantages"][:, None].expand(4, 12)
    wanted = objective(batch["sampling_per_token_logps"], batch["old_per_token_logps"], theta, advantages, mask)
    assert loss.item() == pytest.approx(wanted.item(), abs=1e-6)
    assert 0 < grpo._metrics["eval"]["exact/in_band"][-1] < 1
    for ids, row, kept in zip(whole, batch["old_per_token_logps"], mask.bool(), strict=True):
        np.testing.assert_allclose(row[kept].numpy(), several.direct(1, ids)[-12:][kept.numpy()], atol=1e-5)


def test_a_token_without_an_engines_log_prob_weighs_nothing_and_is_counted(grpo):
    batch = dict(grpo.recorded)
    batch["sampling_per_token_logps"] = batch["sampling_per_token_logps"].clone()
    batch["sampling_per_token_logps"][0, 1] = torch.nan
    weights, told = discrepancy_weights(batch, BAND)
    assert weights[0, 1] == 0
    assert told["exact/tokens_without_logprob"] == 1


def test_grpo_without_one_of_the_log_probs_or_with_other_shapes_is_refused(grpo):
    batch = dict(grpo.recorded)
    with pytest.raises(TrajectoryError, match="different lengths"):
        discrepancy_weights(batch | {"sampling_per_token_logps": batch["sampling_per_token_logps"][:, :-1]}, BAND)
    del batch["old_per_token_logps"]
    with pytest.raises(MissingLogprobError, match="use_vllm=True"):
        discrepancy_weights(batch, BAND)


def test_the_change_in_a_users_script_is_at_most_ten_lines():
    lines = (Path(__file__).parents[2] / "examples" / "trl" / "async_grpo.py").read_text(encoding="utf-8").splitlines()
    changed = [line for line in lines if line.endswith("# exact")]
    assert 0 < len(changed) <= 10
    compile("\n".join(lines), "async_grpo.py", "exec")
    rest = [line for line in lines[4:] if line not in changed]
    assert not any("oldlogits" in line or "exact" in line for line in rest)
    compile("\n".join(rest), "async_grpo.py", "exec")


class WritingTrainer(TokenTables, Trainer):
    """Writes the tokens of each loss."""


def test_the_table_of_grpos_trainer_holds_what_its_loss_was_of(grpo, several, tmp_path):
    grpo.__class__, grpo.token_folder = WritingTrainer, tmp_path / "tokens"
    batch = grpo._generate_and_score_completions(None)
    grpo.compute_loss(grpo.model, batch)
    (path,) = grpo.token_folder.glob("*.parquet")
    table = read_token_table(path)
    mask = (batch["completion_mask"] * batch["tool_mask"]).bool()
    assert table.token_id[table.mask].tolist() == batch["completion_ids"][mask].tolist()
    names = {"logp_mu": "sampling_per_token_logps", "logp_old": "old_per_token_logps"}
    for name, key in names.items():
        np.testing.assert_allclose(table.columns()[name][table.mask], batch[key][mask].numpy(), atol=1e-6)
    whole = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    theta = np.stack([several.direct(3, ids)[-12:] for ids in whole])[mask.numpy()]
    np.testing.assert_allclose(table.columns()["logp_theta"][table.mask], theta, atol=1e-5)
    assert set(table.version[table.mask].tolist()) == set(table.trainer_version.tolist()) == {0}
