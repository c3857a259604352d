"""What a runtime supplies to the one loop: handles of engine and trainer, a way to run environments, and a clock."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from oldlogits.batch import TokenBatch
from oldlogits.config import Caution
from oldlogits.core.engine import RolloutEngine
from oldlogits.core.scoring import DedicatedScorer, Scored, ScoredSpans, ScoringSpan
from oldlogits.core.weights import FullWeights, PolicyVersion, WeightUpdate
from oldlogits.engines.spec import EngineStats, Incident
from oldlogits.envs.shape import Environment
from oldlogits.rollout.buffer import Buffer
from oldlogits.rollout.turns import EnvironmentRunner
from oldlogits.sources import EngineScores
from oldlogits.train.reports import ConsistencyErrors, PublishedVersion, ScoringWork
from oldlogits.train.scorer_model import ScorerModel
from oldlogits.train.step import UpdateResult
from oldlogits.train.trainer import Trainer
from oldlogits.versions import AverageScores


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerState:
    """The trainer's version, its witnesses, what scoring has cost it, and the seconds that it has worked."""

    version: PolicyVersion
    consistency: ConsistencyErrors
    num_parameters: int
    num_trained: int
    work: ScoringWork
    busy_s: float


class TrainerServer:
    """A `Trainer` that counts the seconds it works; the body of every handle."""

    def __init__(self, trainer: Trainer, clock: Callable[[], float]) -> None:
        self._trainer, self._clock, self._busy_s = trainer, clock, 0.0

    def call(self, method: str, arguments: tuple[object, ...]) -> object:
        """Call a method of the trainer by name."""
        if method == "state":
            t = self._trainer
            return TrainerState(
                version=t.version,
                consistency=t.consistency,
                num_parameters=t.num_parameters,
                num_trained=t.num_trained,
                work=t.work,
                busy_s=self._busy_s,
            )
        started = self._clock()
        try:
            return METHODS[method](self._trainer, *arguments)
        finally:
            self._busy_s += self._clock() - started


METHODS: dict[str, Callable[..., object]] = {
    "publish": Trainer.publish,
    "full_weights": Trainer.full_weights,
    "put_batch": Trainer.put_batch,
    "score": Trainer.score,
    "score_mixed": Trainer.score_mixed,
    "score_spans": Trainer.score_spans,
    "score_average": Trainer.score_average,
    "score_engine": Trainer.score_engine,
    "train": Trainer.train,
    "retain": Trainer.retain,
    "save": Trainer.save,
    "save_batch": Trainer.save_batch,
    "restore": Trainer.restore,
}
"""What a handle may call."""


