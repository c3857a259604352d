"""What an update reads of a recipe, as values."""

from __future__ import annotations

import math
from dataclasses import dataclass

from oldlogits.config.schema import ObjectiveConfig
from oldlogits.core.loss import LOSSES, Loss, Objective
from oldlogits.core.policies import find_variant
from oldlogits.models.scorer import ForwardSizes
from oldlogits.objective import Aggregation
from oldlogits.train.spec import TrainerSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateConfig:
    """The objective of a run, and how a batch is split into optimizer steps and micro-batches.

    Args:
        variant_name: The variant's name; errors show it.
        loss: The loss that the recipe names.
        objective: The knobs of the loss.
        aggregation: The denominator of the loss.
        aggregation_tokens: The divisor of the aggregation "constant".
        weight_mu: The weight on MU of an interpolated proximal policy; None: that of A-3PO's schedule, by staleness.
        num_steps: Optimizer steps that share a batch.
        max_grad_norm: The largest norm of a gradient.
        sizes: The sizes of micro-batches and of the chunks of the output head.
        max_staleness: Metrics tell tokens apart by their staleness up to this one.
    """

    variant_name: str
    loss: Loss
    objective: Objective
    aggregation: Aggregation
    aggregation_tokens: float
    weight_mu: float | None
    num_steps: int
    max_grad_norm: float
    sizes: ForwardSizes
    max_staleness: int

    @classmethod
    def of(cls, spec: TrainerSpec) -> UpdateConfig:
        """Take from what a trainer is told what an update reads."""
        o, t = spec.objective, spec.trainer
        return cls(
            variant_name=spec.variant,
            loss=LOSSES.find(o.loss),
            objective=objective_of(o, variant=spec.variant, band=spec.band),
            aggregation=o.loss_aggregation,
            aggregation_tokens=o.loss_aggregation_tokens,
            weight_mu=None if o.interpolation_schedule == "a3po" else o.interpolation_mu,
            num_steps=t.minibatches_per_update,
            max_grad_norm=t.max_grad_norm,
            sizes=spec.sizes,
            max_staleness=spec.max_staleness,
        )


def objective_of(o: ObjectiveConfig, *, variant: str, band: float) -> Objective:
    """The knobs of a recipe's objective, as a loss receives them."""
    return Objective(
        variant=find_variant(variant),
        band=band,
        eps_low=o.eps_low,
        eps_high=o.eps_high,
        dual_clip=None if math.isinf(o.dual_clip) else o.dual_clip,
        mismatch_correction=o.mismatch_correction,
        is_cap=o.is_cap if o.clip == "truncated" else None,
    )
