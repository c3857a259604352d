"""Trainer and dedicated scorer that only pass time: what the routes of `oldlogits.sources` call in a simulation.

A placeholder trajectory has one token for each context, and one for each stretch that one version sampled; how many tokens
these are is in its `Flight`. So the routes decide what is scored when, and the seconds follow from the real counts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from benchmarks.simulate.engine import Cached
from benchmarks.simulate.scenario import ScorerTimes, TrainerTimes
from oldlogits.core.scoring import AverageScores, BatchTokens, EngineScores, ScoredSpans, ScoringSpan
from oldlogits.core.trajectory import Context, Sampled, Segment, Trajectory
from oldlogits.core.weights import PolicyVersion, WeightUpdate

READ = Context(token_ids=(0,))
"""The placeholder of everything that is read between two turns."""


@dataclass(slots=True, kw_only=True)
class Flight:
    """One trajectory: its placeholder segments, and how many tokens these are.

    Args:
        id: Of the trajectory.
        cached: What the engine has of it.
        segments: The placeholders, as the routes see them.
        ends: Of each sampled placeholder, in order: real tokens up to its last.
        counts: Of each sampled placeholder, in order: version and real tokens.
    """

    id: str
    cached: Cached
    segments: list[Segment] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    counts: list[tuple[PolicyVersion, int]] = field(default_factory=list)
    running_ends: dict[PolicyVersion, int] = field(default_factory=dict)  # of its running turn, when the engine was paused

    def read(self, num_tokens: int) -> None:
        """The environment added tokens."""
        self.segments.append(READ)
        self.cached.num_tokens += num_tokens

    def sampled(self, spans: Sequence[tuple[PolicyVersion, int]]) -> None:
        """A turn has ended."""
        self.running_ends.clear()
        end = self.cached.num_tokens - sum(num for _, num in spans)
        for version, num in spans:
            end += num
            self.segments.append(placeholder(version))
            self.ends.append(end)
            self.counts.append((version, num))

    def paused(self, spans: Sequence[tuple[PolicyVersion, int]]) -> None:
        """The engine was paused while a turn had sampled these; the newest version's end is known now."""
        if spans:
            self.running_ends[spans[-1][0]] = self.cached.num_tokens

    def end_of(self, version: PolicyVersion) -> int:
        """Real tokens up to the last that a version sampled."""
        ends = [end for end, (v, _) in zip(self.ends, self.counts, strict=True) if v == version]
        return max([*ends, self.running_ends.get(version, 0)])

    def trajectory(self, group_id: str, reward: float) -> Trajectory:
        """The placeholder, as it goes to the buffer."""
        return Trajectory(id=self.id, group_id=group_id, segments=tuple(self.segments), reward=reward, stop_reason="done")


def placeholder(version: PolicyVersion) -> Sampled:
    """One token that stands for all that a version sampled in one go."""
    return Sampled(token_ids=(0,), logp_mu=(-1.0,), version=version, kv="fresh", temperature=1.0)


class Worker:
    """Does one thing at a time, in the order in which it is asked."""

    def __init__(self, busy_share: float = 1.0) -> None:
        self._lock, self._busy_share = asyncio.Lock(), busy_share
        self.factor = 1.0  # how much longer than usual everything takes
        self.busy_s = 0.0

    @property
    def is_idle(self) -> bool:
        """Whether nothing is being done."""
        return not self._lock.locked()

    async def work(self, seconds: float, *, is_scoring: bool = False) -> None:
        """Take that long."""
        async with self._lock:
            seconds *= self.factor
            await asyncio.sleep(seconds)
            self.busy_s += seconds * (1.0 if is_scoring else self._busy_share)


class SimulatedTrainer(Worker):
    """Scores batches and pieces in the time that it takes to read them.

    Args:
        times: Its step times.
        flights: All trajectories, by id.
    """

    def __init__(self, times: TrainerTimes, flights: Mapping[str, Flight]) -> None:
        super().__init__(times.busy_share)
        self._times, self._flights = times, flights
        self._sequence = self._end = np.zeros(0, np.int64)
        self._num_sequences = 0
        self._version = 0
        self.num_read = 0

    def put_batch(self, batch: BatchTokens) -> None:
        """The batch that `score` is about."""
        flights = [self._flights[i] for i in batch.trajectory_ids]
        self._end = np.array([end for flight in flights for end in flight.ends], np.int64)
        self._sequence = np.repeat(np.arange(len(flights)), [len(flight.ends) for flight in flights])
        self._num_sequences, self._version = len(flights), batch.trainer_version

    async def score(self, tokens: NDArray[np.int64], at: PolicyVersion | None) -> NDArray[np.float32]:
        """Each sequence is read up to its last token among these."""
        furthest = np.zeros(self._num_sequences, np.int64)
        np.maximum.at(furthest, self._sequence[tokens], self._end[tokens])
        await self._read(int(furthest.sum()), num_checkouts=0 if at is None else 1)
        return np.zeros(len(tokens), np.float32)

    async def score_mixed(self) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Each sequence is read once."""
        await self.score(np.arange(len(self._end)), None)
        return np.zeros(len(self._end), np.float32), np.full(len(self._end), self._version)

    async def score_spans(self, pieces: Sequence[ScoringSpan], at: PolicyVersion) -> ScoredSpans:
        """Each piece is read up to its last token."""
        num = sum(self._flights[piece.trajectory_id].end_of(at) for piece in pieces)
        seconds = await self._read(num, num_checkouts=1)
        return _scored(pieces, seconds)

    async def score_average(self, tokens: NDArray[np.int64]) -> AverageScores:
        """As long as any forward pass, with other weights."""
        return AverageScores(values=await self.score(tokens, self._version), age=1.0)

    async def score_engine(self, tokens: NDArray[np.int64]) -> EngineScores:
        """As long as any forward pass."""
        values = await self.score(tokens, None)
        flat = {version: np.zeros(1, np.float32) for version in range(self._version + 1)}
        return EngineScores(logp_mu=values, values=values, noise=flat)

    async def _read(self, num_tokens: int, *, num_checkouts: int) -> float:
        self.num_read += num_tokens
        seconds = num_tokens * self._times.read_s + num_checkouts * self._times.checkout_s
        await self.work(seconds, is_scoring=True)
        return seconds


class SimulatedScorer(Worker):
    """The second model of the route "dedicated".

    Args:
        times: Its step times.
        flights: All trajectories, by id.
    """

    def __init__(self, times: ScorerTimes, flights: Mapping[str, Flight]) -> None:
        super().__init__()
        self._times, self._flights, self.window = times, flights, times.window
        self.num_read = 0

    async def publish(self, version: PolicyVersion, update: WeightUpdate, probe_logps: NDArray[np.float32]) -> float:
        """Take over a version."""
        await self.work(self._times.publish_s)
        return 0.0

    async def score_spans(self, pieces: Sequence[ScoringSpan], at: PolicyVersion) -> ScoredSpans:
        """Each piece is read up to its last token."""
        num = sum(self._flights[piece.trajectory_id].end_of(at) for piece in pieces)
        self.num_read += num
        seconds = num * self._times.read_s + self._times.checkout_s
        await self.work(seconds)
        return _scored(pieces, seconds)


def _scored(pieces: Sequence[ScoringSpan], seconds: float) -> ScoredSpans:
    values, num_read = (
        np.zeros(sum(len(piece.positions) for piece in pieces), np.float32),
        sum(piece.num_read for piece in pieces),
    )
    return ScoredSpans(values=values, seconds_s=seconds, switch_s=0.0, check_s=0.0, num_read=num_read)
