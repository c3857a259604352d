"""What the trainer tells of its work: published versions, what scoring has cost, and the errors of consistency checks."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from oldlogits.core.weights import PolicyVersion, StoreReceipt, WeightUpdate


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedVersion:
    """A version that was just published.

    Args:
        version: Its number.
        update: What brings a receiver on from the version before; views of the live weights are valid until the next step.
        probe_logps: float32 [probe token]: what the live weights give the fixed probe tokens.
        engine_probe_logps: float32 [probe token]: what they give them with the engine's numerics.
        is_routed: Whether its layers choose experts.
        store_bytes: Bytes of all versions that the store holds.
        store_s: Seconds that storing this one took.
        publication: What the store did with this one; None: the source needs no stored versions.
    """

    version: PolicyVersion
    update: WeightUpdate
    probe_logps: NDArray[np.float32]
    engine_probe_logps: NDArray[np.float32]
    is_routed: bool
    store_bytes: int
    store_s: float
    publication: StoreReceipt | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringWork:
    """What scoring batches and spans has cost the trainer since it started; its own checks are not in it.

    Args:
        read_tokens: Tokens that forward passes have read, each sequence up to its last scored token.
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
class ConsistencyErrors:
    """The largest errors of the consistency checks so far, in nats; NaN before the first.

    Args:
        publish_max_abs_error: A checkout against what the live weights gave the probe tokens at publish.
        lag0_max_abs_error: OLD against THETA on lag-0 tokens before the first optimizer step.
    """

    publish_max_abs_error: float = math.nan
    lag0_max_abs_error: float = math.nan


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
    """

    version: PolicyVersion
    consistency: ConsistencyErrors
    num_parameters: int
    num_trained: int
    work: ScoringWork
    busy_s: float
    oldest_version: PolicyVersion = 0
