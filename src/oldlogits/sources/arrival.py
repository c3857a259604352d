"""Source "arrival": ASYNC, the trainer's weights when the batch enters training. Not OLD."""

from __future__ import annotations

import numpy as np

from oldlogits.core.policies import ASYNC
from oldlogits.core.scoring import BatchTokens, Scored
from oldlogits.core.source import LogprobSource


class ArrivalSource(LogprobSource):
    """Scores the whole batch once with the live weights, before the first optimizer step on it.

    Paper: "Decoupled PPO & async": ``pi_async`` in place of ``pi_old``.
    """

    provides = ASYNC
    cost = "one forward, no storage"

    async def acquire(self, batch: BatchTokens) -> Scored:
        """Score every token with the trainer's current weights."""
        num_tokens = len(batch.versions)
        values = await self._trainer.score(np.arange(num_tokens), None)
        return Scored(policy=ASYNC, values=values, computed_at=np.full(num_tokens, batch.trainer_version), num_switches=0)
