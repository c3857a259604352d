"""Route "arrival": ASYNC, the trainer's weights when the batch enters training. Not OLD."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from oldlogits.core.policies import ASYNC, Policy
from oldlogits.core.protocols import PolicyVersion, Scored, ScoringHandle


class ArrivalSource:
    """Scores the whole batch once with the live weights, before the first optimizer step on it.

    Paper: "Decoupled PPO & async": ``pi_async`` stands in for ``pi_old``.
    """

    provides: Policy = ASYNC

    def __init__(self, trainer: ScoringHandle) -> None:
        self._trainer = trainer

    async def acquire(self, versions: NDArray[np.int64], trainer_version: PolicyVersion) -> Scored:
        """Score every token with the trainer's current weights."""
        values = await self._trainer.score(np.arange(len(versions)), None)
        return Scored(policy=ASYNC, values=values, computed_at=np.full(len(versions), trainer_version), num_switches=0)
