"""Source "interruption": OLD from the live weights, before they change; no stored weights.

engine    v v v v |pause ............................................| v+1 v+1, keys and values recomputed
trainer            score what v sampled, finished or running | steps | publish v+1
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from oldlogits.core.trajectory import Sampled
from oldlogits.core.weights import PolicyVersion, WeightUpdate
from oldlogits.sources.incremental import IncrementalSource


class InterruptionSource(IncrementalSource):
    """The engine is paused before the first optimizer step; every token of the version is scored while it is live.

    Paper: "partial-rollout interruption" (three exact ways to get pi_old).
    """

    cost = "the engine waits while the trainer scores and steps"
    stores_versions = False
    needs_pause = True

    async def on_paused(self, running: Mapping[str, Sequence[Sampled]]) -> None:
        """Score what is known and not scored yet, which is all of the live version; then the next one is the live one.

        The engine samples the next version before `on_published` is called.
        """
        await super().on_paused(running)
        await self._score_now()
        self.hold((self.in_flight.version,))

    async def on_published(self, version: PolicyVersion, update: WeightUpdate, probe_logps: NDArray[np.float32]) -> None:
        """Score with the new live weights from here on: they are the only ones there are."""
        await super().on_published(version, update, probe_logps)
        self.hold((version,))
