"""The advantages of a batch, and its reference: what leaving that costs an episode may be taken off its reward.

put_batch -> trainer.score_reference -> in the loss: train reads it
                                     -> in the reward: sum of log mu - log reference -> advantages -> put_advantages -> train
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from oldlogits.batch.collate import TokenBatch, collate
from oldlogits.config.objective.sections import ObjectiveConfig
from oldlogits.core.trajectory import TrajectoryGroup
from oldlogits.core.weights import PolicyVersion
from oldlogits.objective.advantages import advantages_of, turn_advantages_of
from oldlogits.train.calls import TrainerCalls


def batch_of(groups: Sequence[TrajectoryGroup], objective: ObjectiveConfig, *, num_steps: int) -> TokenBatch:
    """Collate groups with the advantages that the recipe gives them."""
    batch = collate(groups, advantages_of(groups, objective.advantage, objective.branch_weight), num_steps=num_steps)
    if objective.advantage != "turn-to-go":
        return batch
    return replace(batch, token_advantages=np.asarray(turn_advantages_of(groups), np.float32))


async def score_reference(
    trainer: TrainerCalls,
    groups: Sequence[TrajectoryGroup],
    batch: TokenBatch,
    objective: ObjectiveConfig,
    *,
    version: PolicyVersion,
) -> dict[str, float]:
    """Score the batch that the trainer was given at `version` under its reference, and give it the advantages that follow.

    Returns:
        Metrics; nothing where the recipe has no reference.
    """
    if not objective.has_reference:
        return {}
    values = await trainer.score_reference()
    found = {"kl/ref_age": float(version - objective.reference_at(version))}
    if objective.kl_in == "loss":
        return found
    penalties = penalties_of(batch, values, objective.kl_coefficient)
    advantages = advantages_of(groups, objective.advantage, objective.branch_weight, penalties.tolist())
    await trainer.put_advantages(np.asarray(advantages, np.float32))
    return found | {"reward/kl_penalty": float(penalties.sum()) / sum(len(group.episodes) for group in groups)}


def penalties_of(batch: TokenBatch, logp_reference: NDArray[np.float32], coefficient: float) -> NDArray[np.float64]:
    """Sum ``coefficient * (log mu - log reference)`` over each trajectory's sampled tokens: float64 [sequence].

    That is k1 under mu, which sampled the tokens: its mean is ``coefficient * KL(mu || reference)``, engine's noise included.
    A token without a finite log-ratio adds nothing.
    """
    log_ratio = batch.logp_mu[batch.loss_mask].astype(np.float64) - logp_reference
    log_ratio = np.where(np.isfinite(log_ratio), log_ratio, 0.0)
    sums = np.bincount(batch.sequence[batch.loss_mask], weights=log_ratio, minlength=batch.num_sequences)
    return coefficient * sums.astype(np.float64)
