"""One file per route to the old logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from oldlogits.core.errors import ExactnessError, MissingLogprobError
from oldlogits.core.policies import OLD
from oldlogits.core.scoring import DedicatedScorer, Scored
from oldlogits.core.source import LogprobSource
from oldlogits.sources.aged import AgedSource
from oldlogits.sources.arrival import ArrivalSource
from oldlogits.sources.dedicated import DedicatedSource
from oldlogits.sources.eager import EagerSource
from oldlogits.sources.ewma import AveragingHandle, EwmaSource
from oldlogits.sources.interruption import InterruptionSource
from oldlogits.sources.none import NoSource
from oldlogits.sources.rescore import EngineScores, RescoreSource, RescoringHandle
from oldlogits.sources.snapshot import SnapshotSource


class TrainerHandle(AveragingHandle, RescoringHandle, Protocol):
    """What the routes, taken together, ask of the trainer."""


SOURCE_TYPES: Final[Mapping[str, Callable[[TrainerHandle], LogprobSource]]] = MappingProxyType(
    {
        "snapshot": SnapshotSource,
        "eager": EagerSource,
        "interruption": InterruptionSource,
        "arrival": ArrivalSource,
        "ewma": EwmaSource,
        "aged": AgedSource,
        "rescore": RescoreSource,
        "none": NoSource,
    }
)
"""The routes that need nothing but the trainer, by their name in a recipe."""


def make_source(name: str, trainer: TrainerHandle, scorer: DedicatedScorer | None) -> LogprobSource:
    """The route of that name.

    Args:
        name: A key of `SOURCES`.
        trainer: Scores.
        scorer: Of the route "dedicated"; the others have none.
    """
    if name == "dedicated":
        assert scorer is not None, "a runtime opens a scorer for the route 'dedicated'"
        return DedicatedSource(trainer, scorer)
    return SOURCE_TYPES[name](trainer)


def check_scored(scored: Scored, versions: NDArray[np.int64]) -> None:
    """Refuse log-probs that are missing, or that claim to be OLD at another version than the tokens' own.

    Args:
        scored: What a source returned.
        versions: int64 [loss token]: the version that sampled each.

    Raises:
        MissingLogprobError: Some tokens were not scored.
        ExactnessError: OLD was computed at another version than a token's tag.
    """
    unscored = int((scored.computed_at < 0).sum())
    if not len(scored.values) == len(scored.computed_at) == len(versions) or unscored:
        raise MissingLogprobError(
            f"source of {scored.policy.name} left tokens unscored",
            got=f"{len(scored.values) - unscored} of {len(versions)} loss tokens",
            allowed="a log-prob for every loss token",
            fix="a source scores every token, or raises",
        )
    wrong = int((scored.computed_at != versions).sum()) if scored.policy is OLD else 0
    if wrong:
        raise ExactnessError(
            "log-probs that claim to be OLD were computed at another version",
            got=f"{wrong} of {len(versions)} tokens",
            allowed="every token at the version that sampled it",
            fix="score tokens at their own version, or provide another policy than OLD",
        )


__all__ = [
    "SOURCE_TYPES",
    "AgedSource",
    "ArrivalSource",
    "AveragingHandle",
    "DedicatedSource",
    "EagerSource",
    "EngineScores",
    "EwmaSource",
    "InterruptionSource",
    "NoSource",
    "RescoreSource",
    "RescoringHandle",
    "SnapshotSource",
    "TrainerHandle",
    "check_scored",
    "make_source",
]
