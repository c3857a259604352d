"""Failed episodes by reason: what the live view, the summary and the report say of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Final

LONGEST: Final = 120
"""Characters of a reason that are shown."""


class FailureTally:
    """Counts failures by their kind: where they were raised, and the type of the exception or the beginning of the text.

    Example:
        >>> tally = FailureTally()
        >>> for reason in ("get_reward: ValueError: row 3", "get_reward: ValueError: row 4", "look: timed out after 2 s"):
        ...     tally.add(reason)
        True
        False
        True
        >>> tally.by_reason()
        {'get_reward: ValueError: row 3': 2, 'look: timed out after 2 s': 1}
    """

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._first: dict[str, str] = {}

    def add(self, reason: str) -> bool:
        """Count one; returns whether it is the first of its kind."""
        kind = re.sub(r"\d+", "#", ": ".join(reason.split(": ")[:2]))[:LONGEST]
        self._first.setdefault(kind, " ".join(reason.split())[:LONGEST])
        self._counts[kind] = self._counts.get(kind, 0) + 1
        return self._counts[kind] == 1

    def by_reason(self) -> dict[str, int]:
        """The first reason of each kind and the number of its kind, the most frequent kind first."""
        kinds = sorted(self._counts, key=lambda kind: -self._counts[kind])
        return {self._first[kind]: self._counts[kind] for kind in kinds}


def tallied(reasons: Iterable[str]) -> dict[str, int]:
    """Failures by reason, as `FailureTally.by_reason` gives them."""
    tally = FailureTally()
    for reason in reasons:
        tally.add(reason)
    return tally.by_reason()


def in_words(failures: Mapping[str, int], most: int = 3) -> str:
    """The most frequent reasons with their numbers.

    Example:
        >>> in_words({"reset: KeyError: 'a'": 3, "look: timed out": 1, "get_reward: ValueError": 1, "quit: SystemExit: 1": 1})
        "3 x reset: KeyError: 'a'; 1 x look: timed out; 1 x get_reward: ValueError; 1 more"
    """
    parts = [f"{num} x {reason}" for reason, num in list(failures.items())[:most]]
    rest = sum(list(failures.values())[most:])
    return "; ".join(parts + ([f"{rest} more"] if rest else []))
