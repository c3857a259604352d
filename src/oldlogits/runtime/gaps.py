"""How long turns wait for what is outside the engine: parsing, the environment with its latency, the chat template."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from oldlogits.core.trajectory import Sampled, Segment

QUANTILES: Final = (50, 90, 99)
"""Percentiles of a metric."""


class TurnGaps:
    """Seconds from the end of a sampled turn to the request for the trajectory's next one.

    Args:
        clock: Seconds since some fixed point.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._since: dict[str, float] = {}
        self._gaps_s: list[float] = []

    def grew(self, trajectory_id: str, segments: Sequence[Segment]) -> None:
        """A running trajectory has these segments now: a sampled last one begins a gap, a context ends it."""
        if isinstance(segments[-1], Sampled):
            self._since[trajectory_id] = self._clock()
        elif (since := self._since.pop(trajectory_id, None)) is not None:
            self._gaps_s.append(self._clock() - since)

    def ended(self, trajectory_id: str) -> None:
        """Its last turn is followed by none."""
        self._since.pop(trajectory_id, None)

    def metrics(self) -> dict[str, float]:
        """Of the gaps since the last call; docs/metrics.md."""
        gaps_s, self._gaps_s = np.array(self._gaps_s), []
        found = {"turn/num_gaps": float(len(gaps_s))}
        if len(gaps_s):
            found |= {"turn/gap_s": float(gaps_s.mean()), "turn/gap_max_s": float(gaps_s.max())}
            found |= {f"turn/gap_p{q}_s": float(np.percentile(gaps_s, q)) for q in QUANTILES}
        return found
