"""The driver of a trace: a lockstep run whose trainer tells an observer what it publishes and what it trains.

This is the one file of the study that stands between the loop and its trainer. The run itself stays the same bit for bit.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from oldlogits.backends.lockstep import open_lockstep
from oldlogits.batch import TokenBatch
from oldlogits.config import RunConfig
from oldlogits.core.scoring import Scored
from oldlogits.core.weights import FullWeights
from oldlogits.loop.backend import Backend, TrainerClient
from oldlogits.run.run import run
from oldlogits.train.reports import PublishedVersion
from oldlogits.train.step import UpdateResult

EngineScores = Callable[[int], Awaitable[tuple[NDArray[np.float32], NDArray[np.float32]]]]
"""Scores the first so many loss tokens of the batch in the engine's numerics: their log-probs, and ``logp_mu``."""


class Observer(Protocol):
    """Looks at a trainer's versions and batches, and changes nothing."""

    def published(self, published: PublishedVersion, weights: FullWeights) -> None:
        """The trainer has published a version."""

    async def before_train(self, batch: TokenBatch, engine_scores: EngineScores) -> None:
        """The trainer is about to train a batch."""

    def after_train(self, batch: TokenBatch, result: UpdateResult) -> None:
        """The trainer has trained it."""


def drive(config: RunConfig, out: Path, observe: Callable[[Path], Observer]) -> None:
    """Run a lockstep recipe under the eyes of an observer.

    Args:
        config: A checked recipe of runtime "lockstep".
        out: The run folder; absent or empty.
        observe: Makes the observer from the model folder that the run starts from.

    Raises:
        OldLogitsError: The error that ended the run.
        KeyboardInterrupt: The run was interrupted.
    """

    @asynccontextmanager
    async def open_observed(config: RunConfig, folder: Path, probe_ids: Sequence[int], seed: int) -> AsyncIterator[Backend]:
        async with open_lockstep(config, folder, probe_ids, seed) as handles:
            yield replace(handles, trainer=_ObservedTrainer(handles.trainer, observe(folder)))

    result = run(config, out, open_runtime=open_observed, console=Console(quiet=True))
    if result.error is not None:
        raise result.error
    if result.summary.ended == "interrupted":
        raise KeyboardInterrupt


class _ObservedTrainer(TrainerClient):
    """The driver's trainer; three of its methods tell the observer."""

    def __init__(self, trainer: TrainerClient, observer: Observer) -> None:
        super().__init__(trainer.carry_out)
        self._observer = observer
        self._batch: TokenBatch | None = None

    async def publish(self) -> PublishedVersion:
        """Publish, and tell."""
        published = await super().publish()
        assert isinstance(published.update, FullWeights), "a trainer of this process sends no patches"
        self._observer.published(published, published.update)
        return published

    async def put_batch(self, batch: TokenBatch) -> None:
        """Hand over the next batch."""
        self._batch = batch
        await super().put_batch(batch)

    async def train(self, scored: Scored | None) -> UpdateResult:
        """Train the batch, and tell before and after."""
        assert self._batch is not None, "put_batch comes before train"
        await self._observer.before_train(self._batch, self._engine_scores)
        result = await super().train(scored)
        self._observer.after_train(self._batch, result)
        return result

    async def _engine_scores(self, num_tokens: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        scores = await self.score_engine(np.arange(num_tokens))
        return scores.values, scores.logp_mu
