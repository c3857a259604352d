"""Route "ewma": EWMA, the trainer's weights averaged over versions. Not OLD."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from oldlogits.core.policies import EWMA, Policy
from oldlogits.core.scoring import BatchTokens, Scored, ScoringHandle
from oldlogits.core.source import LogprobSource
from oldlogits.versions import AverageScores


class AveragingHandle(ScoringHandle, Protocol):
    """A trainer that keeps an average of its versions."""

    async def score_average(self, tokens: NDArray[np.int64]) -> AverageScores:
        """Log-probs of loss tokens of the batch in training, under the average up to the current version.

        Args:
            tokens: int64, ascending positions among the batch's loss tokens.
        """
        ...


class EwmaSource(LogprobSource):
    """Scores the whole batch once with the averaged weights, before the first optimizer step on it.

    Paper: "Revised PPO-EWMA": one proximal policy for the tokens of all versions; docs/ewma.md says how old it is.
    """

    provides: Policy = EWMA

    def __init__(self, trainer: AveragingHandle) -> None:
        self._trainer = trainer

    async def acquire(self, batch: BatchTokens) -> Scored:
        """Score every token with the average, which holds the trainer's version and earlier ones."""
        scores = await self._trainer.score_average(np.arange(len(batch.versions)))
        computed_at = np.full(len(batch.versions), batch.trainer_version)
        return Scored(policy=EWMA, values=scores.values, computed_at=computed_at, num_switches=1)
