"""A second model that only scores: it holds the newest versions and nothing else."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from oldlogits.batch.sequences import Sequences, pack
from oldlogits.core.scoring import ScoredSpans, ScoringSpan
from oldlogits.core.weights import FullWeights, PolicyVersion, WeightUpdate
from oldlogits.models.device import find_device
from oldlogits.models.forward import round_at_use
from oldlogits.models.head.kernel import use_kernel
from oldlogits.models.layout.decoder import lay_out
from oldlogits.models.load import point_at
from oldlogits.models.routing import follow_engine
from oldlogits.models.scorer import score_and_count, score_tokens
from oldlogits.train.consistency import check_consistency, judged_error, probe_of
from oldlogits.train.spec import ScorerSpec
from oldlogits.train.weights.load import load_policy
from oldlogits.versions import PatchStore


class ScorerModel:
    """Scores spans of trajectories at the versions of its window, with the trainer's own forward pass."""

    def __init__(self, spec: ScorerSpec, model_folder: Path, probe_ids: Sequence[int]) -> None:
        self._spec, self._device = spec, find_device(spec.device)
        self._model = load_policy(spec.model, model_folder, spec.max_context).requires_grad_(False)
        lay_out(self._model, spec.trainer.layout)
        self._model.to(self._device)
        follow_engine(self._model, spec.model.routing)
        round_at_use(self._model, spec.forward_dtype, spec.arithmetic)
        use_kernel(self._model, spec.trainer.head_kernel, self._device)
        self._store = PatchStore(hot=spec.uncompressed)
        self._probe = probe_of(probe_ids)

    def publish(self, version: PolicyVersion, update: WeightUpdate, probe_logps: NDArray[np.float32]) -> float:
        """Take over a version, drop the oldest beyond the window, and return the largest error of the probe tokens in nats."""
        if isinstance(update, FullWeights):
            self._store.publish(version, {name: weight.to(self._device) for name, weight in update.tensors.items()})
        else:
            self._store.take(version, update)
        self._store.retain(version - self._spec.window + 1)
        with self._store.checkout(version) as weights:
            point_at(self._model, weights)
            error = judged_error(np.abs(self._score(*self._probe) - probe_logps))
        check_consistency(error, f"the dedicated scorer's version {version}", "the live weights at its publish")
        return error

    def score_spans(self, spans: Sequence[ScoringSpan], at: PolicyVersion) -> ScoredSpans:
        """Score the tokens of spans at a version of the window."""
        started = time.perf_counter()
        with self._store.checkout(at) as weights:
            point_at(self._model, weights)
            switched = time.perf_counter()
            values, num_read = score_and_count(self._model, *pack(spans), **self._spec.sizes)
        seconds_s = time.perf_counter() - started
        return ScoredSpans(values=values, seconds_s=seconds_s, switch_s=switched - started, check_s=0.0, num_read=num_read)

    def _score(self, sequences: Sequences, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        return score_tokens(self._model, sequences, tokens, **self._spec.sizes)
