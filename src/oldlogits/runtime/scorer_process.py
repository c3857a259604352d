"""The dedicated scorer in a process of its own; versions reach it as safetensors files in shared memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from oldlogits.config import RunConfig
from oldlogits.core.protocols import Piece, PolicyVersion, ScoredPieces
from oldlogits.rollout.shared import share
from oldlogits.runtime.worker_process import CarryOut, WorkerProcess
from oldlogits.train.window_scorer import WindowScorer


class ScorerProcess(WorkerProcess):
    """Starts a scorer process; a `DedicatedScorer`.

    Args:
        config: The run.
        model_folder: A Hugging Face folder.
        probe_ids: See `WindowScorer`.
    """

    def __init__(self, config: RunConfig, model_folder: Path, probe_ids: Sequence[int]) -> None:
        super().__init__("scorer", _build, (config, model_folder, list(probe_ids)))
        self.window = config.source.window

    async def publish(self, version: PolicyVersion, weights: Mapping[str, Tensor], probe_logps: NDArray[np.float32]) -> float:
        """Take over a version. Blocks while it writes the weights to shared memory."""
        path = share(weights)
        try:
            return cast(float, await self.call("publish", (version, path, probe_logps)))
        finally:
            path.unlink(missing_ok=True)

    async def score_pieces(self, pieces: Sequence[Piece], at: PolicyVersion) -> ScoredPieces:
        """Score pieces."""
        return cast(ScoredPieces, await self.call("score_pieces", (pieces, at)))


def _build(config: RunConfig, model_folder: Path, probe_ids: Sequence[int]) -> CarryOut:
    scorer = WindowScorer(config, model_folder, probe_ids)

    def publish(version: PolicyVersion, path: Path, probe_logps: NDArray[np.float32]) -> float:
        return scorer.publish(version, load_file(path), probe_logps)

    methods = {"publish": publish, "score_pieces": scorer.score_pieces}

    def carry_out(method: str, arguments: tuple[object, ...]) -> object:
        return methods[method](*arguments)  # type: ignore[operator]

    return carry_out
