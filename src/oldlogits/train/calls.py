"""What the loop and the sources may ask of a trainer, wherever it runs: its asynchronous face."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from oldlogits.batch.collate import TokenBatch
from oldlogits.core.scoring import AuditScores, Scored, ScoringHandle
from oldlogits.core.weights import FullWeights, PolicyVersion
from oldlogits.train.reports import PublishedVersion, TrainerState
from oldlogits.train.step import UpdateResult


class TrainerCalls(ScoringHandle, Protocol):
    """The calls of a trainer; `Trainer` and its `Scorer` carry them out, one at a time and in their order.

    A client of this Protocol is `rpc.client.client(TrainerCalls, transport)`.
    """

    async def publish(self) -> PublishedVersion:
        """Store the live weights as the current version, and score the probe tokens with them."""

    async def full_weights(self) -> FullWeights:
        """Give the live forward weights, valid until the next step."""

    async def put_batch(self, batch: TokenBatch) -> None:
        """Take the batch that the next calls of `score` and `train` are about."""

    async def score_reference(self) -> NDArray[np.float32]:
        """Score the loss tokens of the batch at the version that is the reference, for `train`: float32 [loss token].

        Raises:
            VersionEvictedError: The version is no longer held.
        """

    async def put_advantages(self, advantages: NDArray[np.float32]) -> None:
        """Give the batch other advantages: float32 [sequence]."""

    async def note_audit(self, scores: AuditScores) -> None:
        """Take exact log-probs of the batch in training, by which the average is formed that takes in the next version."""

    async def train(self, scored: Scored | None) -> UpdateResult:
        """Train the batch; the trainer's version rises by one.

        Raises:
            NonFiniteError: A loss or gradient is not finite.
            ExactnessError: OLD differs from THETA on lag-0 tokens before the first step.
        """

    async def retain(self, oldest_needed: PolicyVersion) -> None:
        """Drop stored versions that no token in flight needs."""

    async def begin_checkpoint(self, folder: Path, parts: Mapping[str, bytes]) -> None:
        """Copy what a checkpoint holds, and write it beside the calls that follow, with `parts`, other files by their names."""

    async def end_checkpoint(self, wait: bool) -> bool:
        """Tell whether the checkpoint that was begun is whole and on the disk; with `wait` it is, when this returns.

        Raises:
            RunWriteError: It cannot be written.
        """

    async def save_batch(self, folder: Path) -> Path:
        """Write the batch in training, for a post-mortem."""

    async def restore(self, folder: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            RunFolderError: The checkpoint is incomplete.
        """

    async def state(self) -> TrainerState:
        """Tell the version, the largest errors of the checks, and what the trainer has worked."""
