"""Source "none": for variants that need no log-probs but those of MU and THETA."""

from __future__ import annotations

from oldlogits.core.policies import MU
from oldlogits.core.scoring import BatchTokens
from oldlogits.core.source import LogprobSource


class NoSource(LogprobSource):
    """Scores nothing: MU comes with every trajectory, THETA from the trainer's forward pass."""

    provides = MU
    cost = "nothing"

    async def acquire(self, batch: BatchTokens) -> None:
        """Return nothing: no log-prob is missing."""
