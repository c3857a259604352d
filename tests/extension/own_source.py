"""A source from outside: OLD, scored a few tokens at a time, with a count of its calls among the metrics."""

import numpy as np

from oldlogits.core.policies import OLD
from oldlogits.core.scoring import BatchTokens, Scored
from oldlogits.core.source import LogprobSource, SourceHandles

CALLS: list[int] = []


class SmallSteps(LogprobSource):
    """As "snapshot", but in several calls for each version."""

    provides = OLD
    cost = "many calls"
    stores_versions = True

    def __init__(self, handles: SourceHandles) -> None:
        self._trainer, self._num_calls = handles.trainer, 0

    async def acquire(self, batch: BatchTokens) -> Scored:
        values = np.full(len(batch.versions), np.nan, np.float32)
        for version in np.unique(batch.versions):
            for tokens in np.array_split(np.flatnonzero(batch.versions == version), 3):
                if len(tokens):
                    values[tokens] = await self._trainer.score(tokens, int(version))
                    self._num_calls += 1
        CALLS.append(self._num_calls)
        return Scored(policy=OLD, values=values, computed_at=batch.versions, num_switches=len(np.unique(batch.versions)))

    def metrics(self) -> dict[str, float]:
        return {"source/num_calls": float(self._num_calls)}
