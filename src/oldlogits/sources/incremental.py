"""What the routes have in common that score ahead: tokens are scored while their version is still held.

    a turn ends --------> on_segment_closed --.
    a group has ended --> on_arrival ----------+-> ledger -> complete pieces -> scorer -> values -> acquire
    engine is paused ---> on_paused ----------'                 (not held any more: the trainer's store)

The routes differ in who scores, and when.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from oldlogits.core.policies import OLD, Policy
from oldlogits.core.scoring import BatchTokens, Scored, ScoringHandle, SpanScorer
from oldlogits.core.source import LogprobSource
from oldlogits.core.trajectory import Sampled, Segment, Trajectory
from oldlogits.core.weights import PolicyVersion, WeightUpdate
from oldlogits.sources.in_flight import InFlightTokens

CHUNK: Final = 64
"""Pieces in one call of a scorer: what waits behind it waits no longer than that."""


class IncrementalSource(LogprobSource):
    """Provides OLD; a piece is scored as soon as it is complete and its scorer is free, or else when its batch is acquired.

    Args:
        trainer: Scores the tokens of versions that `scorer` does not hold, from its store.
        scorer: Scores those of the versions that are held.
    """

    provides: Policy = OLD
    needs_partials = True

    def __init__(self, trainer: ScoringHandle, scorer: SpanScorer) -> None:
        self._trainer, self._scorer = trainer, scorer
        self._lock = asyncio.Lock()  # nothing is scored twice
        self.ledger = InFlightTokens()
        self._held: tuple[PolicyVersion, ...] = ()
        self._most_held = 0
        self._last_version = -1
        self._wait_s = self._score_s = self._switch_s = self._witness_s = 0.0
        self._num_switches = self._num_checkouts = self._num_fallback = self._num_read = self._num_repeated = 0

    def hold(self, versions: tuple[PolicyVersion, ...]) -> None:
        """From here on the scorer holds these."""
        self._held = versions
        self._most_held = max(self._most_held, len(versions))

    def on_segment_closed(self, trajectory_id: str, segments: Sequence[Segment]) -> None:
        """Note it."""
        self.ledger.grew(trajectory_id, segments)

    async def on_arrival(self, trajectories: Sequence[Trajectory]) -> None:
        """Score them now if the trainer has nothing else to do."""
        self.ledger.ended(trajectories)
        if self._trainer.is_idle:
            await self._score(of=[trajectory.id for trajectory in trajectories])

    async def on_paused(self, running: Mapping[str, Sequence[Sampled]]) -> None:
        """Every token of the version is known."""
        self.ledger.paused(running)

    async def on_published(self, version: PolicyVersion, update: WeightUpdate, probe_logps: NDArray[np.float32]) -> None:
        """Tokens of `version` come now."""
        self.ledger.version = version

    async def acquire(self, batch: BatchTokens) -> Scored:
        """Score what is not scored yet, and hand out the batch's values."""
        await self._score_now(of=batch.trajectory_ids)
        values, computed_at = self.ledger.values_of(batch.trajectory_ids)
        num_switches, self._num_switches = self._num_switches, 0
        return Scored(policy=OLD, values=values, computed_at=computed_at, num_switches=num_switches)

    def drop(self, trajectory_ids: Iterable[str]) -> None:
        """Forget their values."""
        self.ledger.drop(trajectory_ids)

    def oldest_needed(self, in_flight: PolicyVersion) -> PolicyVersion:
        """The oldest version with a token that is not scored yet, or not known."""
        return self.ledger.oldest_needed()

    def metrics(self) -> Mapping[str, float]:
        """Seconds, tokens and copies since the last call."""
        repeated = self.ledger.num_repeated_tokens
        found = {
            "source/wait_s": self._wait_s,
            "source/score_s": self._score_s,
            "source/num_checkouts": float(self._num_checkouts),
            "source/switch_s": self._switch_s,
            "source/check_s": self._witness_s,
            "source/resident_copies": float(self._most_held),
            "source/fallback_tokens": float(self._num_fallback),
            "source/read_tokens": float(self._num_read),
            "source/repeated_prefix_tokens": float(repeated - self._num_repeated),
        }
        self._wait_s = self._score_s = self._switch_s = self._witness_s = 0.0
        self._num_checkouts, self._num_fallback, self._num_read, self._num_repeated = 0, 0, 0, repeated
        self._most_held = len(self._held)
        return found

    async def _score_now(self, *, of: Iterable[str] | None = None) -> None:
        """Score while the update waits."""
        started = time.perf_counter()
        await self._score(of=of)
        self._wait_s += time.perf_counter() - started

    async def _score(self, *, of: Iterable[str] | None = None, held_only: bool = False) -> None:
        """Score complete pieces: the oldest version first, a chunk at a time, each at its own version.

        Args:
            of: Only these trajectories; None: all in flight.
            held_only: Leave the pieces of versions that are not held to a later call.
        """
        of = None if of is None else list(of)
        while True:
            async with self._lock:
                found = self.ledger.next_pieces(CHUNK, of=of, versions=self._held if held_only else None)
                if found is None:
                    return
                version, pieces = found
                is_held = version in self._held
                scored = await (self._scorer if is_held else self._trainer).score_spans(pieces, version)
                self.ledger.put(pieces, version, scored.values)
                self._score_s += scored.seconds_s
                self._num_checkouts += 1
                self._switch_s += scored.switch_s
                self._witness_s += scored.witness_s
                self._num_read += sum(piece.num_read for piece in pieces)
                self._num_fallback += 0 if is_held else len(scored.values)
                self._num_switches += version != self._last_version
                self._last_version = version
