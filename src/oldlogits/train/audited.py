"""What exact log-probs say of an update: which tokens it has decided otherwise than OLD, and how far log-probs were off.

AuditScores (OLD, before the steps) + the table of the update -> decisions, by `Judge`; squared differences by lag
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from oldlogits.core.loss import Loss, LossInputs, Objective
from oldlogits.core.policies import MU, OLD, THETA, Policy, Variant
from oldlogits.core.scoring import AuditScores
from oldlogits.objective import DecisionSums, decision_sums, exact_variant
from oldlogits.train.loss_tokens import Column

_COLUMNS: Final = ("logp_mu", "logp_theta", "logp_proximal", "advantage", "loss_mask", "active_mask", "staleness")


@dataclass(frozen=True, slots=True, kw_only=True)
class LagSums:
    """Squared differences of log-probs, added up by lag: int64 and float64 [lag], tokens and nats^2."""

    counts: NDArray[np.int64]
    squares: NDArray[np.float64]

    @classmethod
    def of(cls, differences: NDArray[np.float32], lags: NDArray[np.int64], num_lags: int) -> LagSums:
        """Add up the finite ones of lag 0 .. num_lags - 1."""
        kept = np.isfinite(differences) & (lags < num_lags)
        squares = np.zeros(num_lags)
        np.add.at(squares, lags[kept], differences[kept].astype(np.float64) ** 2)
        return cls(counts=np.bincount(lags[kept], minlength=num_lags), squares=squares)

    def roots(self) -> dict[str, float]:
        """Root mean squares: of all tokens by the key "", of those of lag 2 by "@lag2"; a lag without tokens has none."""
        rows = zip(self.squares.tolist(), self.counts.tolist(), strict=True)
        found = {f"@lag{lag}": (square / num) ** 0.5 for lag, (square, num) in enumerate(rows) if num}
        num_tokens = int(self.counts.sum())
        return found | ({"": (float(self.squares.sum()) / num_tokens) ** 0.5} if num_tokens else {})


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditedUpdate:
    """What the audit of a batch says of the average that served it.

    Args:
        live: ``log pi_t - log OLD``, pi_t the weights before the first step: how far log-probs have moved over each lag.
        average: ``log X - log OLD``, X the proximal policy.
        errors: The errors of an `average_reset` event; empty where the live weights have not scored the batch.
    """

    live: LagSums
    average: LagSums
    errors: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Judge:
    """Compares the active set of an update with that of OLD under the same THETA.

    Args:
        loss: The run's loss, which says which tokens are active.
        objective: The knobs of the loss, the run's variant among them.
        max_staleness: The staleness up to which decisions are told apart.
    """

    loss: Loss
    objective: Objective
    max_staleness: int

    def at_band(self, measured: float | None) -> Judge:
        """The same under the band of one update; None: the recipe's own."""
        return self if measured is None else replace(self, objective=replace(self.objective, band=measured))

    def sums(self, scores: AuditScores, table: Mapping[str, Column]) -> tuple[DecisionSums, DecisionSums | None]:
        """Judge an update by its table.

        Returns:
            The sums of the proximal policy, and those of the live weights in its place, None where they have not scored the
            batch; both over the same tokens, under the same THETA and against the same OLD.
        """
        column = {name: torch.from_numpy(np.ascontiguousarray(table[name])) for name in _COLUMNS}
        column["sequence"] = torch.from_numpy(np.unique(table["trajectory"], return_inverse=True)[1])
        old, variant = torch.from_numpy(scores.old), self.objective.variant
        exact_active = self._active(exact_variant(variant), OLD, old, column)
        used = self._sums(column["logp_proximal"], old, column["active_mask"], exact_active, column)
        if scores.live is None:
            return used, None
        live = torch.from_numpy(scores.live)
        live_active = self._active(variant, variant.proximal, live, column)
        return used, self._sums(live, old, live_active, exact_active, column)

    def errors(self, scores: AuditScores, table: Mapping[str, Column]) -> dict[str, float]:
        """Give the errors of an `average_reset` event; none where the live weights have not scored the batch.

        Before: with the average as it was used. After: with the live weights in its place, as they were before the first
        optimizer step, those of `AverageReset.kept_live`.
        """
        before, after = self.sums(scores, table)
        return {} if after is None else decision_errors("before", before) | decision_errors("after", after)

    def audited(self, scores: AuditScores, table: Mapping[str, Column], num_lags: int) -> AuditedUpdate:
        """Tell what the audit says of the average; lags from `num_lags` on are left out.

        Where the live weights have not scored the batch, THETA of the first optimizer step is what they give its tokens.
        """
        lags, step = np.asarray(table["staleness"], np.int64), np.asarray(table["step"], np.int64)
        theta, proximal = (np.asarray(table[name], np.float32) for name in ("logp_theta", "logp_proximal"))
        first = step == 0 if scores.live is None else np.ones(len(lags), np.bool_)
        live = theta if scores.live is None else scores.live
        return AuditedUpdate(
            live=LagSums.of((live - scores.old)[first], lags[first], num_lags),
            average=LagSums.of(proximal - scores.old, lags, num_lags),
            errors=self.errors(scores, table) if scores.live is not None else {},
        )

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


def decision_errors(when: str, sums: DecisionSums) -> dict[str, float]:
    """Tokens decided otherwise than by OLD / loss tokens; and ``sum |R A|`` over them / over those active under OLD, or NaN."""
    wrong, weight = sums.wrongly_kept + sums.wrongly_masked, sums.weight_wrongly_kept + sums.weight_wrongly_masked
    by_count, by_weight = wrong.sum() / sums.num_tokens.sum(), weight.sum() / sums.weight.sum()
    return {f"error_{when}": float(by_count), f"weight_error_{when}": float(by_weight)}
