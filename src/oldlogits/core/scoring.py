"""Log-probs of sampled tokens under the training engine: requests, results, and who computes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from oldlogits.core.policies import Policy, Provenance
from oldlogits.core.weights import PolicyVersion, WeightUpdate


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """Log-probs of a batch's loss tokens under one policy, and how they were obtained.

    Args:
        policy: Whose log-probs these are.
        values: float32 [loss token], natural log, in batch order.
        computed_at: int64 [loss token]; the version whose weights computed each value.
        num_switches: How often the scoring weights were switched.
        provenance: Of every token, where the route fell back on another policy's values; None: the policy's own.
    """

    policy: Policy
    values: NDArray[np.float32]
    computed_at: NDArray[np.int64]
    num_switches: int
    provenance: Provenance | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchTokens:
    """The loss tokens of the batch that enters training, in batch order.

    Args:
        versions: int64 [loss token]; the version that sampled each.
        trajectory_ids: One per trajectory; its loss tokens stand side by side.
        trainer_version: The trainer's version, before its first optimizer step on this batch.
        has_mixed_kv: Whether some were sampled over keys and values of older versions.
    """

    versions: NDArray[np.int64]
    trajectory_ids: tuple[str, ...]
    trainer_version: PolicyVersion
    has_mixed_kv: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringSpan:
    """The tokens of one trajectory that one version sampled, and all that a forward pass needs to score them.

    Args:
        trajectory_id: Whose.
        token_ids: int64 [token]; the trajectory from its beginning to the last of these tokens.
        positions: int64 [scored token], ascending, >= 1; the last is that of the last token.
        temperature: float32 [scored token].
    """

    trajectory_id: str
    token_ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    temperature: NDArray[np.float32]

    @property
    def num_read(self) -> int:
        """Tokens that a forward pass reads to score it: all but the last, which is predicted only."""
        return int(self.positions[-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredSpans:
    """Log-probs of pieces.

    Args:
        values: float32 [scored token], natural log, piece after piece.
        seconds_s: The time that the scorer worked.
        switch_s: The part of it until the model pointed at the version's weights, checkout included.
        witness_s: The part of it that witnessed them; 0 where they were witnessed when the scorer received them.
    """

    values: NDArray[np.float32]
    seconds_s: float
    switch_s: float
    witness_s: float


class SpanScorer(Protocol):
    """Scores pieces of trajectories at versions that it holds, wherever it runs."""

    async def score_spans(self, pieces: Sequence[ScoringSpan], at: PolicyVersion) -> ScoredSpans:
        """Log-probs of the pieces' tokens.

        Args:
            pieces: At least one.
            at: A version that it holds.

        Raises:
            VersionEvictedError: The version is not held.
        """
        ...


class ScoringHandle(SpanScorer, Protocol):
    """What a source may ask of the trainer, wherever it runs."""

    @property
    def is_idle(self) -> bool:
        """Whether no call is being carried out."""
        ...

    async def score(self, tokens: NDArray[np.int64], at: PolicyVersion | None) -> NDArray[np.float32]:
        """Log-probs of loss tokens of the batch in training.

        Args:
            tokens: int64, ascending positions among the batch's loss tokens.
            at: A stored version, or None for the live weights.

        Returns:
            float32, one value per entry of `tokens`.

        Raises:
            VersionEvictedError: The version is no longer held.
        """
        ...

    async def score_mixed(self) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Log-probs of all loss tokens of the batch in training, over keys and values of the versions that the engine had.

        Returns:
            float32 and int64 [loss token]: the values, and the version that scored each, -1 where none did.

        Raises:
            VersionEvictedError: A version is no longer held.
            TrajectoryError: The batch does not say which versions computed them.
        """
        ...


class DedicatedScorer(SpanScorer, Protocol):
    """A second model that only scores, with a window of versions of its own."""

    @property
    def window(self) -> int:
        """Versions that it holds: the newest ones."""
        ...

    async def publish(self, version: PolicyVersion, update: WeightUpdate, probe_logps: NDArray[np.float32]) -> float:
        """Take over a version, and drop the oldest beyond the window.

        Args:
            version: Its number.
            update: Its weights, copied before this returns, or what leads to them from the version before.
            probe_logps: float32 [probe token]; what the trainer's live weights give the fixed probe tokens.

        Returns:
            The largest difference on these tokens, in nats.

        Raises:
            ExactnessError: The weights that arrived give the probe tokens other log-probs.
        """
        ...
