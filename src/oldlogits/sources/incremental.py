"""Incremental scoring: sources that score tokens while their version is still held, before the trajectory is trained.

    a turn ends --------> on_segment_closed --.
    a group has ended --> on_arrival ----------+-> in flight -> complete spans -> scorer -> values -> acquire
    engine is paused ---> on_paused ----------'                 (not held any more: the trainer's store)

The sources differ in who scores, and when.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from oldlogits.core.policies import OLD
from oldlogits.core.scoring import BatchTokens, Scored, SpanScorer
from oldlogits.core.source import LogprobSource, SourceHandles
from oldlogits.core.trajectory import Sampled, Segment, Trajectory
from oldlogits.core.weights import PolicyVersion, WeightUpdate
from oldlogits.sources.in_flight import InFlightTokens

SPANS_PER_CALL: Final = 64
"""Scoring spans in one call of a scorer: another call waits no longer than that."""
COUNTED: Final = (
    *("source/wait_s", "source/score_s", "source/num_checkouts", "source/switch_s", "source/check_s"),
    *("source/resident_copies", "source/fallback_tokens", "source/read_tokens"),
)
"""What a source counts from one call of `metrics` to the next."""


class IncrementalSource(LogprobSource):
    """Provides OLD; a span is scored as soon as it is complete and its scorer is free, or else when its batch is acquired.

    The scorer, which is the trainer unless a subclass sets another one, scores spans of the versions that it holds. Spans
    of older versions are scored by the trainer, from its store.
    """

    provides = OLD
    stores_versions = True
    needs_partials = True
    scores_batches = False

    def __init__(self, handles: SourceHandles) -> None:
        super().__init__(handles)
        self._scorer: SpanScorer = handles.trainer
        self._lock = asyncio.Lock()  # nothing is scored twice
        self._keep = handles.keep
        self.in_flight = InFlightTokens()
        self._held: tuple[PolicyVersion, ...] = ()
        self._most_held = 0
        self._last_version = -1
        self._num_switches = self._num_repeated = 0
        self._counted = dict.fromkeys(COUNTED, 0.0)

    def hold(self, versions: tuple[PolicyVersion, ...]) -> None:
        """Take note of the versions that the scorer holds from here on."""
        self._held = versions
        self._most_held = max(self._most_held, len(versions))

    def on_segment_closed(self, trajectory_id: str, segments: Sequence[Segment]) -> None:
        """Take note of the trajectory's segments."""
        self.in_flight.extend(trajectory_id, segments)

    def on_withdrawn(self, trajectory_id: str, segments: Sequence[Segment]) -> None:
        """Forget what the turn had sampled."""
        self.in_flight.withdraw(trajectory_id, segments)

    def restore(
        self,
        trajectory_id: str,
        segments: Sequence[Segment],
        values: Mapping[PolicyVersion, Sequence[float]],
        oldest_held: PolicyVersion,
    ) -> bool:
        """Take over a trajectory with its values; tokens that have none are of versions that are held, or were lost."""
        unscored = self.in_flight.restore(trajectory_id, segments, values)
        if all(version in self._held or (self.stores_versions and version >= oldest_held) for version in unscored):
            return True
        self.in_flight.drop([trajectory_id])
        return False

    async def on_arrival(self, trajectories: Sequence[Trajectory]) -> None:
        """Score the trajectories now if the trainer has nothing else to do."""
        self.in_flight.end(trajectories)
        if self._trainer.is_idle:
            await self._score([trajectory.id for trajectory in trajectories])

    async def on_paused(self, running: Mapping[str, Sequence[Sampled]]) -> None:
        """Take note of what running turns hold: every token of the version is known now."""
        self.in_flight.pause(running)

    async def on_published(self, version: PolicyVersion, update: WeightUpdate, probe_logps: NDArray[np.float32]) -> None:
        """Expect tokens of `version` from here on."""
        self.in_flight.version = version

    async def acquire(self, batch: BatchTokens) -> Scored:
        """Score what is not scored yet, and hand out the batch's values."""
        await self._score_now(batch.trajectory_ids)
        values, computed_at = self.in_flight.values(batch.trajectory_ids)
        num_switches, self._num_switches = self._num_switches, 0
        return Scored(policy=OLD, values=values, computed_at=computed_at, num_switches=num_switches)

    def drop(self, trajectory_ids: Iterable[str]) -> None:
        """Forget the values of these trajectories."""
        self.in_flight.drop(trajectory_ids)

    def oldest_needed(self, in_flight: PolicyVersion) -> PolicyVersion:
        """Give the oldest version with a token that is not scored yet, or not known."""
        return self.in_flight.oldest_needed()

    def metrics(self) -> Mapping[str, float]:
        """Give seconds, tokens and copies since the last call."""
        repeated = self.in_flight.num_repeated_tokens
        copies = {"source/resident_copies": float(self._most_held)}
        found = self._counted | copies | {"source/repeated_prefix_tokens": float(repeated - self._num_repeated)}
        self._counted, self._num_repeated, self._most_held = dict.fromkeys(COUNTED, 0.0), repeated, len(self._held)
        return found

    async def _score_now(self, trajectory_ids: Iterable[str] | None = None) -> None:
        """Score while the update waits."""
        started = time.perf_counter()
        await self._score(trajectory_ids)
        self._counted["source/wait_s"] += time.perf_counter() - started

    async def _score(self, trajectory_ids: Iterable[str] | None = None, *, held_only: bool = False) -> None:
        """Score complete spans: the oldest version first, some spans at a time, each at its own version.

        Args:
            trajectory_ids: The trajectories whose spans to score; None: all in flight.
            held_only: Leave the spans of versions that are not held to a later call.
        """
        only = None if trajectory_ids is None else list(trajectory_ids)
        while True:
            async with self._lock:
                found = self.in_flight.next_spans(
                    SPANS_PER_CALL, trajectory_ids=only, versions=self._held if held_only else None
                )
                if found is None:
                    return
                version, spans = found
                is_held = version in self._held
                scored = await (self._scorer if is_held else self._trainer).score_spans(spans, version)
                for trajectory_id, values in self.in_flight.put(spans, version, scored.values):
                    self._keep(trajectory_id, version, values)
                self._counted["source/score_s"] += scored.seconds_s
                self._counted["source/num_checkouts"] += 1
                self._counted["source/switch_s"] += scored.switch_s
                self._counted["source/check_s"] += scored.check_s
                self._counted["source/read_tokens"] += scored.num_read
                self._counted["source/fallback_tokens"] += 0 if is_held else len(scored.values)
                self._num_switches += version != self._last_version
                self._last_version = version
