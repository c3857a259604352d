"""Source "ewma": EWMA, the trainer's weights averaged over versions. Not OLD."""

from __future__ import annotations

import numpy as np

from oldlogits.core.policies import EWMA
from oldlogits.core.scoring import BatchTokens, Scored
from oldlogits.core.source import LogprobSource


class EwmaSource(LogprobSource):
    """Scores the whole batch once with the averaged weights, before the first optimizer step on it.

    Paper: "Revised PPO-EWMA": one proximal policy for the tokens of all versions; docs/ewma.md says how old it is.
    """

    provides = EWMA
    cost = "one forward, one fp32 copy"
    keeps_average = True

    async def acquire(self, batch: BatchTokens) -> Scored:
        """Score every token with the average, which holds the trainer's version and earlier ones."""
        scores = await self._trainer.score_average(np.arange(len(batch.versions)))
        computed_at = np.full(len(batch.versions), batch.trainer_version)
        return Scored(policy=EWMA, values=scores.values, computed_at=computed_at, num_switches=1)
