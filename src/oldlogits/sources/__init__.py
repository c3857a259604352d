"""The built-in sources of the proximal policy's log-probs, one file each; `SOURCES` names them. Imports no torch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from oldlogits.core.errors import ExactnessError, MissingLogprobError
from oldlogits.core.policies import OLD
from oldlogits.core.scoring import BatchTokens, DedicatedScorer, Scored, ScoringHandle
from oldlogits.core.source import SOURCES, Keep, LogprobSource, SourceHandles

__all__ = [
    "SOURCES",
    "BatchTokens",
    "DedicatedScorer",
    "Keep",
    "LogprobSource",
    "Scored",
    "ScoringHandle",
    "SourceHandles",
    "check_scored",
    "make_source",
]


def make_source(
    name: str, trainer: ScoringHandle, scorer: DedicatedScorer | None, keep: Keep = lambda id, version, values: None
) -> LogprobSource:
    """Build the source that a recipe names; `scorer` is the second model of one with `needs_scorer`, None for the others."""
    return SOURCES.find(name)(SourceHandles(trainer=trainer, scorer=scorer, keep=keep))


def check_scored(scored: Scored, versions: NDArray[np.int64]) -> None:
    """Refuse log-probs that are missing, or that claim to be OLD at another version than the tokens' own, `versions`.

    What a source leaves out was left to the training forward by whoever asked it.

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
