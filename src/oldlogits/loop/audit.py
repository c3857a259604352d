"""The exact audit: exact log-probs beside those of the source in use, on a share of the batches.

    put_batch -> source.acquire -> audit.score: OLD from the store -> train -> audit.conclude: two active sets, one event

The audit only scores, with stored versions and the live one; nothing that training reads depends on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from oldlogits.config.schema import RunConfig
from oldlogits.core.loss import LOSSES, Loss, LossInputs, Objective
from oldlogits.core.policies import MU, OLD, THETA, Policy, Variant
from oldlogits.core.scoring import BatchTokens, ScoringHandle
from oldlogits.core.source import SourceHandles
from oldlogits.core.weights import PolicyVersion
from oldlogits.objective import DecisionSums, decision_sums, exact_variant
from oldlogits.record.bus import EventSink
from oldlogits.record.events import Audited, AverageWasReset
from oldlogits.sources import check_scored
from oldlogits.sources.snapshot import SnapshotSource
from oldlogits.train.spec import objective_of
from oldlogits.train.step import UpdateResult

_COLUMNS: Final = ("logp_mu", "logp_theta", "logp_proximal", "advantage", "loss_mask", "active_mask", "staleness")


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditScores:
    """Log-probs of the loss tokens of one batch, before the first optimizer step on it.

    Args:
        old: float32 [loss token]; those of OLD.
        live: float32 [loss token]; those of the live weights, where an average may be reset to them.
    """

    old: NDArray[np.float32]
    live: NDArray[np.float32] | None


@dataclass(slots=True, kw_only=True)
class ExactAudit:
    """Compares a proximal policy's decisions with those of OLD; emits one `audit` event per audited batch.

    The trainer's store keeps versions as long as tokens of theirs are in flight.

    Args:
        share: The share of batches that are audited.
        loss: The run's loss, which says which tokens are active.
        objective: The knobs of the loss, the run's variant among them.
        watches_resets: Whether an average may be reset to the live weights.
        max_staleness: The staleness up to which decisions are told apart.
    """

    share: float
    loss: Loss
    objective: Objective
    watches_resets: bool
    max_staleness: int
    trainer: ScoringHandle
    events: EventSink
    clock: Callable[[], float]
    _seconds_s: float = field(default=0.0, init=False)

    @classmethod
    def of(cls, config: RunConfig, trainer: ScoringHandle, events: EventSink, clock: Callable[[], float]) -> ExactAudit:
        """Build the audit of a recipe."""
        objective = objective_of(config.objective, config.correction, variant=config.variant, band=config.band)
        return cls(
            share=config.audit.share,
            loss=LOSSES.find(config.objective.loss),
            objective=objective,
            watches_resets=config.proximal.reset != "none" and bool(objective.variant.needs),
            max_staleness=config.max_staleness,
            trainer=trainer,
            events=events,
            clock=clock,
        )

    def is_due(self, version: PolicyVersion) -> bool:
        """Whether the batch that enters training at `version` is audited: evenly spaced ones, of the recipe's share."""
        return math.floor((version + 1) * self.share) > math.floor(version * self.share)

    async def score(self, batch: BatchTokens) -> AuditScores | None:
        """Score the batch in training, before its first optimizer step; None for a batch that is not audited."""
        if not self.is_due(batch.trainer_version):
            return None
        started = self.clock()
        scored = await SnapshotSource(SourceHandles(trainer=self.trainer)).acquire(replace(batch, from_training=None))
        check_scored(scored, batch.versions)
        live = await self.trainer.score(np.arange(len(batch.versions)), None) if self.watches_resets else None
        self._seconds_s = self.clock() - started
        return AuditScores(old=scored.values, live=live)

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
        column = {name: torch.from_numpy(np.ascontiguousarray(result.table[name])) for name in _COLUMNS}
        column["sequence"] = torch.from_numpy(np.unique(result.table["trajectory"], return_inverse=True)[1])
        old, proximal = torch.from_numpy(scores.old), self.objective.variant.proximal
        exact_active = self._active(exact_variant(self.objective.variant), OLD, old, column)
        sums = self._sums(column["logp_proximal"], old, column["active_mask"], exact_active, column)
        by_staleness = {name: values.tolist() for name, values in asdict(sums).items()}
        self.events.emit(Audited(version=version, policy=proximal.value, seconds_s=self._seconds_s, **by_staleness))
        if result.average_reset is None or scores.live is None:
            return {}
        live = torch.from_numpy(scores.live)
        live_active = self._active(self.objective.variant, proximal, live, column)
        after = self._sums(live, old, live_active, exact_active, column)
        return _errors("before", sums) | _errors("after", after)

    def _active(self, row: Variant, policy: Policy, values: Tensor, column: Mapping[str, Tensor]) -> Tensor:
        """The tokens that are active under a row whose proximal policy has these log-probs."""
        tokens = LossInputs(
            logp={MU: column["logp_mu"], policy: values, THETA: column["logp_theta"]},
            advantages=column["advantage"],
            loss_mask=column["loss_mask"],
            staleness=column["staleness"].long(),
            sequence_index=column["sequence"],
            num_sequences=int(column["sequence"].max()) + 1,
        )
        return column["loss_mask"] & self.loss(tokens, replace(self.objective, variant=row)).active_mask

    def _sums(
        self, proximal: Tensor, old: Tensor, active: Tensor, exact_active: Tensor, column: Mapping[str, Tensor]
    ) -> DecisionSums:
        return decision_sums(
            proximal,
            old,
            column["logp_theta"] - column["logp_mu"],
            column["advantage"],
            active_mask=active,
            exact_active_mask=exact_active,
            loss_mask=column["loss_mask"],
            staleness=column["staleness"].long(),
            num_staleness=self.max_staleness + 1,
        )


def _errors(when: str, sums: DecisionSums) -> dict[str, float]:
    """Tokens decided otherwise than by OLD / loss tokens; and ``sum |R A|`` over them / over those active under OLD, or NaN."""
    wrong, weight = sums.wrongly_kept + sums.wrongly_masked, sums.weight_wrongly_kept + sums.weight_wrongly_masked
    by_count, by_weight = wrong.sum() / sums.num_tokens.sum(), weight.sum() / sums.weight.sum()
    return {f"error_{when}": float(by_count), f"weight_error_{when}": float(by_weight)}