class TrainerClient:
    """The asynchronous handle of a `Trainer`, over one function that carries out a call, here or in another process."""

    def __init__(self, carry_out: Callable[[str, tuple[object, ...]], Awaitable[object]]) -> None:
        self.carry_out, self._num_calls = carry_out, 0

    @property
    def is_idle(self) -> bool:
        """Whether no call is being carried out."""
        return self._num_calls == 0

    async def _call(self, method: str, arguments: tuple[object, ...]) -> object:
        self._num_calls += 1
        try:
            return await self.carry_out(method, arguments)
        finally:
            self._num_calls -= 1

    async def publish(self) -> PublishedVersion:
        """Store the live weights as the current version."""
        return cast(PublishedVersion, await self._call("publish", ()))

    async def full_weights(self) -> FullWeights:
        """The live weights, valid until the next step."""
        return cast(FullWeights, await self._call("full_weights", ()))

    async def put_batch(self, batch: TokenBatch) -> None:
        """Hand over the next batch."""
        await self._call("put_batch", (batch,))

    async def score(self, tokens: NDArray[np.int64], at: PolicyVersion | None) -> NDArray[np.float32]:
        """Score loss tokens of the batch."""
        return cast("NDArray[np.float32]", await self._call("score", (tokens, at)))

    async def score_mixed(self) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Score all loss tokens of the batch over the engine's keys and values."""
        return cast("tuple[NDArray[np.float32], NDArray[np.int64]]", await self._call("score_mixed", ()))

    async def score_average(self, tokens: NDArray[np.int64]) -> AverageScores:
        """Score loss tokens of the batch with the averaged weights."""
        return cast(AverageScores, await self._call("score_average", (tokens,)))

    async def score_engine(self, tokens: NDArray[np.int64]) -> EngineScores:
        """Score loss tokens of the batch with the live weights in the engine's numerics."""
        return cast(EngineScores, await self._call("score_engine", (tokens,)))

    async def score_spans(self, pieces: Sequence[ScoringSpan], at: PolicyVersion) -> ScoredSpans:
        """Score tokens of any trajectories."""
        return cast(ScoredSpans, await self._call("score_spans", (pieces, at)))

    async def train(self, scored: Scored | None) -> UpdateResult:
        """Train the batch."""
        return cast(UpdateResult, await self._call("train", (scored,)))

    async def retain(self, oldest_needed: PolicyVersion) -> None:
        """Drop older versions."""
        await self._call("retain", (oldest_needed,))

    async def save(self, folder: Path) -> None:
        """Write a checkpoint."""
        await self._call("save", (folder,))

    async def save_batch(self, folder: Path) -> Path:
        """Write the batch in training."""
        return cast(Path, await self._call("save_batch", (folder,)))

    async def restore(self, folder: Path) -> None:
        """Go on from a checkpoint."""
        await self._call("restore", (folder,))

    async def state(self) -> TrainerState:
        """Version, witnesses, scoring work and busy seconds."""
        return cast(TrainerState, await self._call("state", ()))


def inline_trainer(carry_out: Callable[[str, tuple[object, ...]], object]) -> TrainerClient:
    """A trainer of this process: every call is carried out before anything else goes on."""

    async def call(method: str, arguments: tuple[object, ...]) -> object:
        return carry_out(method, arguments)

    return TrainerClient(call)


class InlineScorer:
    """A `DedicatedScorer` of this process: every call is carried out before anything else goes on."""

    def __init__(self, scorer: ScorerModel, window: int) -> None:
        self._scorer, self.window = scorer, window

    async def publish(self, version: PolicyVersion, update: WeightUpdate, probe_logps: NDArray[np.float32]) -> float:
        """Take over a version."""
        return self._scorer.publish(version, update, probe_logps)

    async def score_spans(self, pieces: Sequence[ScoringSpan], at: PolicyVersion) -> ScoredSpans:
        """Score pieces."""
        return self._scorer.score_spans(pieces, at)


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """What the loop works with.

    Args:
        engine: Samples.
        trainer: Trains and scores.
        run_environment: Runs environment code.
        engine_stats: The engine's counters.
        clock: Seconds since some fixed point; wall-clock values only.
        real_time: Whether the starts of groups may be spread over time.
        watch: Told of the run's buffer, for a runtime that controls the lags.
        scorer: A second model that only scores, for the route "dedicated".
        host_environment: Gives the class whose instances the episodes use, for environments that live elsewhere.
        listen: Told who wants to know what happens to servers, and what a reader of the results should know.
        workers: Tasks of the runtime that must not end while the run goes on; their errors end it.
    """

    engine: RolloutEngine
    trainer: TrainerClient
    run_environment: EnvironmentRunner
    engine_stats: Callable[[], Awaitable[EngineStats]]
    clock: Callable[[], float]
    real_time: bool
    watch: Callable[[Buffer], None]
    scorer: DedicatedScorer | None = None
    listen: Callable[[Callable[[Incident | Caution], None]], None] = lambda hear: None
    host_environment: Callable[[type[Environment]], type[Environment]] = lambda environment_class: environment_class
    workers: tuple[asyncio.Task[None], ...] = ()
