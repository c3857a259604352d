"""The exact audit: exact log-probs beside those of the source in use, on a share of the batches.

    put_batch -> source.acquire -> audit.score: OLD from the store -> train -> audit.conclude: two active sets, one event
                                               -> trainer.note_audit, where proximal.decay or proximal.reset = "audited"

The audit only scores, with stored versions and the live one; nothing else that training reads depends on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace

import numpy as np

from oldlogits.config.schema import RunConfig
from oldlogits.core.loss import LOSSES
from oldlogits.core.scoring import AuditScores, BatchTokens
from oldlogits.core.source import SourceHandles
from oldlogits.core.weights import PolicyVersion
from oldlogits.record.bus import EventSink
from oldlogits.record.events import Audited, AverageWasReset
from oldlogits.sources import check_scored
from oldlogits.sources.snapshot import SnapshotSource
from oldlogits.train.audited import Judge, decision_errors
from oldlogits.train.calls import TrainerCalls
from oldlogits.train.spec import objective_of
from oldlogits.train.step import UpdateResult


@dataclass(slots=True, kw_only=True)
class ExactAudit:
    """Compares a proximal policy's decisions with those of OLD; emits one `audit` event per audited batch.

    The trainer's store keeps versions as long as tokens of theirs are in flight.

    Args:
        share: The share of batches that are audited.
        decisions: Compares active sets.
        watches_resets: Whether an average may be reset to the live weights.
        informs_average: Whether the trainer's average follows what is found.
    """

    share: float
    decisions: Judge
    watches_resets: bool
    informs_average: bool
    trainer: TrainerCalls
    events: EventSink
    clock: Callable[[], float]
    _seconds_s: float = field(default=0.0, init=False)

    @classmethod
    def of(cls, config: RunConfig, trainer: TrainerCalls, events: EventSink, clock: Callable[[], float]) -> ExactAudit:
        """Build the audit of a recipe."""
        objective = objective_of(config.objective, config.correction, variant=config.variant, band=config.fixed_band)
        loss = LOSSES.find(config.objective.loss)
        return cls(
            share=config.audit.share,
            decisions=Judge(loss=loss, objective=objective, max_staleness=config.max_staleness),
            watches_resets=config.proximal.reset != "none" and bool(objective.variant.needs),
            informs_average=config.proximal.follows_audit,
            trainer=trainer,
            events=events,
            clock=clock,
        )

    def is_due(self, version: PolicyVersion) -> bool:
        """Whether the batch that enters training at `version` is audited: evenly spaced ones, of the recipe's share."""
        return math.floor((version + 1) * self.share) > math.floor(version * self.share)

    async def score(self, batch: BatchTokens) -> AuditScores | None:
        """Score the batch in training, before its first optimizer step, and tell the trainer where its average follows that.

        Returns:
            None for a batch that is not audited.
        """
        if not self.is_due(batch.trainer_version):
            return None
        started = self.clock()
        scored = await SnapshotSource(SourceHandles(trainer=self.trainer)).acquire(replace(batch, from_training=None))
        check_scored(scored, batch.versions)
        live = await self.trainer.score(np.arange(len(batch.versions)), None) if self.watches_resets else None
        found = AuditScores(old=scored.values, live=live)
        if self.informs_average:
            await self.trainer.note_audit(found)
        self._seconds_s = self.clock() - started
        return found

    def conclude(self, scores: AuditScores | None, result: UpdateResult, *, version: PolicyVersion) -> None:
        """Tell what the audit found, and of a reset of the average after the update, with what it is worth."""
        errors = self.judge(scores, result, version=version)
        if result.average_reset is not None:
            told = asdict(result.average_reset) | errors
            self.events.emit(AverageWasReset(version=version, **told))

    def judge(self, scores: AuditScores | None, result: UpdateResult, *, version: PolicyVersion) -> dict[str, float]:
        """Write down how the update's active set differs from that of OLD under the same THETA.

        Returns:
            The errors of an `average_reset` event, what the reset after the update is worth; empty without a reset, or where
            the batch is not audited. All are over the same tokens, under the same THETA and against the same OLD. Before: with
            the average as it was used. After: with the live weights in its place, as they were before the first optimizer
            step, those of `AverageReset.kept_live`. The reset itself comes after the steps: what later batches make of it is in
            their own `audit` events.
        """
        if scores is None:
            return {}
        decisions = self.decisions.at_band(result.metrics.get("mask/band"))
        sums, after = decisions.sums(scores, result.table)
        by_staleness = {name: values.tolist() for name, values in asdict(sums).items()}
        policy = self.decisions.objective.variant.proximal.value
        self.events.emit(Audited(version=version, policy=policy, seconds_s=self._seconds_s, **by_staleness))
        if result.average_reset is None or after is None:
            return {}
        return decision_errors("before", sums) | decision_errors("after", after)
