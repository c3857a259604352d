"""The driver of a trace: a lockstep run whose trainer tells an observer what it publishes and what it trains.

This is the one file of the study that stands between the loop and its trainer. The run itself stays the same bit for bit.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Protocol, cast

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from oldlogits.backends.lockstep import open_lockstep
from oldlogits.batch.collate import TokenBatch
from oldlogits.config.schema import RunConfig
from oldlogits.core.scoring import Scored
from oldlogits.core.weights import FullWeights
from oldlogits.loop.backend import Backend, BackendSpec
from oldlogits.rpc.client import client
from oldlogits.run.run import run
from oldlogits.train.calls import TrainerCalls
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
    async def open_observed(spec: BackendSpec) -> AsyncIterator[Backend]:
        async with open_lockstep(spec) as backend:
            observed = _Observed(backend.trainer, observe(spec.model_folder))
            yield replace(backend, trainer=client(TrainerCalls, observed))  # type: ignore[type-abstract]

    result = run(config, out, open_backend=open_observed, console=Console(quiet=True))
    if result.error is not None:
        raise result.error
    if result.summary.ended == "interrupted":
        raise KeyboardInterrupt


class _Observed:
    """A transport that hands every call on to the driver's trainer; with three of them it tells the observer."""

    def __init__(self, trainer: TrainerCalls, observer: Observer) -> None:
        self._trainer, self._observer = trainer, observer
        self._batch: TokenBatch | None = None

    async def call(self, method: str, arguments: tuple[object, ...]) -> object:
        """Carry out a call, and tell what it was."""
        match method, arguments:
            case "publish", ():
                return await self._publish()
            case "put_batch", (TokenBatch() as batch,):
                self._batch = batch
            case "train", (scored,):
                return await self._train(cast("Scored | None", scored))
        return await getattr(self._trainer, method)(*arguments)

    async def _publish(self) -> PublishedVersion:
        published = await self._trainer.publish()
        assert isinstance(published.update, FullWeights), "a trainer of this process sends no patches"
        self._observer.published(published, published.update)
        return published

    async def _train(self, scored: Scored | None) -> UpdateResult:
        assert self._batch is not None, "put_batch comes before train"
        await self._observer.before_train(self._batch, self._engine_scores)
        result = await self._trainer.train(scored)
        self._observer.after_train(self._batch, result)
        return result

    async def _engine_scores(self, num_tokens: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        scores = await self._trainer.score_engine(np.arange(num_tokens))
        return scores.values, scores.logp_mu
