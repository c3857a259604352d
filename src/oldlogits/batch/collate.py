"""Trajectories to one flat batch.

Index i of a flat array holds what is known of ``log p(token i | tokens < i)`` of its own trajectory; context has
log-prob 0, version -1 and `loss_mask` False.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from oldlogits.batch.sequences import Bools, Floats, Ints, Sequences
from oldlogits.core.errors import TrajectoryError
from oldlogits.core.scoring import BatchTokens
from oldlogits.core.trajectory import Context, Trajectory, TrajectoryGroup
from oldlogits.core.weights import PolicyVersion


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBatch(Sequences):
    """Trajectories as flat arrays, with what is known of each token; context has temperature 1.

    Args:
        loss_mask: bool [token]; True where the token was sampled.
        version: int64 [token]; the version that sampled it, -1 for context.
        logp_mu: float32 [token], natural log; 0 for context.
        mixed_kv: bool [token]; sampled over keys and values of older versions.
        advantages: float32 [sequence].
        rewards: float32 [sequence].
        step: int64 [sequence]; the optimizer step, counted from 0, that trains it.
        trajectory_ids: One per sequence.
    """

    loss_mask: Bools
    version: Ints
    logp_mu: Floats
    mixed_kv: Bools
    advantages: Floats
    rewards: Floats
    step: Ints
    trajectory_ids: tuple[str, ...]

    @property
    def versions(self) -> tuple[int, ...]:
        """The distinct versions of its loss tokens, ascending."""
        return tuple(int(v) for v in np.unique(self.version[self.loss_mask]))

    def entering(self, trainer_version: PolicyVersion) -> BatchTokens:
        """Say what a source is told of the batch when it enters training."""
        return BatchTokens(
            versions=self.version[self.loss_mask],
            trajectory_ids=self.trajectory_ids,
            trainer_version=trainer_version,
            has_mixed_kv=bool(self.mixed_kv.any()),
        )


def collate(groups: Sequence[TrajectoryGroup], advantages: Sequence[float], *, num_steps: int) -> TokenBatch:
    """Flatten groups, in order; group g is trained in optimizer step ``g % num_steps``.

    Args:
        groups: At least one group.
        advantages: One per trajectory, in the order of the groups and their members.
        num_steps: The number of optimizer steps that share the batch.

    Raises:
        TrajectoryError: There is no trajectory, or not one advantage for each.
    """
    trajectories = [t for group in groups for t in group.trajectories]
    if not trajectories or len(advantages) != len(trajectories):
        raise TrajectoryError(
            "a batch needs one advantage per trajectory",
            got=f"{len(trajectories)} trajectories, {len(advantages)} advantages",
            allowed="at least one trajectory, as many advantages",
            fix="compute the advantages of these groups",
        )
    columns = [_columns(t) for t in trajectories]
    token_ids, loss_mask, version, logp_mu, temperature, mixed_kv = (np.concatenate(c) for c in zip(*columns, strict=True))
    return TokenBatch(
        token_ids=token_ids,
        loss_mask=loss_mask,
        version=version,
        logp_mu=logp_mu,
        temperature=temperature,
        mixed_kv=mixed_kv,
        starts=np.concatenate([[0], np.cumsum([t.num_tokens for t in trajectories])]).astype(np.int64),
        advantages=np.asarray(advantages, np.float32),
        rewards=np.asarray([t.reward for t in trajectories], np.float32),
        step=np.concatenate([np.full(len(g.trajectories), i % num_steps, np.int64) for i, g in enumerate(groups)]),
        trajectory_ids=tuple(t.id for t in trajectories),
    )


def _columns(trajectory: Trajectory) -> tuple[Ints, Bools, Ints, Floats, Floats, Bools]:
    """Make the flat arrays of one trajectory, in the order in which `collate` takes them."""
    segments = trajectory.segments
    lengths = [len(s.token_ids) for s in segments]
    token_ids = np.fromiter((i for s in segments for i in s.token_ids), np.int64, sum(lengths))
    loss_mask = np.repeat(np.array([not isinstance(s, Context) for s in segments], np.bool_), lengths)
    version = np.repeat(np.array([-1 if isinstance(s, Context) else s.version for s in segments], np.int64), lengths)
    temperature = np.repeat(np.array([1.0 if isinstance(s, Context) else s.temperature for s in segments], np.float32), lengths)
    mixed_kv = np.repeat(np.array([not isinstance(s, Context) and s.kv == "mixed" for s in segments], np.bool_), lengths)
    logp_mu = np.zeros(len(token_ids), np.float32)
    logp_mu[loss_mask] = [p for s in trajectory.sampled for p in s.logp_mu]
    return token_ids, loss_mask, version, logp_mu, temperature, mixed_kv
