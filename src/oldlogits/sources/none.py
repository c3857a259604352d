"""Route "none": for variants that need no log-probs but those of MU and THETA."""

from __future__ import annotations

from oldlogits.core.policies import MU, Policy
from oldlogits.core.scoring import BatchTokens, ScoringHandle
from oldlogits.core.source import LogprobSource


class NoSource(LogprobSource):
    """Scores nothing: MU comes with every trajectory, THETA from the trainer's forward pass."""

    provides: Policy = MU

    def __init__(self, trainer: ScoringHandle) -> None:
        """Has no use for the trainer."""

    async def acquire(self, batch: BatchTokens) -> None:
        """Nothing."""
