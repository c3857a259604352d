"""The dedicated scorer in a process of its own; versions reach it as files in shared memory, or as patches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import load_file

from oldlogits.backends.worker_process import CarryOut, WorkerProcess
from oldlogits.config import RunConfig
from oldlogits.core.scoring import ScoredSpans, ScoringSpan
from oldlogits.core.weights import FullWeights, PatchWeights, PolicyVersion, WeightUpdate
from oldlogits.engines.shared_memory import share
from oldlogits.train.scorer_model import ScorerModel


class ScorerProcess(WorkerProcess):
    """Starts a scorer process; a `DedicatedScorer`.

    Args:
        config: The run.
        model_folder: A Hugging Face folder.
        probe_ids: See `ScorerModel`.
    """

    def __init__(self, config: RunConfig, model_folder: Path, probe_ids: Sequence[int]) -> None:
        super().__init__("scorer", _build, (config, model_folder, list(probe_ids)))
        self.window = config.proximal.scorer_versions

    async def publish(self, version: PolicyVersion, update: WeightUpdate, probe_logps: NDArray[np.float32]) -> float:
        """Take over a version. Blocks while it writes full weights to shared memory."""
        if isinstance(update, PatchWeights):
            patches = PatchWeights(base=update.base, patches=tuple(map(bytes, update.patches)))
            return cast(float, await self.call("publish", (version, patches, probe_logps)))
        path = share(update.tensors)
        try:
            return cast(float, await self.call("publish", (version, path, probe_logps)))
        finally:
            path.unlink(missing_ok=True)

    async def score_spans(self, pieces: Sequence[ScoringSpan], at: PolicyVersion) -> ScoredSpans:
        """Score pieces."""
        return cast(ScoredSpans, await self.call("score_spans", (pieces, at)))


def _build(config: RunConfig, model_folder: Path, probe_ids: Sequence[int]) -> CarryOut:
    scorer = ScorerModel(config, model_folder, probe_ids)

    def publish(version: PolicyVersion, update: Path | PatchWeights, probe_logps: NDArray[np.float32]) -> float:
        known = update if isinstance(update, PatchWeights) else FullWeights(tensors=load_file(update))
        return scorer.publish(version, known, probe_logps)

    methods = {"publish": publish, "score_spans": scorer.score_spans}

    def carry_out(method: str, arguments: tuple[object, ...]) -> object:
        return methods[method](*arguments)  # type: ignore[operator]

    return carry_out
