"""How long trajectories wait for what is outside the engine: parsing, the environment with its latency, the chat template.

start ....first.... turn ....gap.... turn ....gap.... turn ....last.... end
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final, Literal

import numpy as np

from oldlogits.core.trajectory import Sampled, Segment

Kind = Literal["first", "gap", "last"]
KINDS: Final[tuple[Kind, ...]] = ("first", "gap", "last")
"""Before the first turn, between two turns, and after the last."""

QUANTILES: Final = (50, 90, 99)
"""Percentiles of a metric."""


class TurnLatency:
    """Seconds in which a trajectory is not the engine's."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._since: dict[str, tuple[Kind, float]] = {}
        self._gaps_s: dict[Kind, list[float]] = {kind: [] for kind in KINDS}

    @property
    def num_running(self) -> int:
        """Episodes that have begun and are not over."""
        return len(self._since)

    def started(self, trajectory_id: str) -> None:
        """Note that the episode of this trajectory begins."""
        self._since[trajectory_id] = ("first", self._clock())

    def grew(self, trajectory_id: str, segments: Sequence[Segment]) -> None:
        """Note the segments of a running trajectory: a sampled last one begins a gap, a context ends it."""
        if isinstance(segments[-1], Sampled):
            self._since[trajectory_id] = ("gap", self._clock())
        else:
            self._note(trajectory_id)

    def ended(self, trajectory_id: str, *, well: bool) -> None:
        """Forget an episode that is over; the time after its last turn counts where it ended `well`."""
        if well and trajectory_id in self._since:
            self._note(trajectory_id, kind="last")
        self._since.pop(trajectory_id, None)

    def metrics(self) -> dict[str, float]:
        """Count and summarise the gaps since the last call; docs/metrics.md."""
        found: dict[str, float] = {}
        for kind in KINDS:
            gaps_s, self._gaps_s[kind] = np.array(self._gaps_s[kind]), []
            found[f"turn/num_{kind}"] = float(len(gaps_s))
            if len(gaps_s):
                found |= {f"turn/{kind}_s": float(gaps_s.mean()), f"turn/{kind}_max_s": float(gaps_s.max())}
                found |= {f"turn/{kind}_p{q}_s": float(np.percentile(gaps_s, q)) for q in QUANTILES}
        return found

    def _note(self, trajectory_id: str, kind: Kind | None = None) -> None:
        if trajectory_id in self._since:
            begun_as, since = self._since.pop(trajectory_id)
            self._gaps_s[kind or begun_as].append(self._clock() - since)
