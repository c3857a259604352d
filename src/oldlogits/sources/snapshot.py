"""Source "snapshot": OLD from stored versions, each token scored at the version that sampled it."""

from __future__ import annotations

import numpy as np

from oldlogits.core.policies import OLD
from oldlogits.core.scoring import BatchTokens, Scored
from oldlogits.core.source import LogprobSource


class SnapshotSource(LogprobSource):
    """Scores a batch version by version, in ascending order: one switch per distinct version.

    Where the engine kept keys and values of older versions, so does the trainer: the mixed-version forward.

    Paper: "snapshot version tracking" (three exact ways to get pi_old).
    """

    provides = OLD
    cost = "stores every version that is still needed"
    stores_versions = True
    mixes_versions = True

    async def acquire(self, batch: BatchTokens) -> Scored:
        """Score every token at its own version, never at another one; but for those whose OLD the training forward gives."""
        versions = batch.versions
        if batch.has_mixed_kv:
            values, computed_at = await self._trainer.score_mixed()
            return Scored(policy=OLD, values=values, computed_at=computed_at, num_switches=len(np.unique(versions)))
        values = np.full(len(versions), np.nan, np.float32)
        left_out = batch.from_training if batch.from_training is not None else np.zeros(len(versions), np.bool_)
        computed_at = np.where(left_out, batch.trainer_version, -1)
        distinct = np.unique(versions[~left_out])
        for version in distinct:
            tokens = np.flatnonzero((versions == version) & ~left_out)
            values[tokens] = await self._trainer.score(tokens, int(version))
            computed_at[tokens] = version
        return Scored(
            policy=OLD,
            values=values,
            computed_at=computed_at,
            num_switches=len(distinct),
            left_out=left_out if left_out.any() else None,
        )
