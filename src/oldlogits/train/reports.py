"""What the trainer tells of its work: published versions, what scoring has cost, and the errors of consistency checks."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from oldlogits.core.weights import PolicyVersion, StoreReceipt, WeightUpdate


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeNoise:
    """How far the probe tokens' log-probs lie apart at the same weights in the engine's numerics, measured once, in nats.

    Args:
        packing_max: The largest difference between two packings, computed in float32.
        bf16_mean: The mean difference between bf16 and float32 arithmetic.
    """

    packing_max: float = 0.0
    bf16_mean: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedVersion:
    """A version that was just published.

    Args:
        version: Its number.
        update: What brings a receiver on from the version before; views of the live weights are valid until the next step.
        probe_logps: float32 [probe token]: what the live weights give the fixed probe tokens.
        engine_probe_logps: float32 [probe token]: what they give them with the engine's numerics.
        is_routed: Whether its layers choose experts.
        probe_noise: What the probe of an engine that holds the right weights may be off by.
        store_bytes: Bytes of all versions that the store holds.
        store_s: Seconds that storing this one took.
        publication: What the store did with this one; None: the source needs no stored versions.
    """

    version: PolicyVersion
    update: WeightUpdate
    probe_logps: NDArray[np.float32]
    engine_probe_logps: NDArray[np.float32]
    is_routed: bool
    probe_noise: ProbeNoise
    store_bytes: int
    store_s: float
    publication: StoreReceipt | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringWork:
    """What scoring batches and spans has cost the trainer since it started; its own checks are not in it.

    Args:
        read_tokens: Tokens that forward passes have read: each sequence up to its last scored token, what several share once.
        num_checkouts: How often weights were asked for, those that scored last included.
        switch_s: Seconds until the module pointed at them, checkout included.
        check_s: Seconds of the consistency checks that followed.
    """

    read_tokens: int = 0
    num_checkouts: int = 0
    switch_s: float = 0.0
    check_s: float = 0.0

    def __add__(self, other: ScoringWork) -> ScoringWork:
        """Add the work of two pieces."""
        return ScoringWork(**{name: value + getattr(other, name) for name, value in asdict(self).items()})

    def __sub__(self, other: ScoringWork) -> ScoringWork:
        """Take what was done before off what was done in all."""
        return ScoringWork(**{name: value - getattr(other, name) for name, value in asdict(self).items()})


@dataclass(frozen=True, slots=True, kw_only=True)
class PackingNoise:
    """How far log-probs of the same tokens at the same weights lie apart, in nats.

    Args:
        mean: The mean difference between two packings.
        max: Its largest value.
        rounding_mean: The mean difference between bf16 and float32 arithmetic; 0 where float32 is computed.
        rounding_max: Its largest value.
    """

    mean: float = 0.0
    max: float = 0.0
    rounding_mean: float = 0.0
    rounding_max: float = 0.0

    @classmethod
    def between(cls, packed: NDArray[np.float32], alone: NDArray[np.float32], in_fp32: NDArray[np.float32]) -> Self:
        """Compare what tokens are given in one packing, in another one, and in the first one by float32 arithmetic."""
        packing, rounding = np.abs(alone - packed), np.abs(in_fp32 - packed)
        figures = (packing.mean(), packing.max(), rounding.mean(), rounding.max())
        mean, largest, rounding_mean, rounding_max = map(float, figures)
        return cls(mean=mean, max=largest, rounding_mean=rounding_mean, rounding_max=rounding_max)

    @property
    def expected_mean(self) -> float:
        """What any two packings may lie apart by on average.

        Two packings of which a kernel takes both alike do not differ at all, and two others do: what bf16 rounds off in
        either of them bounds what they differ by, up to a factor of two.
        """
        return max(self.mean, self.rounding_mean)

    @property
    def expected_max(self) -> float:
        """The same for the token that differs most."""
        return max(self.max, self.rounding_max)


NO_NOISE: Final = PackingNoise()
"""Where nothing was measured: rounding is allowed in any case."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsistencyErrors:
    """The largest errors of the consistency checks so far, in nats; NaN before the first.

    Args:
        publish_max_abs_error: A checkout against what the live weights gave the probe tokens at publish.
        lag0_max_abs_error: OLD, as the loss used it, against THETA on lag-0 tokens before the first optimizer step.
        rescored_max_abs_error: The same for OLD as the source scored it, where the loss took it from the training forward.
        packing_mean_abs_error: The packing noise, measured once before the first optimizer step: its mean.
        packing_max_abs_error: Its largest value.
        rounding_mean_abs_error: bf16 against float32 arithmetic, measured with it: its mean; 0 where float32 is computed.
        rounding_max_abs_error: Its largest value.
        num_digests: Checkouts of stored versions: the store has compared the bits of each, by a digest, with those published.
    """

    publish_max_abs_error: float = math.nan
    lag0_max_abs_error: float = math.nan
    rescored_max_abs_error: float = math.nan
    packing_mean_abs_error: float = math.nan
    packing_max_abs_error: float = math.nan
    rounding_mean_abs_error: float = math.nan
    rounding_max_abs_error: float = math.nan
    num_digests: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerState:
    """How far a trainer is, and what it has worked since it started.

    Args:
        version: The version of the live weights.
        consistency: The largest errors of its consistency checks.
        num_parameters: The parameters of its model, tied ones once.
        num_trained: Those of them that are trained: all, or the adapters'.
        work: What scoring has cost.
        busy_s: Seconds that calls have taken.
        oldest_version: The oldest version that it can score at.
        padded_because: Why its micro-batches are padded although the recipe lays them out otherwise; empty: they are not.
    """

    version: PolicyVersion
    consistency: ConsistencyErrors
    num_parameters: int
    num_trained: int
    work: ScoringWork
    busy_s: float
    oldest_version: PolicyVersion = 0
    padded_because: str = ""
