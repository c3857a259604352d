"""Source "eager": OLD, scored while the trainer holds a version and the one before it.

engine    v v v v |pause| v+1 v+1 v+1 ...
trainer    steps, publish v+1 | score what v sampled | (v is dropped) wait for a batch: score groups that arrive | ...
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from oldlogits.core.trajectory import Sampled
from oldlogits.core.weights import PolicyVersion, WeightUpdate
from oldlogits.sources.incremental import IncrementalSource


class EagerSource(IncrementalSource):
    """The trainer scores between its calls, with one extra resident version, and the engine is never made to wait.

    At the version change every token of the outgoing version is known, closed turns and running ones. They are scored
    right after the publish, and the version is dropped. A token that becomes known later (an engine that does not tell
    what its running turns have sampled) keeps its version in the trainer's store, and is counted as a fallback.
    """

    cost = "one extra version while the outgoing one is scored"

    @classmethod
    def most_stored(cls, window: int) -> int:
        """Two: the newest version and the outgoing one."""
        return 2

    async def on_paused(self, running: Mapping[str, Sequence[Sampled]]) -> None:
        """Keep the outgoing version as the one extra copy."""
        self.hold((self.in_flight.version, self.in_flight.version + 1))
        await super().on_paused(running)

    async def on_published(self, version: PolicyVersion, update: WeightUpdate, probe_logps: NDArray[np.float32]) -> None:
        """Score what the outgoing version sampled; then it is needed no more."""
        await super().on_published(version, update, probe_logps)
        await self._score_now()
        self.hold((version,))
