"""Trajectories to one flat batch.

Index i of a flat array holds what is known of ``log p(token i | tokens < i)`` of its own trajectory; context has
log-prob 0, version -1 and `loss_mask` False.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from oldlogits.batch.routing import MISSING, RoutingChains, routing_chains
from oldlogits.batch.sequences import Bools, Floats, Ints, Sequences
from oldlogits.core.errors import TrajectoryError
from oldlogits.core.scoring import BatchTokens
from oldlogits.core.trajectory import Context, RoutingMode, Trajectory, TrajectoryGroup
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
        token_advantages: float32 [loss token]; they take the place of `advantages`; None: a sequence's tokens have the same.
        rewards: float32 [sequence].
        step: int64 [sequence]; the optimizer step, counted from 0, that trains it.
        trajectory_ids: One per sequence.
        chains: The experts that served the tokens when each loss token was sampled; None: they were not recorded.
        logp_reference: float32 [loss token], natural log; those of the reference; None: it has not scored, or there is none.
    """

    loss_mask: Bools
    version: Ints
    logp_mu: Floats
    mixed_kv: Bools
    advantages: Floats
    rewards: Floats
    step: Ints
    trajectory_ids: tuple[str, ...]
    chains: RoutingChains | None = None
    logp_reference: Floats | None = None
    token_advantages: Floats | None = None

    @property
    def versions(self) -> tuple[int, ...]:
        """The distinct versions of its loss tokens, ascending."""
        return tuple(int(v) for v in np.unique(self.version[self.loss_mask]))

    def lay_out(self, tokens: Ints) -> tuple[Sequences, Ints, Ints]:
        """Give the sequences that a forward pass reads to score loss tokens: each with the experts of its tokens, if known."""
        return (self, tokens, tokens) if self.chains is None else self.chains.lay_out(self, tokens)

    def entering(self, trainer_version: PolicyVersion, *, checked_every: int = 0) -> BatchTokens:
        """Say what a source is told of the batch when it enters training.

        Args:
            trainer_version: The version before the first optimizer step.
            checked_every: The training forward gives OLD of some tokens, and of every so many of their trajectories one is
                scored all the same; 0: all tokens are scored.
        """
        from_training = None
        if checked_every:
            from_training = self.old_is_theta(trainer_version)
            sequence = self.sequence[self.loss_mask]
            from_training &= ~np.isin(sequence, np.unique(sequence[from_training])[::checked_every])
        return BatchTokens(
            versions=self.version[self.loss_mask],
            trajectory_ids=self.trajectory_ids,
            trainer_version=trainer_version,
            has_mixed_kv=bool(self.mixed_kv.any()),
            from_training=from_training,
            logp_mu=self.logp_mu[self.loss_mask],
        )

    def old_is_theta(self, trainer_version: PolicyVersion) -> Bools:
        """Tell of each loss token whether THETA of its optimizer step is OLD: bool [loss token].

        It is where the token is of the version that enters training, over its keys and values, and the step is the first.
        """
        first = (self.step == 0)[self.sequence]
        found: Bools = ((self.version == trainer_version) & first & ~self.mixed_kv)[self.loss_mask]
        return found


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
        chains=routing_chains(trajectories),
    )


def followed(batch: TokenBatch, mode: RoutingMode) -> TokenBatch:
    """Check that a batch has the routing that a trainer follows, and leave out what it does not.

    Raises:
        TrajectoryError: It has none.
    """
    if mode == "off":
        return replace(batch, chains=None)
    if batch.chains is None:
        raise TrajectoryError(
            "the engine did not say which experts it chose",
            got=f"a batch of version {batch.versions[-1]} without routing, model.routing = '{mode}'",
            allowed="the experts of every token that it read",
            fix=MISSING,
        )
    return batch


def _columns(trajectory: Trajectory) -> tuple[Ints, Bools, Ints, Floats, Floats, Bools]:
    """Make the flat arrays of one trajectory, in the order in which `collate` takes them."""
    segments = trajectory.segments
    lengths = [len(s.token_ids) for s in segments]
    token_ids = np.concatenate([np.asarray(s.token_ids, np.int64) for s in segments])
    loss_mask = np.repeat(np.array([not isinstance(s, Context) for s in segments], np.bool_), lengths)
    version = np.repeat(np.array([-1 if isinstance(s, Context) else s.version for s in segments], np.int64), lengths)
    temperature = np.repeat(np.array([1.0 if isinstance(s, Context) else s.temperature for s in segments], np.float32), lengths)
    mixed_kv = np.repeat(np.array([not isinstance(s, Context) and s.kv == "mixed" for s in segments], np.bool_), lengths)
    logp_mu = np.zeros(len(token_ids), np.float32)
    logp_mu[loss_mask] = np.concatenate([np.asarray(s.logp_mu, np.float32) for s in trajectory.sampled])
    return token_ids, loss_mask, version, logp_mu, temperature, mixed_kv
