"""The referee: exact log-probs beside those of the route in use, on a share of the batches.

    put_batch -> source.acquire -> referee.exact: OLD from the store -> train -> referee.judge: two active sets, one event

The referee only scores stored versions; nothing that training reads depends on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Final

import numpy as np
import torch

from oldlogits.config import RunConfig
from oldlogits.core.policies import MU, OLD, THETA, find_variant
from oldlogits.core.protocols import BatchTokens, PolicyVersion, Scored, ScoringHandle
from oldlogits.objective import DecisionSums, decision_sums, exact_variant, split_ratio, surrogate
from oldlogits.record.events import EventKind, EventSink
from oldlogits.sources import SnapshotSource, check_scored
from oldlogits.train.step import UpdateResult

_COLUMNS: Final = ("logp_mu", "logp_theta", "logp_stand_in", "advantage", "loss_mask", "active_mask", "staleness")


class Referee:
    """Compares a route's decisions with those of OLD.

    Args:
        config: The run.
        trainer: Holds the versions; its store keeps them as long as tokens of theirs are in flight.
        events: Takes one `referee` event per refereed batch.
        clock: Seconds since some fixed point.
    """

    def __init__(self, config: RunConfig, trainer: ScoringHandle, events: EventSink, clock: Callable[[], float]) -> None:
        self._config, self._events, self._clock = config, events, clock
        self._source = SnapshotSource(trainer)
        self._seconds_s = 0.0

    def is_due(self, version: PolicyVersion) -> bool:
        """Whether the batch that enters training at `version` is refereed: evenly spaced ones, of the recipe's share."""
        share = self._config.referee.share
        return math.floor((version + 1) * share) > math.floor(version * share)

    async def exact(self, batch: BatchTokens) -> Scored | None:
        """OLD of the batch in training, before its first optimizer step; None for a batch that is not refereed."""
        if not self.is_due(batch.trainer_version):
            return None
        started = self._clock()
        scored = await self._source.acquire(batch)
        check_scored(scored, batch.versions)
        self._seconds_s = self._clock() - started
        return scored

    def judge(self, exact: Scored | None, result: UpdateResult, *, version: PolicyVersion) -> None:
        """Write down how the update's active set differs from that of OLD under the same THETA.

        Args:
            exact: What `exact` returned.
            result: Of the update.
            version: The version that the update made.
        """
        if exact is None:
            return
        sums = self._sums(exact, result)
        self._events.emit(
            EventKind.REFEREE,
            version=version,
            policy=find_variant(self._config.variant).stand_in.value,
            seconds_s=self._seconds_s,
            **{name: by_staleness.tolist() for name, by_staleness in asdict(sums).items()},
        )

    def _sums(self, exact: Scored, result: UpdateResult) -> DecisionSums:
        objective = self._config.objective
        column = {name: torch.from_numpy(np.ascontiguousarray(result.table[name])) for name in _COLUMNS}
        old = torch.from_numpy(exact.values)
        logp = {MU: column["logp_mu"], OLD: old, THETA: column["logp_theta"]}
        active = surrogate(
            split_ratio(exact_variant(find_variant(self._config.variant)), logp),
            column["advantage"],
            column["loss_mask"],
            band=self._config.band,
            eps_low=objective.eps_low,
            eps_high=objective.eps_high,
            dual_clip=None if math.isinf(objective.dual_clip) else objective.dual_clip,
            discrepancy=objective.discrepancy,
        ).active_mask
        return decision_sums(
            column["logp_stand_in"],
            old,
            column["logp_theta"] - column["logp_mu"],
            column["advantage"],
            active_mask=column["active_mask"],
            exact_active_mask=active,
            loss_mask=column["loss_mask"],
            staleness=column["staleness"].long(),
            num_staleness=self._config.max_staleness + 1,
        )
