"""TRL's `GRPOTrainer`: the ratio of its two engines apart from its clip, as a weight for each token, and a band around it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from oldlogits.core.errors import MissingLogprobError
from oldlogits.core.policies import MU, OLD, VARIANTS
from oldlogits.objective import band_mask, log_discrepancy
from oldlogits.sources.tagged import lengths_differ


class SplitRatios:
    """Goes before `GRPOTrainer` among the bases of a class: each token is weighed by its r_d inside the band, and 0 outside.

    TRL samples with the weights that it then scores `old_per_token_logps` with, so that this is OLD already. What it makes of
    it by default is one weight for a whole sequence, and 1 for tokens whose log-prob the engine did not return; both are
    replaced. Needs `use_vllm=True` and `vllm_importance_sampling_correction=True`.

    Attributes:
        band: ``r_d`` is trained within ``[1 / band, band]``.
    """

    band: float = 1.5
    _metrics: Any
    model: Any

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        batch: dict[str, Any] = super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        weights, told = discrepancy_weights(batch, self.band)
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, value in told.items():
            metrics[name].append(value)
        return batch | {"importance_sampling_ratio": weights}


def discrepancy_weights(batch: Mapping[str, Tensor], band: float) -> tuple[Tensor, dict[str, float]]:
    """Give ``r_d`` of each completion token of a GRPO batch: float32 [row, token], 0 outside of the band.

    Returns:
        The weights, and metrics: the share of tokens in the band, the mean of their ``log r_d``, tokens without a log-prob.

    Raises:
        MissingLogprobError: The batch lacks the log-probs of the trainer or of the engine.
        TrajectoryError: They have different shapes.
    """
    names = ("old_per_token_logps", "sampling_per_token_logps")
    missing = [name for name in names if name not in batch]
    if missing:
        raise MissingLogprobError(
            f"a batch of GRPOTrainer lacks {' and '.join(missing)}",
            got=", ".join(sorted(batch)),
            allowed=" and ".join(names),
            fix="set use_vllm=True and vllm_importance_sampling_correction=True; without vLLM the trainer's own model samples, "
            "so that there is no r_d and no need of SplitRatios",
        )
    mask = (batch["completion_mask"] * batch["tool_mask"] if "tool_mask" in batch else batch["completion_mask"]).bool()
    old, mu = batch[names[0]], batch[names[1]]
    if not old.shape == mu.shape == mask.shape:
        raise lengths_differ(
            "old_per_token_logps, sampling_per_token_logps and completion_mask", [*map(tuple, (old.shape, mu.shape))]
        )
    log_r_d = log_discrepancy(VARIANTS["decoupled_exact"], {OLD: old, MU: mu})
    known = log_r_d.isfinite()
    kept = mask & known & band_mask(log_r_d, band)
    num = max(1, int(mask.sum()))
    told = {
        "exact/in_band": int(kept.sum()) / num,
        "exact/log_r_d": float(log_r_d[kept].sum()) / max(1, int(kept.sum())),
        "exact/tokens_without_logprob": float((mask & ~known).sum()),
    }
    return torch.where(kept, torch.where(kept, log_r_d, 0.0).exp(), 0.0), told
