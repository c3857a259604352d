"""A trace: the log-probs that every proximal policy gives the same tokens, recorded beside a run that trains with one of them.

    publish -> copy of the version, and each average of the panel takes it in        (every update; audited batches tell it OLD)
    train:     OLD, ASYNC, averages, AGED, RESCORE score the batch -> the driver's own steps -> rows   (the last updates)

The panel has weights and a scoring module of its own; nothing that the driver reads depends on it. Bands, clips and the
proximal policies that are formed at loss time need no further run: they are computed from the table (study/decision.py).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from torch import Tensor

from oldlogits.batch.collate import TokenBatch
from oldlogits.config.objective.sections import ProximalConfig
from oldlogits.config.schema import RecordConfig, RunConfig
from oldlogits.core.errors import ConfigError
from oldlogits.core.weights import FullWeights
from oldlogits.models.layout.decoder import lay_out
from oldlogits.models.load import load_model, point_at
from oldlogits.models.scorer import ForwardSizes, score_tokens
from oldlogits.sources.aged import aged_logp
from oldlogits.train.audited import AuditedUpdate, LagSums
from oldlogits.train.reports import PublishedVersion
from oldlogits.train.step import UpdateResult
from oldlogits.train.weights.average import Averaging
from studies.old_logits.measure.driver import EngineScores, drive
from studies.old_logits.measure.full_copies import FullCopyStore

Decay = Literal["max-lag", "mean-lag", "auto", "audited"]

AVERAGES: Final[Mapping[str, Decay]] = {"ewma": "max-lag", "ewma-mean-lag": "mean-lag", "ewma-auto": "auto"}
"""The averages of the panel by the proximal policy that they are, and how each chooses its beta; none is ever reset."""

_KEY: Final = b"oldlogits.trace"


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceInfo:
    """What a trace is of; in the table's metadata.

    Args:
        variant: Of the run that made it.
        source: Of that run.
        window: The largest lag, in versions.
        lag: How lags are spread over the window.
        engine: The engine's numerics.
        seed: Of the run.
        beta: By average of the panel: the mean, over the scored updates, of the beta of the newest version in it.
    """

    variant: str
    source: str
    window: int
    lag: str
    engine: str
    seed: int
    beta: Mapping[str, float]

    @classmethod
    def of(cls, table: pa.Table) -> TraceInfo:
        """Read it from a table."""
        return cls(**json.loads(table.schema.metadata[_KEY]))

    def on(self, table: pa.Table) -> pa.Table:
        """The table with this in its metadata."""
        return table.replace_schema_metadata({_KEY: json.dumps(asdict(self))})


def record_trace(
    config: RunConfig, out: Path, num_scored: int, *, averages: Mapping[str, Decay] = AVERAGES, audit_share: float = 0.0
) -> pa.Table:
    """Run a lockstep recipe, and record the last `num_scored` updates.

    The run is that of the recipe bit for bit; of the tables, transcripts and checkpoints only the last checkpoint is
    written.

    Args:
        config: A checked recipe of runtime "lockstep".
        out: The run folder; absent or empty.
        num_scored: Updates to record, >= 1.
        averages: The averages of the panel, "ewma" among them.
        audit_share: The share of all batches, evenly spaced, of which those of decay "audited" are told OLD.

    Returns:
        One row per loss token, with a `TraceInfo` in the metadata: ``update`` (the trainer's version before its steps),
        ``staleness``, ``step`` (the optimizer step that trained it), ``advantage``, and float32 log-probs: ``logp_mu``,
        ``logp_old``, ``logp_async``, ``logp_theta`` (in the forward pass that trained it), ``logp_ewma``,
        the other averages by their names, ``logp_aged`` (from the average of decay "max-lag"), ``logp_rescore``,
        and ``logp_proximal``, which the run trained with.

    Raises:
        ConfigError: Its forward weights are not fp32.
        OldLogitsError: What ended the run.
        KeyboardInterrupt: It was interrupted.
    """
    if config.model.forward_dtype != "fp32":
        raise ConfigError(
            "the recorder of traces keeps fp32 versions, and averages these in place of masters",
            got=f"model.forward_dtype = '{config.model.forward_dtype}'",
            allowed="model.forward_dtype = 'fp32'",
            fix="remove model.forward_dtype from the recipe of the traces",
        )
    config = replace(config, record=RecordConfig(tokens_every=0, transcripts_every=0, checkpoint_every=0))
    panels: list[Panel] = []

    def observe(model_folder: Path) -> Panel:
        panels.append(Panel(config, model_folder, num_scored, averages, audit_share))
        return panels[0]

    drive(config, out, observe)
    return panels[0].table()


class Panel:
    """Scores what the driver trains, under OLD and every proximal policy, with weights and a scoring module of its own.

    Args:
        config: The run.
        model_folder: The model folder that the driver starts from.
        num_scored: How many of the last updates are recorded.
        averages: How each of its averages chooses its beta.
        audit_share: The share of the batches of which OLD is told to those of decay "audited".
    """

    def __init__(
        self,
        config: RunConfig,
        model_folder: Path,
        num_scored: int,
        averages: Mapping[str, Decay] = AVERAGES,
        audit_share: float = 0.0,
    ) -> None:
        self._config, self._first = config, config.num_updates - num_scored
        self._decays, self._audit_share = averages, audit_share
        self._module = load_model(model_folder).requires_grad_(False)
        lay_out(self._module, config.trainer.layout)
        self._store = FullCopyStore()
        self._averages: dict[str, Averaging] = {}
        self._betas: dict[str, float] = {}
        self._scored_betas: list[dict[str, float]] = []
        self._last: UpdateResult | None = None
        self._audit: AuditedUpdate | None = None
        self._audit_old: NDArray[np.float32] | None = None
        self._scores: dict[str, NDArray[np.float32]] = {}
        self._version = 0
        self._tables: list[pa.Table] = []

    def table(self) -> pa.Table:
        """What was recorded."""
        config = self._config
        info = TraceInfo(
            variant=config.variant,
            source=config.proximal.source,
            window=config.window,
            lag=config.lockstep.lag,
            engine=config.engine.precision,
            seed=config.seed,
            beta={name: float(np.mean([betas[name] for betas in self._scored_betas])) for name in self._decays},
        )
        return info.on(pa.concat_tables(self._tables))

    def published(self, published: PublishedVersion, weights: FullWeights) -> None:
        """Take the version in."""
        self._version = published.version
        tensors = weights.tensors
        self._store.publish(published.version, tensors)
        self._store.retain(published.version - self._config.window)
        for name, decay in self._decays.items():
            if name not in self._averages:
                proximal = ProximalConfig(source="ewma", decay=decay)
                self._averages[name] = Averaging(proximal, self._config.window, tensors)
                self._betas[name] = 0.0
            elif self._last is not None:
                counts, metrics = self._last.staleness_counts, self._last.metrics
                audit = self._audit if decay == "audited" else None
                found, _ = self._averages[name].take_in(tensors, published.version, metrics, counts, audit)
                self._betas[name] = found["average/beta"]
            self._averages[name].note_probe(published.version, published.probe_logps)

    async def before_train(self, batch: TokenBatch, engine_scores: EngineScores) -> None:
        """Score the batch, if it is one of the last."""
        self._scores = await self._score(batch, engine_scores) if self._version >= self._first else {}
        is_due = math.floor((self._version + 1) * self._audit_share) > math.floor(self._version * self._audit_share)
        self._audit_old = (self._scores.get("old") if self._scores else self._old(batch)) if is_due else None

    def after_train(self, batch: TokenBatch, result: UpdateResult) -> None:
        """Keep the rows of a batch that was scored."""
        self._last, self._audit = result, self._audited(result)
        if self._scores:
            self._scored_betas.append(dict(self._betas))
            self._tables.append(_rows(batch, result, self._version, self._scores))

    def _audited(self, result: UpdateResult) -> AuditedUpdate | None:
        """What an audit of the batch says of its log-probs: THETA of the first optimizer step is what live weights give."""
        if self._audit_old is None:
            return None
        first = np.asarray(result.table["step"]) == 0
        moved = np.asarray(result.table["logp_theta"], np.float32) - self._audit_old
        lags, num_lags = np.asarray(result.table["staleness"], np.int64), self._config.window + 1
        nothing = LagSums.of(moved[:0], lags[:0], num_lags)
        return AuditedUpdate(live=LagSums.of(moved[first], lags[first], num_lags), average=nothing, errors={})

    def _old(self, batch: TokenBatch) -> NDArray[np.float32]:
        """Score the batch's loss tokens at the versions that sampled them."""
        flat = np.flatnonzero(batch.loss_mask)
        versions, old = batch.version[flat], np.empty(len(flat), np.float32)
        for version in batch.versions:
            with self._store.checkout(version) as weights:
                old[versions == version] = self._score_with(weights, batch, flat[versions == version])
        return old

    async def _score(self, batch: TokenBatch, engine_scores: EngineScores) -> dict[str, NDArray[np.float32]]:
        """Log-probs of the batch's loss tokens under OLD and every proximal policy that needs weights."""
        flat = np.flatnonzero(batch.loss_mask)
        versions, old = batch.version[flat], self._old(batch)
        with self._store.checkout(self._version) as weights:
            live = self._score_with(weights, batch, flat)
        panel = {"old": old, "async": live}
        for name, averaging in self._averages.items():
            panel[name] = self._score_with(averaging.average.weights, batch, flat)
        age = self._averages["ewma"].average.age
        panel["aged"] = aged_logp(live, panel["ewma"], self._version - versions, age)
        engine, logp_mu = await engine_scores(len(flat))
        panel["rescore"] = logp_mu + (live - engine)
        return panel

    def _score_with(self, weights: Mapping[str, Tensor], batch: TokenBatch, flat: NDArray[np.int64]) -> NDArray[np.float32]:
        t = self._config.trainer
        point_at(self._module, weights)
        sizes: ForwardSizes = {"micro_batch_tokens": t.micro_batch_tokens, "head_chunk_tokens": t.head_chunk_tokens}
        return score_tokens(self._module, batch, flat, **sizes)


def _rows(batch: TokenBatch, result: UpdateResult, version: int, panel: Mapping[str, NDArray[np.float32]]) -> pa.Table:
    flat = np.flatnonzero(batch.loss_mask)
    kept = ("staleness", "advantage", "logp_mu", "logp_theta", "logp_proximal")
    return pa.table(
        {
            "update": np.full(len(flat), version, np.int32),
            "step": batch.step[batch.sequence[flat]].astype(np.int32),
            **{name: np.ascontiguousarray(result.table[name]) for name in kept},
            **{f"logp_{name}": values for name, values in panel.items()},
        }
    )
