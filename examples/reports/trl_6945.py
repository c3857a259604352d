"""huggingface/trl 6945: `AsyncGRPOTrainer` clips theta / mu, staleness and numerics in one ratio, for its old weights are gone.

TRL's rollout loop, scoring of groups, queue, packing and loss run as they are; a tiny model answers instead of a server, and
reads packed rows without the attention kernel, which needs a GPU.

    python -m reports.trl_6945 FOLDER            # as TRL has it
    python -m reports.trl_6945 FOLDER --right    # with `make_exact`
"""

from __future__ import annotations

import asyncio
import multiprocessing
import queue
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate import Accelerator, PartialState
from trl.experimental.async_grpo.async_grpo_trainer import AsyncGRPOTrainer
from trl.experimental.async_grpo.async_rollout_worker import RolloutGroup, TurnRecord, _AsyncRolloutLoop, _chain_to_sequences

from oldlogits.integrations.trl import ExactOld, VersionedRolloutLoop
from oldlogits.integrations.trl_tokens import AsyncTokenTables
from reports.tiny_versions import NUM_VERSIONS, TinyVersions, doctor

GROUPS, IN_GROUP, TURNS, TOKENS = 12, 4, 2, 30


class Offline:
    """Goes before TRL's rollout loop: what that has in a process of its own, without a server."""

    def __init__(self, version: int = 0, *, lora_name: str | None = None) -> None:
        self.lora_name, self.model_name = lora_name, "base"
        self._model_version_value = multiprocessing.get_context("spawn").Value("i", version)
        self._metrics_queue, self._counters, self._rates = queue.Queue(), defaultdict(float), defaultdict(lambda: [0.0, 0.0])
        self.max_tokens, self.request_timeout, self.temperature, self.top_p, self.repetition_penalty = TOKENS, 8, 1.0, 1.0, 1.0
        self.top_k, self.min_p = 0, None
        self.reward_funcs = [lambda completions, **_: [float(i % 3) for i in range(len(completions))]]
        self.reward_func_names, self._env_reward_types = ["reward"], []

    async def scored(self, conversations, *, version: int, group_id: int = 0):
        """Let TRL score the turns of some conversations as a group."""
        rows, num = [_chain_to_sequences(turns, "rollout", fork_threshold=4)[0] for turns in conversations], len(conversations)
        empty = {name: [[]] * num for name in ("prompts", "completions", "completions_ids")}
        counts = {name: [0] * num for name in ("tool_call_counts", "tool_failure_counts")}
        absent = {name: [None] * num for name in ("env_rewards", "rollout_rewards")}
        group = {"completions_sequences": rows, "reward_kwargs": {}, "model_version": version, "group_id": group_id}
        return await self._score_group(RolloutGroup(**empty, **counts, **absent, **group))


class Answers(Offline):
    """The tiny model answers in place of vLLM's server."""

    def __init__(self, tiny: TinyVersions) -> None:
        super().__init__()
        self.tiny = tiny

    async def _post(self, path, payload, timeout, max_retries=3):
        ids, logps = self.ready.pop(0)
        return {"choices": [{"token_ids": ids, "logprobs": {"token_logprobs": logps}}]}

    async def group(self, number: int):
        """Play a group of conversations, and let TRL score it; the weights change between groups."""
        version = self._model_version_value.value
        turns, contexts = [[] for _ in range(IN_GROUP)], [self.tiny.prompt(number)] * IN_GROUP
        for _ in range(TURNS):
            self.ready = self.tiny.sample(version, contexts, TOKENS)
            for i, context in enumerate(contexts):
                ids, logps = await self._generate_one_turn(context)
                turns[i].append(TurnRecord(context, ids, logps))
            contexts = [[*context, *made[-1].output_ids, 5, 6] for context, made in zip(contexts, turns, strict=True)]
        return await self.scored(turns, version=version, group_id=number)


class AsIs(Answers, _AsyncRolloutLoop):
    """TRL's loop."""


class Right(Answers, VersionedRolloutLoop):
    """The loop that `make_exact` puts in its place."""


class Trainer(AsyncTokenTables, AsyncGRPOTrainer):
    """TRL's trainer, which writes the tokens that its loss is of."""


class OverTree:
    """A model under the interface of TRL's packed rows: it reads the path of each segment by itself."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    def __call__(self, *, input_ids, shift_labels, tree_kv_index, tree_cu_seqlens_q, tree_cu_seqlens_k, **_):
        """Score every labelled position."""
        logps = torch.zeros(input_ids.shape[1])
        for i in range(len(tree_cu_seqlens_q) - 1):
            start, end = tree_cu_seqlens_q[i : i + 2].tolist()
            path = tree_kv_index[tree_cu_seqlens_k[i] : tree_cu_seqlens_k[i + 1]]
            rows = self.model(input_ids[:, path]).logits[0, start - end :].log_softmax(-1)
            labels = shift_labels[0, start:end].clamp(min=0)
            logps = logps.index_put((torch.arange(start, end),), rows.gather(1, labels[:, None])[:, 0])
        return SimpleNamespace(log_probs=logps, entropy=torch.zeros_like(logps))


def train(folder: Path, *, right: bool) -> Path:
    """Sample with versions 0 to 3, train with version 3, and give the table of what the loss was of."""
    PartialState(cpu=True)
    tiny = TinyVersions()
    loop, samples = (Right if right else AsIs)(tiny), []
    for number in range(GROUPS):
        loop._model_version_value.value = min(number // 2, NUM_VERSIONS - 1)
        samples += asyncio.run(loop.group(number))
    newest = NUM_VERSIONS - 1
    if right:
        exact = ExactOld(tiny.blank(), temperature=1.0, max_staleness=newest, band=1.5)
        for version in range(NUM_VERSIONS):
            exact.held.publish(version, tiny.weights(version))
        exact.version = newest
        samples, _ = exact.scored(samples)
    trainer = Trainer.__new__(Trainer)
    trainer.token_folder, trainer.model_version, trainer.accelerator = folder, newest, Accelerator(cpu=True)
    trainer.rollout_queue, trainer.rollout_worker = queue.Queue(), SimpleNamespace(check_health=lambda stale_after_s: None)
    trainer.args = SimpleNamespace(
        heartbeat_stale_after_s=1.0,
        max_staleness=newest,
        report_to=[],
        token_budget=0,
        per_device_train_batch_size=len(samples),
    )
    trainer.processing_class, trainer._trained_groups, trainer._metrics = tiny.tokenizer, set(), {"train": defaultdict(list)}
    trainer.epsilon_low, trainer.epsilon_high, trainer.aux_loss_enabled = 0.2, 0.28, False
    trainer.current_gradient_accumulation_steps = 1
    for name in ("forward_tokens", "trained_tokens", "seq_len_weighted", "samples", "forward_s"):
        setattr(trainer, f"_step_{name}", 0)
    for sample in samples:
        trainer.rollout_queue.put(sample)
    inputs = next(iter(trainer.get_train_dataloader().base_dataloader))  # another one would wait for samples
    trainer.compute_loss(OverTree(tiny.models[newest]), inputs).backward()
    return next(folder.glob("*.parquet"))


if __name__ == "__main__":
    sys.exit(doctor(train(Path(sys.argv[1]), right="--right" in sys.argv), "--framework", "TRL"))
