"""What a trainer and a dedicated scorer are told: their sections of the recipe, and decisions as values.

Whoever starts a run decides (run/specs.py); neither of the two sees the rest of the recipe.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from oldlogits.config.objective.losses import options_of
from oldlogits.config.objective.sections import ObjectiveConfig, ProximalConfig
from oldlogits.config.schema import ModelConfig, TrainerConfig
from oldlogits.config.systems import VersionsConfig
from oldlogits.core.loss import Objective
from oldlogits.core.objective.correction import Correction
from oldlogits.core.policies import find_variant
from oldlogits.engines.embedded.numerics import Numerics
from oldlogits.models.forward import DTYPES, Arithmetic
from oldlogits.models.scorer import ForwardSizes

Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardSpec:
    """What everything that scores is told.

    Args:
        trainer: The optimizer's section of the recipe, and the sizes of a forward pass.
        model: The model's section.
        device: The device that holds the model.
        max_context: The most tokens of a sequence.
    """

    trainer: TrainerConfig
    model: ModelConfig
    device: Device
    max_context: int

    @property
    def forward_dtype(self) -> torch.dtype:
        """The type of the forward weights."""
        named = self.model.forward_dtype
        return DTYPES[self.trainer.compute if named == "auto" else named]

    @property
    def arithmetic(self) -> Arithmetic:
        """What is computed in, for one model."""
        t = self.trainer
        head = t.head_compute if t.compute == "bf16" else "fp32"
        return Arithmetic(compute=DTYPES[t.compute], head=DTYPES[head])

    @property
    def sizes(self) -> ForwardSizes:
        """The sizes of a forward pass."""
        return {
            "micro_batch_tokens": self.trainer.micro_batch_tokens,
            "head_chunk_tokens": self.trainer.head_chunk_tokens,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerSpec(ForwardSpec):
    """What a trainer is told.

    Args:
        objective: The objective's section.
        correction: The section of what bounds r_d beside the band.
        proximal: The section of the proximal policy: how an average of the weights decays, and when it is reset.
        versions: The section of the version store.
        variant: The variant of the objective.
        band: The band on r_d; where it is measured the trainer puts that of the update in its place.
        num_updates: The updates of the whole run; the learning rate follows them.
        max_staleness: The staleness that no trained token exceeds.
        window: The largest lag that the backend can produce, in versions.
        seed: The seed of the adapters' first weights.
        engine_numerics: The engine's numerics; "fp32": the engine computes as the trainer does.
        stores_versions: Whether somebody asks for stored versions.
        sends_patches: Whether the receivers of weights can take patches.
        keeps_average: Whether somebody asks for averaged weights.
        takes_training_forward: Whether OLD of tokens of the version that enters training is THETA of its first optimizer step.
        measures_band: Whether the band follows the noise of tokens at lag 0.
        trains_own_tokens: Whether the versions that sampled the tokens are those of this trainer; where they are another one's,
            OLD of tokens of lag 0 is not THETA.
    """

    objective: ObjectiveConfig
    correction: Correction
    proximal: ProximalConfig
    versions: VersionsConfig
    variant: str
    band: float
    num_updates: int
    max_staleness: int
    window: int
    seed: int
    engine_numerics: Numerics
    stores_versions: bool
    sends_patches: bool
    keeps_average: bool
    takes_training_forward: bool = False
    measures_band: bool = False
    trains_own_tokens: bool = True

    @property
    def knobs(self) -> Objective:
        """The knobs of the objective, as a loss receives them."""
        return objective_of(self.objective, self.correction, variant=self.variant, band=self.band)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScorerSpec(ForwardSpec):
    """What a dedicated scorer is told; it batches as the trainer does.

    Args:
        window: The newest versions that it holds.
        uncompressed: The newest patches that its store leaves as they are.
        seed: The seed of its process.
    """

    window: int
    uncompressed: int
    seed: int


def objective_of(o: ObjectiveConfig, correction: Correction, *, variant: str, band: float) -> Objective:
    """Give the knobs of a recipe's objective, as a loss receives them."""
    return Objective(
        variant=find_variant(variant),
        band=band,
        eps_low=o.eps_low,
        eps_high=o.eps_high,
        dual_clip=None if math.isinf(o.dual_clip) else o.dual_clip,
        mismatch_correction=o.mismatch_correction,
        is_cap=o.is_cap if o.clip == "truncated" else None,
        correction=correction,
        options=options_of(o.loss, o.options),
        clip_by_lag=o.clip_by_lag,
    )
