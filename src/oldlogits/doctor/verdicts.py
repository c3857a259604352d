"""What a check says of a batch, with its evidence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Outcome = Literal["finding", "healthy", "cannot-tell"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a check says.

    Args:
        outcome: Whether something is wrong, nothing is, or the dump does not hold enough to tell.
        says: The evidence in one or two sentences.
        num_tokens: How many loss tokens are concerned.
        num_read: How many loss tokens the check has read.
        where: Some of the tokens concerned.
        figures: The numbers behind the sentence, by name.
    """

    outcome: Outcome
    says: str
    num_tokens: int = 0
    num_read: int = 0
    where: tuple[str, ...] = ()
    figures: Mapping[str, float] = field(default_factory=dict)


def finding(says: str, **rest: object) -> Verdict:
    """Something is wrong."""
    return Verdict(outcome="finding", says=says, **rest)  # type: ignore[arg-type]


def healthy(says: str, **rest: object) -> Verdict:
    """Nothing is wrong that the check would see."""
    return Verdict(outcome="healthy", says=says, **rest)  # type: ignore[arg-type]


def cannot_tell(says: str, **rest: object) -> Verdict:
    """The dump does not hold what the check needs."""
    return Verdict(outcome="cannot-tell", says=says, **rest)  # type: ignore[arg-type]
