"""Log-probs of sampled tokens under the training engine: requests, results, and who computes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from oldlogits.core.policies import Policy, Provenance
from oldlogits.core.trajectory import Choices
from oldlogits.core.weights import PolicyVersion, WeightUpdate

Layout = Literal["shared", "packed", "padded"]
"""How sequences are laid out in a micro-batch: in one row without padding, what they begin with alike once or each for itself;
or a row for each, padded to the longest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """Log-probs of a batch's loss tokens under one policy, and how they were obtained.

    Args:
        values: float32 [loss token], natural log, in batch order.
        computed_at: int64 [loss token]; the version whose weights computed each value.
        num_switches: How often the scoring weights were switched.
        left_out: bool [loss token]; tokens without a value, whose OLD the training forward gives; None: there are none.
        provenance: The provenance of all tokens, where the source fell back on another policy's values; None: that of the
            policy (`PROXIMAL_PROVENANCE`).
    """

    policy: Policy
    values: NDArray[np.float32]
    computed_at: NDArray[np.int64]
    num_switches: int
    left_out: NDArray[np.bool_] | None = None
    provenance: Provenance | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchTokens:
    """The loss tokens of the batch that enters training, in batch order.

    Args:
        versions: int64 [loss token]; the version that sampled each.
        trajectory_ids: One id per trajectory; its loss tokens stand side by side.
        trainer_version: The trainer's version, before its first optimizer step on this batch.
        has_mixed_kv: Whether some were sampled over keys and values of older versions.
        from_training: bool [loss token]; tokens that no source of OLD has to score: they are of the version that enters
            training, and the forward pass of their optimizer step, the first one, gives their OLD. None: there are none.
        logp_mu: float32 [loss token]; what the engine gave each when it sampled it; None: not told.
    """

    versions: NDArray[np.int64]
    trajectory_ids: tuple[str, ...]
    trainer_version: PolicyVersion
    has_mixed_kv: bool = False
    from_training: NDArray[np.bool_] | None = None
    logp_mu: NDArray[np.float32] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringSpan:
    """The tokens of one trajectory that one version sampled, and all that a forward pass needs to score them.

    Args:
        token_ids: int64 [token]; the trajectory from its beginning to the last of these tokens.
        positions: int64 [scored token], ascending, >= 1; the last is that of the last token.
        temperature: float32 [scored token].
        routing: [token, layer, choice]; the experts that served each token when these were sampled; None: not recorded.
    """

    trajectory_id: str
    token_ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    temperature: NDArray[np.float32]
    routing: Choices | None = None

    @property
    def num_read(self) -> int:
        """Tokens that a forward pass reads to score it: all but the last, which is predicted only."""
        return int(self.positions[-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredSpans:
    """Log-probs of scoring spans.

    Args:
        values: float32 [scored token], natural log, span after span.
        seconds_s: The time that the scorer worked.
        switch_s: The part of that time until the model pointed at the version's weights, checkout included.
        check_s: The part that checked these weights; 0 where the scorer checked them when it received them.
        num_read: Tokens that the forward passes have read.
    """

    values: NDArray[np.float32]
    seconds_s: float
    switch_s: float
    check_s: float
    num_read: int


class SpanScorer(Protocol):
    """A model that scores spans of trajectories at versions that it holds, wherever it runs."""

    async def score_spans(self, spans: Sequence[ScoringSpan], at: PolicyVersion) -> ScoredSpans:
        """Score the tokens of one or more spans, at a version that the model holds.

        Raises:
            VersionEvictedError: The version is not held.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class AverageScores:
    """Log-probs under averaged weights: float32 [token], natural log, and the mean age of the average in versions."""

    values: NDArray[np.float32]
    age: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditScores:
    """Log-probs of the loss tokens of one batch, before the first optimizer step on it.

    Args:
        old: float32 [loss token]; those of OLD.
        live: float32 [loss token]; those of the live weights, where an average may be reset to them.
    """

    old: NDArray[np.float32]
    live: NDArray[np.float32] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineScores:
    """What the engine's numerics gave loss tokens when they were sampled, and what they give them with the live weights.

    Args:
        logp_mu: float32 [loss token]; ``log mu_old``, as recorded.
        values: float32 [loss token]; ``log q_t``: the live weights in the engine's numerics.
        noise: float32 [probe token] by version, at least of all versions within the staleness bound: ``log q - log pi``
            of the fixed probe tokens, with that version's weights.
    """

    logp_mu: NDArray[np.float32]
    values: NDArray[np.float32]
    noise: Mapping[PolicyVersion, NDArray[np.float32]]


class ScoringHandle(SpanScorer, Protocol):
    """What a source may ask of the trainer, wherever it runs."""

    @property
    def is_idle(self) -> bool:
        """Whether no call is being carried out."""

    async def score(self, tokens: NDArray[np.int64], at: PolicyVersion | None) -> NDArray[np.float32]:
        """Score loss tokens of the batch in training.

        Args:
            tokens: int64, ascending positions among the batch's loss tokens.
            at: A stored version, or None for the live weights.

        Raises:
            VersionEvictedError: The version is no longer held.
        """

    async def score_mixed(self) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Score all loss tokens of the batch in training, over keys and values of the versions that the engine had.

        Returns:
            float32 and int64 [loss token]: the values, and the version that scored each, -1 where none did.

        Raises:
            VersionEvictedError: A version is no longer held.
            TrajectoryError: The batch does not say which versions computed them.
        """

    async def score_average(self, tokens: NDArray[np.int64]) -> AverageScores:
        """Score loss tokens of the batch in training, as `score` does, under the average up to the current version.

        The trainer keeps an average for a source with `keeps_average`.
        """

    async def score_engine(self, tokens: NDArray[np.int64]) -> EngineScores:
        """Score loss tokens of the batch in training, as `score` does, with the live weights in the engine's numerics."""


class DedicatedScorer(SpanScorer, Protocol):
    """A second model that only scores, and holds the newest versions itself."""

    @property
    def window(self) -> int:
        """How many versions the scorer holds: the newest ones."""

    async def publish(self, version: PolicyVersion, update: WeightUpdate, probe_logps: NDArray[np.float32]) -> float:
        """Take over a version, and drop the oldest beyond the window; returns the largest difference on the probe, in nats.

        Args:
            version: The number of the version.
            update: The weights, copied before this returns, or the patches that lead to them from the version before.
            probe_logps: float32 [probe token]; what the trainer's live weights give the fixed probe tokens.

        Raises:
            ExactnessError: The weights that arrived give the probe tokens other log-probs.
        """
