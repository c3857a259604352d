"""TRL: the tokens of every micro-batch as a neutral token table, which `oldlogits doctor` and `oldlogits replay` read.

Both go before TRL's trainer among the bases of a class; ``token_folder`` is where they write, one file a call of the loss.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from oldlogits.batch.sequence_table import SequenceTable
from oldlogits.batch.token_table import write_token_table

_VERSION = "version"


class AsyncTokenTables:
    """For `AsyncGRPOTrainer`: versions are those of the samples, of each token with `make_exact`; theta is the loss's own.

    Only the main process takes samples from the rollouts, so that only its rows are written.

    Attributes:
        token_folder: Where the tables go.
    """

    token_folder: Path
    accelerator: Any
    model_version: int
    rollout_queue: Any
    _num_tables = 0

    def get_train_dataloader(self) -> Any:
        """Note the samples that the data loader takes."""
        if self.accelerator.is_main_process:
            self.rollout_queue = _NotingQueue(self.rollout_queue)
        return super().get_train_dataloader()  # type: ignore[misc]

    def compute_loss(self, model: Any, inputs: dict[str, Any], *given: Any, **named: Any) -> Any:
        """Compute TRL's loss, and write what it was of."""
        seen: list[Any] = []

        def watched(**asked: Any) -> Any:
            seen.append(model(**asked))
            return seen[-1]

        loss = super().compute_loss(watched, inputs, *given, **named)  # type: ignore[misc]
        if isinstance(self.rollout_queue, _NotingQueue):
            chosen = inputs["token_index"] >= 0
            theta = seen[0].log_probs.detach().flatten()[inputs["token_index"][chosen]]
            self._write(inputs, chosen, theta)
        return loss

    def _write(self, inputs: dict[str, Any], chosen: Tensor, theta: Tensor) -> None:
        path = _next_path(self, self.model_version)
        found, weight = SequenceTable(path=path), 1 / float(inputs["global_n_tokens"][0])
        of, old = (inputs[name][chosen].cpu() for name in ("segment_id", "old_log_probs"))
        for number in range(int(of.max()) + 1):
            values = theta[of == number].cpu().float().numpy()
            sample = self.rollout_queue.trained(old[of == number].numpy())
            mask = sample.completion_mask.astype(bool)
            mask[0] = False  # nothing predicts it
            mu = getattr(sample, "logp_mu", None)
            versions = getattr(sample, "versions", np.full(len(mask), sample.model_version))
            columns = {
                "token_id": sample.input_ids, "index": np.arange(len(mask)), "mask": mask,
                "version": np.where(mask, versions, -1), "trainer_version": np.full(len(mask), self.model_version),
                "logp_mu": sample.old_log_probs if mu is None else mu, "logp_old": sample.old_log_probs,
                "logp_theta": _spread(values, mask), "advantage": np.full(len(mask), sample.advantage, np.float32),
                "loss_weight": np.full(len(mask), weight, np.float32),
            }  # fmt: skip
            missing = dict.fromkeys(("logp_mu", "logp_old", "logp_theta", "advantage", "loss_weight"), ~mask)
            found.add(f"{path.stem}/{number}", columns, missing=missing, group=str(sample.group_id))
        self.rollout_queue.forget(self.model_version - self.args.max_staleness)  # type: ignore[attr-defined]
        write_token_table(path, found.table())


class TokenTables:
    """For `GRPOTrainer`: versions are the optimizer steps after which its batches were sampled.

    Attributes:
        token_folder: Where the tables go.
    """

    token_folder: Path
    state: Any
    _theta: Tensor
    _num_tables = 0

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        batch: dict[str, Any] = super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        return batch | {_VERSION: torch.full((len(batch["completion_ids"]),), self.state.global_step)}

    def _get_per_token_logps_and_entropies(self, *given: Any, **named: Any) -> Any:
        found = super()._get_per_token_logps_and_entropies(*given, **named)  # type: ignore[misc]
        self._theta = found[0].detach()
        return found

    def compute_loss(self, model: Any, inputs: dict[str, Any], *given: Any, **named: Any) -> Any:
        """Compute TRL's loss, and write what it was of."""
        loss = super().compute_loss(model, inputs, *given, **named)  # type: ignore[misc]
        path, batch = _next_path(self, self.state.global_step), {k: v.cpu() for k, v in inputs.items() if torch.is_tensor(v)}
        found = SequenceTable(path=path)
        ids, real = (torch.cat([batch[f"prompt_{name}"], batch[f"completion_{name}"]], 1) for name in ("ids", "mask"))
        num_prompt = batch["prompt_ids"].shape[1]
        trained = batch["completion_mask"] * batch.get("tool_mask", 1)
        theta = self._theta.cpu()
        old = batch.get("old_per_token_logps", theta)
        logps = {"logp_mu": batch.get("sampling_per_token_logps", old), "logp_old": old, "logp_theta": theta}
        for row in range(len(ids)):
            kept = real[row].bool().numpy()
            mask = np.concatenate([np.zeros(num_prompt, bool), trained[row].bool().numpy()])[kept]
            whole = {name: np.concatenate([np.zeros(num_prompt), v[row].float().numpy()])[kept] for name, v in logps.items()}
            columns = {
                "token_id": ids[row].numpy()[kept], "index": np.arange(kept.sum()), "mask": mask,
                "advantage": np.full(kept.sum(), float(batch["advantages"][row]), np.float32),
                **{name: np.where(mask, v, np.nan).astype(np.float32) for name, v in whole.items()},
            }  # fmt: skip
            missing = dict.fromkeys(logps, ~mask)
            columns["version"] = np.where(mask, int(batch[_VERSION][row]), -1)
            columns["trainer_version"] = np.full(kept.sum(), int(batch[_VERSION][row]))  # where its optimizer steps start
            found.add(f"{path.stem}/{row}", columns, missing=missing)
        write_token_table(path, found.table())
        return loss


class _NotingQueue:
    """A rollout buffer that keeps what was taken out of it until its tokens are trained."""

    def __init__(self, inner: Any) -> None:
        self._inner, self._taken = inner, defaultdict[bytes, list[Any]](list)

    def get(self, *given: Any, **named: Any) -> Any:
        sample = self._inner.get(*given, **named)
        trained = sample.completion_mask.astype(bool)
        self._taken[_key(sample.old_log_probs[1:][trained[1:]])].append(sample)
        return sample

    def trained(self, old_log_probs: Any) -> Any:
        """Let go of the sample whose trained tokens have these log-probs."""
        return self._taken[_key(old_log_probs)].pop()

    def qsize(self) -> int:
        return int(self._inner.qsize())

    def forget(self, oldest: int) -> None:
        """Let go of samples that the trainer has dropped for their age."""
        for key, samples in list(self._taken.items()):
            self._taken[key] = [sample for sample in samples if sample.model_version >= oldest]
            if not self._taken[key]:
                del self._taken[key]


def _key(old_log_probs: Any) -> bytes:
    """What a sample is known by among packed ones: the log-probs of its trained tokens."""
    return bytes(np.asarray(old_log_probs, np.float32).tobytes())


def _spread(values: Any, mask: Any) -> Any:
    """Values of trained tokens, in their places."""
    whole = np.full(len(mask), np.nan, np.float32)
    whole[mask] = values
    return whole


def _next_path(trainer: Any, version: int) -> Path:
    """The file of this call."""
    trainer._num_tables += 1
    trainer.token_folder.mkdir(parents=True, exist_ok=True)
    rank = int(trainer.accelerator.process_index)
    return Path(trainer.token_folder) / f"v{version:06d}_rank{rank}_{trainer._num_tables:06d}.parquet"
