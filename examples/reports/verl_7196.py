"""verl 7196: with `rollout_correction.bypass_mode` the old log-probs are the rollout's, so that the ratio hides the mismatch.

verl's asynchronous trainer, TransferQueue and clients' fields are real; one object stands for its workers, and a tiny model
has sampled.

    python -m reports.verl_7196 FOLDER            # bypass_mode, the default of separate_async
    python -m reports.verl_7196 FOLDER --right    # separate_async_exact
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import ray
import torch
import transfer_queue as tq
from omegaconf import OmegaConf
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.trainer_separate_async import PPOTrainerSeparateAsync
from verl.utils.tensordict_utils import list_of_dict_to_tensordict

from oldlogits.integrations.verl import SPANS, ExactActorWorker, ExactOldTrainer
from oldlogits.integrations.verl_tokens import TokenTables
from reports.tiny_versions import NUM_VERSIONS, TinyVersions, doctor

ROLLOUTS, PIECE = 16, 30
ACTOR = {
    "loss_agg_mode": "token-mean", "loss_scale_factor": None, "ppo_mini_batch_size": 4, "calculate_entropy": False,
    "entropy_coeff": 0.0, "ppo_epochs": 1, "data_loader_seed": 0, "shuffle": False,
}  # fmt: skip


class AsIs(TokenTables, PPOTrainerSeparateAsync):
    """verl's asynchronous trainer, which writes its tokens."""


class Right(TokenTables, ExactOldTrainer):
    """The same with exact old logits."""


class Workers:
    """Stands for verl's worker group: versions are `ExactActorWorker`'s, the forward pass a plain one; nothing is trained."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.worker = ExactActorWorker.__new__(ExactActorWorker)
        self.worker.actor = SimpleNamespace(engine=SimpleNamespace(module=model))

    def __getattr__(self, name: str):
        return getattr(self.worker, name)

    @torch.no_grad()
    def compute_log_prob(self, batch: KVBatchMeta) -> KVBatchMeta:
        """Score with the weights as they are."""
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=["input_ids"])
        rows = []
        for ids in data["input_ids"].unbind():
            logps = self.worker.actor.engine.module(ids[None]).logits[0].log_softmax(-1)
            rows.append(logps.gather(1, ids.roll(-1)[:, None])[:, 0])
        nested = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
        fields = TensorDict({"log_probs": nested, "entropy": nested * 0}, batch_size=len(rows))
        return tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=fields)

    def update_actor(self, batch: KVBatchMeta) -> dict[str, dict[str, float]]:
        """Train nothing."""
        return {"metrics": {"mfu": 0.0}}


def rollouts(tiny: TinyVersions) -> list[dict[str, object]]:
    """Rollouts of two pieces, as verl's agent loops put them into the queue: it resumes them after an update of the weights."""
    found = []
    for first in range(NUM_VERSIONS):
        second, prompts = min(first + 1, NUM_VERSIONS - 1), [tiny.prompt(first)] * ROLLOUTS
        begun = tiny.sample(first, prompts, PIECE)
        ended = tiny.sample(second, [[*prompts[0], *ids] for ids, _ in begun], PIECE)
        for i, ((a, mu), (b, more)) in enumerate(zip(begun, ended, strict=True)):
            before, middle = len(prompts[0]), len(prompts[0]) + PIECE
            response = {"responses": torch.tensor(a + b), "response_mask": torch.ones(2 * PIECE, dtype=torch.int64)}
            response |= {"rollout_log_probs": torch.tensor(mu + more), "advantages": torch.full((2 * PIECE,), (i % 4) - 1.5)}
            spans = [(before, middle, first), (middle, middle + PIECE, second)]
            extra = {"min_global_steps": first, "max_global_steps": second, SPANS: spans}
            ids = torch.tensor([*prompts[0], *a, *b])
            found.append({"input_ids": ids, "prompts": ids[:before], **response, "extra_fields": extra})
    return found


def train(folder: Path, *, right: bool) -> Path:
    """Let an update begin with version 3, and give the table of what it trains; the TransferQueue runs."""
    tiny, newest = TinyVersions(), NUM_VERSIONS - 1
    trainer = Right.__new__(Right) if right else AsIs.__new__(AsIs)
    rollout = {"temperature": 1.0, "calculate_log_probs": True, "n": 4}
    correction = {"rollout_correction": {"bypass_mode": not right}}
    trainer.config = OmegaConf.create({"algorithm": correction, "actor_rollout_ref": {"rollout": rollout, "actor": ACTOR}})
    trainer.token_folder, trainer.actor_rollout_wg = folder, Workers(tiny.blank())
    for version in range(NUM_VERSIONS):
        trainer.actor_rollout_wg.worker.actor.engine.module.load_state_dict(tiny.models[version].state_dict())
        trainer.global_steps = version
        if right:
            trainer._publish()
    fields, partition = rollouts(tiny), f"report-{right}"
    keys = [f"{partition}_{i}" for i in range(len(fields))]
    batch = tq.kv_batch_put(
        keys=keys, partition_id=partition, fields=list_of_dict_to_tensordict(fields), tags=[{"seq_len": 1} for _ in keys]
    )
    batch = trainer._compute_old_log_prob(batch, {})
    trainer._update_actor(batch, {})
    return next(folder.glob(f"v{newest:06d}_*.parquet"))


if __name__ == "__main__":
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    tq.init()
    sys.exit(doctor(train(Path(sys.argv[1]), right="--right" in sys.argv), "--framework", "verl"))
