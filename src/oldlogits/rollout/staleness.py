"""Bounded staleness by admission and earliest-deadline-first selection; proved in docs/staleness.md.

A group admitted at version a must be trained at some version <= a + W, its *deadline*. With B groups per version and
N(d) outstanding groups of deadline <= d, the invariant before training at version v is, for every d >= v:

    N(d) <= (d - v + 1) B

Admission keeps it because newcomers have the latest deadline v + W and at most (W + 1) B groups are outstanding.
Selection keeps it by taking, for every d >= v, at least N(d) - (d - v) B groups of deadline <= d.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from oldlogits.core.errors import AccountingError


@dataclass(frozen=True, slots=True, kw_only=True)
class Outstanding:
    """A group that was admitted and not yet trained: the last version at which it may be, and whether its episodes ended."""

    deadline: int
    ready: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class StalenessBound:
    """The bound W and the batch size B, in versions and groups per version."""

    max_staleness: int
    prompts_per_update: int

    @property
    def capacity(self) -> int:
        """The most groups that may be outstanding: (W + 1) B."""
        return (self.max_staleness + 1) * self.prompts_per_update

    def admits(self, deadlines: Sequence[int], version: int, *, num_first: int = 0) -> bool:
        """Whether groups of these deadlines, and `num_first` before all others, can be trained in time from `version` on."""
        if min(deadlines, default=version) < version:
            return False
        due = {at: num_first + sum(deadline <= at for deadline in deadlines) for at in deadlines}
        return all(num <= (at - version + 1) * self.prompts_per_update for at, num in due.items())

    def choose(self, version: int, outstanding: Sequence[Outstanding]) -> list[int] | None:
        """The groups to train at `version`, or None: wait for running ones.

        The earliest deadlines among the ready groups are taken; no other choice takes more groups of deadline <= d,
        for any d. None when fewer than B are ready, or when training them now would let a running group pass its
        deadline later.

        Args:
            version: The trainer's version.
            outstanding: The groups in order of admission.

        Returns:
            B positions in `outstanding`, ascending by (deadline, admission).

        Raises:
            AccountingError: A group is beyond its deadline already, or the invariant is broken.

        Example:
            W = 1, B = 1, version 3: a running group of deadline 3 is waited for, though one of deadline 4 is ready.
        """
        order = sorted(range(len(outstanding)), key=lambda i: (outstanding[i].deadline, i))
        chosen = [i for i in order if outstanding[i].ready][: self.prompts_per_update]
        for deadline in range(version, version + self.max_staleness + 1):
            due = sum(group.deadline <= deadline for group in outstanding)
            if due > (deadline - version + 1) * self.prompts_per_update:
                raise AccountingError(
                    f"more groups are due by version {deadline} than can be trained",
                    got=f"{due} groups at version {version}",
                    allowed=f"{(deadline - version + 1) * self.prompts_per_update}",
                    fix="admission let in too many groups; this is a defect, please report it",
                )
            must = due - (deadline - version) * self.prompts_per_update
            if sum(outstanding[i].deadline <= deadline for i in chosen) < must:
                return None
        return chosen if len(chosen) == self.prompts_per_update else None
