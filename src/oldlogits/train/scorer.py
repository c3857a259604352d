"""The part of the trainer that scores: loss tokens of the batch, or of any trajectory, with the weights that are asked for.

The live weights are never switched: the scoring module reads the resident copy of the store, the live weights or the average.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from oldlogits.batch.collate import TokenBatch
from oldlogits.batch.sequences import Sequences, pack
from oldlogits.batch.shard import num_micro_batches
from oldlogits.core.errors import VersionEvictedError
from oldlogits.core.scoring import AverageScores, EngineScores, ScoredSpans, ScoringSpan
from oldlogits.core.weights import PolicyVersion
from oldlogits.models.layout.decoder import layout_of
from oldlogits.models.load import point_at
from oldlogits.models.mixed_kv import MixedForward
from oldlogits.models.scorer import ForwardSizes, score_and_count, score_in_place, score_tokens
from oldlogits.train.consistency import ConsistencyChecks, probe_of
from oldlogits.train.reports import NO_NOISE, PackingNoise, ProbeNoise, ScoringWork
from oldlogits.train.weights.average import Averaging
from oldlogits.train.weights.live import LiveModel
from oldlogits.train.weights.trainer_store import TrainerVersionStore

MEASURED: Final = 16
"""Trajectories of the first batch on which the packing noise is measured: side by side, and each by itself."""


class Scorer:
    """Scores with the live weights, with stored versions, with the average, and as the engine computes.

    There is no store and no average where nobody asks for them. `window` is the largest lag, in versions: what the engine's
    numerics do to the probe tokens is kept for as long. With `same_shape` a batch is scored in the micro-batches that train it.
    """

    def __init__(
        self,
        live: LiveModel,
        store: TrainerVersionStore | None,
        averaging: Averaging | None,
        *,
        probe_ids: Sequence[int],
        sizes: ForwardSizes,
        window: int,
        same_shape: bool = False,
    ) -> None:
        self._live, self._store, self._averaging = live, store, averaging
        self._probe, self._sizes, self._window = probe_of(probe_ids), sizes, window
        self._same_shape = same_shape
        self.engine_noise: dict[PolicyVersion, NDArray[np.float32]] = {}
        """What the engine's numerics add to the log-probs of the probe tokens, in nats, by version."""
        self.probe_noise: ProbeNoise | None = None
        """What an engine that holds the right weights may be off by; None before the first publish."""
        self.checks = ConsistencyChecks(self._score_probe)
        self.work = ScoringWork()
        self.batch: TokenBatch | None = None

    def score(self, tokens: NDArray[np.int64], at: PolicyVersion | None) -> NDArray[np.float32]:
        """Score loss tokens of the batch, by ascending position, with a stored version, or with the live weights (None)."""
        batch = self.current_batch()
        flat = np.flatnonzero(batch.loss_mask)[tokens]
        with self._scoring_at(at):
            if not self._same_shape:
                return self._read(self._live.scoring, batch, flat)
            values, num_read = score_in_place(self._live.scoring, batch, flat, ranks=self._live.ranks, **self._sizes)
            self.work += ScoringWork(read_tokens=num_read)
            return values

    def put(self, batch: TokenBatch) -> None:
        """Take the batch in training; the packing noise is measured on some trajectories of the first one.

        Where each of them has a micro-batch to itself there is one packing; in float32 nothing is rounded off beside it.
        """
        self.batch = batch
        if not math.isnan(self.checks.errors.packing_max_abs_error):
            return
        chosen = np.linspace(0, batch.num_sequences - 1, min(MEASURED, batch.num_sequences)).astype(np.int64)
        flat = np.flatnonzero(batch.loss_mask & np.isin(batch.sequence, chosen))
        layout, budget = layout_of(self._live.scoring), self._sizes["micro_batch_tokens"]
        is_packed = num_micro_batches(batch, flat, budget, layout) < len(np.unique(batch.sequence[flat]))
        is_rounded = self._live.arithmetic.compute != torch.float32
        if not (is_packed or is_rounded):
            self.checks.note_noise(NO_NOISE)
            return
        point_at(self._live.scoring, self._live.weights)
        score = partial(score_tokens, self._live.scoring, batch, flat, ranks=self._live.ranks)
        packed = score(**self._sizes)
        apart: ForwardSizes = {**self._sizes, "micro_batch_tokens": 1}
        alone = score(**apart) if is_packed else packed
        with self._live.arithmetic.in_fp32():
            in_fp32 = score(**self._sizes) if is_rounded else packed
        self.checks.note_noise(PackingNoise.between(packed, alone, in_fp32))

    def put_advantages(self, advantages: NDArray[np.float32]) -> None:
        """Give the batch other advantages: float32 [sequence]."""
        self.batch = replace(self.current_batch(), advantages=advantages)

    def score_mixed(self) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Give OLD of all loss tokens of the batch, over keys and values of the versions that computed them in the engine.

        Returns:
            float32 and int64 [loss token]: the values, and the version that scored each.
        """
        batch = self.current_batch()
        forward = MixedForward(self._live.scoring, batch, **self._sizes, ranks=self._live.ranks)
        self.work += ScoringWork(read_tokens=forward.num_entries)
        for version in batch.versions:
            with self._scoring_at(version):
                forward.score(version)
        return forward.logps, forward.computed_at

    def score_spans(self, spans: Sequence[ScoringSpan], at: PolicyVersion) -> ScoredSpans:
        """Score spans of any trajectories at a stored version, or at the live one."""
        started, before = time.perf_counter(), self.work
        with self._scoring_at(at):
            values = self._read(self._live.scoring, *pack(spans))
        work = self.work - before
        seconds_s = time.perf_counter() - started
        return ScoredSpans(
            values=values,
            seconds_s=seconds_s,
            switch_s=work.switch_s,
            check_s=work.check_s,
            num_read=work.read_tokens,
        )

    def score_average(self, tokens: NDArray[np.int64]) -> AverageScores:
        """Score loss tokens of the batch, by position, under the weights averaged up to the current version."""
        assert self._averaging is not None, "a source that averages makes the trainer keep an average"
        started, batch, average = time.perf_counter(), self.current_batch(), self._averaging.average
        point_at(self._live.scoring, average.weights)
        self.work += ScoringWork(num_checkouts=1, switch_s=time.perf_counter() - started)
        values = self._read(self._live.scoring, batch, np.flatnonzero(batch.loss_mask)[tokens])
        return AverageScores(values=values, age=average.age)

    def score_engine(self, tokens: NDArray[np.int64]) -> EngineScores:
        """Score loss tokens of the batch, by position, with the live weights as rounded to the engine's numerics at publish."""
        assert self._live.version in self.engine_noise, "the live weights are published before they score as the engine"
        batch = self.current_batch()
        flat = np.flatnonzero(batch.loss_mask)[tokens]
        with self._engine_model() as model:
            values = self._read(model, batch, flat)
        return EngineScores(logp_mu=batch.logp_mu[flat], values=values, noise=self.engine_noise)

    def current_batch(self) -> TokenBatch:
        """Give the batch that was handed over last."""
        assert self.batch is not None, "put_batch comes before score and train"
        return self.batch

    def score_published(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Score the probe tokens with the live weights, which are being published, and as the engine will.

        Returns:
            float32 [probe token], twice; the first is what checkouts of this version are compared with from now on.
        """
        version = self._live.version
        point_at(self._live.scoring, self._live.weights)
        probe_logps = self.checks.published[version] = self._score_probe(self._live.scoring)
        if self._live.engine_view is not None:
            self._live.engine_view.hold(self._live.model)
        with self._engine_model() as model:
            engine_probe_logps = self._score_probe(model)
            self.probe_noise = self.probe_noise or self._measure_probe(model, engine_probe_logps)
        self.engine_noise[version] = engine_probe_logps - probe_logps
        self.engine_noise = {v: kept for v, kept in self.engine_noise.items() if v >= version - self._window}
        return probe_logps, engine_probe_logps

    def _measure_probe(self, model: PreTrainedModel, alone: NDArray[np.float32]) -> ProbeNoise:
        """Score the probe beside a longer sequence, and in bf16 arithmetic; `alone` is what it was given by itself."""
        probe, tokens = self._probe
        twice = np.concatenate([probe.token_ids, probe.token_ids])
        n = probe.num_tokens
        ids, starts = np.concatenate([probe.token_ids, twice]), np.array([0, n, 3 * n], np.int64)
        beside = Sequences(token_ids=ids, temperature=np.ones(3 * n, np.float32), starts=starts)
        both = np.concatenate([tokens, np.array([3 * n - 1])])
        packed = score_tokens(model, beside, both, **self._sizes, ranks=self._live.ranks)[:-1]
        with torch.autocast(self._live.ranks.device.type, torch.bfloat16):
            in_bf16 = self._score_probe(model)
        packing_max, bf16_mean = np.abs(packed - alone).max(), np.abs(in_bf16 - alone).mean()
        return ProbeNoise(packing_max=float(packing_max), bf16_mean=float(bf16_mean))

    @contextmanager
    def _engine_model(self) -> Iterator[PreTrainedModel]:
        """Give a model with the live weights in the engine's numerics, which computes in float32 whatever the trainer does."""
        if self._live.engine_view is not None:
            yield self._live.engine_view.model
            return
        point_at(self._live.scoring, self._live.weights)
        with self._live.arithmetic.in_fp32():
            yield self._live.scoring

    def _read(self, model: PreTrainedModel, sequences: Sequences, flat: NDArray[np.int64]) -> NDArray[np.float32]:
        """Score what a source asks for, and count it."""
        values, num_read = score_and_count(model, sequences, flat, **self._sizes, ranks=self._live.ranks)
        self.work += ScoringWork(read_tokens=num_read)
        return values

    def _score_probe(self, model: PreTrainedModel) -> NDArray[np.float32]:
        return score_tokens(model, *self._probe, **self._sizes, ranks=self._live.ranks)

    @contextmanager
    def _scoring_at(self, at: PolicyVersion | None) -> Iterator[None]:
        """Point the scoring module at a stored version, or at the live weights: None, or their version if it is not stored."""
        started, live = time.perf_counter(), self._live
        stored = self._store.store.versions if self._store is not None else ()
        is_live = at is None or (at == live.version and at not in stored)
        with nullcontext(live.weights) if is_live or at is None else self._checkout(at) as weights:
            point_at(live.scoring, weights)
            self.work += ScoringWork(num_checkouts=1, switch_s=time.perf_counter() - started)
            if at is not None:
                started = time.perf_counter()
                try:
                    self.checks.check(live.scoring, f"the checkout of version {at}", at)
                    if not is_live:
                        self.checks.note_checkout()
                finally:
                    self.work += ScoringWork(check_s=time.perf_counter() - started)
            yield

    def _checkout(self, version: PolicyVersion) -> AbstractContextManager[Mapping[str, Tensor]]:
        if self._store is None:
            raise VersionEvictedError(
                f"version {version} is not in the store",
                got=f"version {version}",
                allowed=f"the live version {self._live.version}: the source keeps no others",
                fix="use a source that stores versions, such as snapshot",
            )
        return self._store.store.checkout(version)
