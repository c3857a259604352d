r"""Groups between admission and training, and the account of every episode.

admit -> [running] -> close -> [queued] -> take -> confirm_trained
             |            \-> filtered (uniform rewards, or too few members)
             \-> failed (environment)         cancelled (the run ended)
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Literal

from oldlogits.core.errors import AccountingError
from oldlogits.core.trajectory import Branches, Trajectory, TrajectoryGroup
from oldlogits.rollout.staleness import Outstanding, StalenessBound


@dataclass(slots=True, kw_only=True)
class TrajectoryCounts:
    """Episodes by what became of them."""

    submitted: int = 0
    trained: int = 0
    filtered: int = 0
    failed: int = 0
    cancelled: int = 0


@dataclass(slots=True, kw_only=True)
class AdmittedGroup:
    """A group that was admitted: its episodes as they end, and `group` once it is closed, or why it is left out.

    One that `is_held` is of a run that goes on, and is not let in yet.
    """

    admitted_version: int
    size: int
    episodes: list[Branches] = field(default_factory=list)
    num_failed: int = 0
    group: TrajectoryGroup | None = None
    left_out: Literal["", "small", "uniform"] = ""
    is_held: bool = False

    @property
    def trajectories(self) -> list[Trajectory]:
        """The trajectories of the episodes that have ended."""
        return list(chain.from_iterable(self.episodes))

    @property
    def num_running(self) -> int:
        """Episodes that go on."""
        return self.size - len(self.episodes) - self.num_failed


class Buffer:
    """Admits groups within the staleness bound, collects their trajectories, and hands out batches.

    Groups of fewer than `min_size` members are left out, with `filter_uniform` also those whose rewards are all equal.
    """

    def __init__(self, bound: StalenessBound, *, filter_uniform: bool, min_size: int = 2) -> None:
        self._bound, self._filter_uniform, self._min_size = bound, filter_uniform, min_size
        self._entries: dict[str, AdmittedGroup] = {}
        self._changed = asyncio.Event()
        self._in_training: list[TrajectoryGroup] = []
        self.account = TrajectoryCounts()
        self.is_waited_for = False  # whether the trainer waits for a batch

    @property
    def num_outstanding(self) -> int:
        """Groups admitted and not yet trained; those in training count until `confirm_trained`, those held do not."""
        return len(self._let_in()) + len(self._in_training)

    @property
    def num_per_batch(self) -> int:
        """The groups that one version trains."""
        return self._bound.prompts_per_update

    @property
    def num_batches_ready(self) -> float:
        """Groups that are ready to train, in batches; a batch is what one version trains."""
        return sum(entry.group is not None for entry in self._entries.values()) / self._bound.prompts_per_update

    @property
    def running(self) -> int:
        """Trajectories whose episode goes on."""
        return sum(entry.num_running for entry in self._entries.values())

    @property
    def queued(self) -> int:
        """Trajectories that ended and are not trained yet: their group runs, waits, or is in training."""
        return self._num_in_training + sum(len(entry.episodes) for entry in self._entries.values())

    @property
    def oldest_needed(self) -> int | None:
        """The oldest version that an outstanding group may hold tokens of; None when there is none."""
        return min((entry.admitted_version for entry in self._entries.values()), default=None)

    def rank(self, group_id: str) -> int:
        """How many outstanding groups come before this one in deadline order; those in training are the first."""
        return len(self._in_training) + list(self._entries).index(group_id)  # admitted versions never decrease

    def admit(self, group_id: str, *, size: int, version: int) -> None:
        """Account for a group that starts now.

        Raises:
            AccountingError: The staleness bound does not admit it, or the id is taken.
        """
        if self.num_outstanding >= self._bound.capacity or group_id in self._entries:
            raise AccountingError(
                f"group {group_id} cannot be admitted",
                got=f"{self.num_outstanding} groups outstanding",
                allowed=f"fewer than {self._bound.capacity}, each id once",
                fix="ask num_admissible first",
            )
        self._entries[group_id] = AdmittedGroup(admitted_version=version, size=size)
        self.account.submitted += size

    def restore(self, group_id: str, *, size: int, version: int, num_failed: int) -> None:
        """Hold a group in flight of a run that goes on, whose account has its members already, until it is let in."""
        self._entries[group_id] = AdmittedGroup(admitted_version=version, size=size, num_failed=num_failed, is_held=True)

    def fits(self, admitted: int, version: int) -> bool:
        """Whether a group that was admitted at a version can be let in before one is trained at `version`, or after."""
        deadlines = [entry.admitted_version + self._bound.max_staleness for entry in self._let_in().values()]
        return self._bound.admits([*deadlines, admitted + self._bound.max_staleness], version, num_first=len(self._in_training))

    def let_in(self, group_id: str, version: int) -> None:
        """Let in a group that is held, as one that was admitted at a version."""
        entry = self._entries[group_id]
        entry.admitted_version, entry.is_held = version, False

    def num_admissible(self) -> int:
        """How many groups the bound admits now."""
        return self._bound.capacity - self.num_outstanding

    def end(self, episode: Branches) -> None:
        """Take an episode that ended well."""
        self._entries[episode[0].group_id].episodes.append(episode)

    def ended(self, group_id: str) -> list[Branches]:
        """The episodes of a group that have ended well, in the order of their ids."""
        entry = self._entries[group_id]
        entry.episodes.sort(key=lambda branches: branches[0].id)
        return list(entry.episodes)

    def regrade(self, group_id: str, rewards: Sequence[float]) -> None:
        """Replace the rewards of the episodes of a group that have ended well, in the order of `ended`."""
        entry = self._entries[group_id]
        pairs = zip(self.ended(group_id), rewards, strict=True)
        entry.episodes = [tuple(replace(branch, reward=reward) for branch in branches) for branches, reward in pairs]

    def fail_ended(self, group_id: str) -> None:
        """Count the episodes of a group that had ended well as failed: they have no reward."""
        entry = self._entries[group_id]
        self.account.failed += len(entry.episodes)
        entry.num_failed += len(entry.episodes)
        entry.episodes = []

    def fail(self, group_id: str, *, again: bool = False) -> None:
        """Count a trajectory that its environment ended; with `again` another one is played in its place."""
        self.account.failed += 1
        if again:
            self.account.submitted += 1
        else:
            self._entries[group_id].num_failed += 1

    def close(self, group_id: str) -> AdmittedGroup:
        """Queue a group whose members have all ended, or filter it."""
        entry = self._entries[group_id]
        members = self.ended(group_id)
        if len(members) < self._min_size:
            entry.left_out = "small"
        elif self._filter_uniform and len({branches[0].reward for branches in members}) < 2:
            entry.left_out = "uniform"
        if entry.left_out:
            del self._entries[group_id]
            self.account.filtered += len(members)
        else:
            entry.group = TrajectoryGroup(id=group_id, trajectories=tuple(chain.from_iterable(members)))
        self._changed.set()
        return entry

    def clear(self) -> None:
        """Let go of all groups in flight, which `restore` is about to take over again."""
        assert not self._in_training, "a batch is trained or it is not"
        self._entries.clear()

    def cancel_all(self) -> list[str]:
        """Count what is outstanding as cancelled, since the run ends; returns the trajectories that had ended."""
        self.account.cancelled += self.running + self.queued
        ended = [t.id for entry in self._entries.values() for t in entry.trajectories]
        ended += [t.id for group in self._in_training for t in group.trajectories]
        self._entries.clear()
        self._in_training = []
        return ended

    async def take(self, version: int, only: Sequence[str] = ()) -> list[TrajectoryGroup]:
        """Wait for the groups to train at `version`, and hand them out.

        Args:
            version: The trainer's version.
            only: The groups that the run trained at this version before it was ended; they
                are waited for, whatever else is ready, unless one of them is left out this time.

        Raises:
            AccountingError: A token would be trained beyond the bound.
        """
        while (chosen := self._again(only, version) if only else self._choose(version)) is None:
            self.is_waited_for = True
            self._changed.clear()
            await self._changed.wait()
        self.is_waited_for = False
        groups: list[TrajectoryGroup] = []
        for name in chosen:
            group = self._entries.pop(name).group
            assert group is not None, "only ready groups are chosen"
            groups.append(group)
        self._check_staleness(groups, version)
        self._in_training = groups
        return groups

    def confirm_trained(self) -> None:
        """Make room for others: the groups last taken are trained, and the engine holds the version that came of it."""
        self.account.trained += self._num_in_training
        self._in_training = []

    @property
    def _num_in_training(self) -> int:
        return sum(len(group.episodes) for group in self._in_training)

    def check(self) -> None:
        """Check the invariant that no trajectory is lost or counted twice.

        Raises:
            AccountingError: It does not hold.
        """
        a = self.account
        counted = a.trained + a.filtered + a.failed + a.cancelled + self.queued + self.running
        if a.submitted != counted:
            raise AccountingError(
                "trajectories were lost or counted twice",
                got=f"submitted {a.submitted}, accounted for {counted}: {a}, queued {self.queued}, running {self.running}",
                allowed="submitted == trained + filtered + failed + cancelled + queued + running",
                fix="this is a defect, please report it with the run folder",
            )

    def _let_in(self) -> dict[str, AdmittedGroup]:
        return {name: entry for name, entry in self._entries.items() if not entry.is_held}

    def _again(self, groups: Sequence[str], version: int) -> list[str] | None:
        entries = [self._entries.get(name) for name in groups]
        if any(entry is None for entry in entries):  # it has come to be left out, and another version is made
            return self._choose(version)
        return list(groups) if all(entry is not None and entry.group is not None for entry in entries) else None

    def _choose(self, version: int) -> list[str] | None:
        window, entries = self._bound.max_staleness, self._let_in()
        outstanding = [
            Outstanding(deadline=entry.admitted_version + window, ready=entry.group is not None) for entry in entries.values()
        ]
        chosen = self._bound.choose(version, outstanding)
        return None if chosen is None else [list(entries)[i] for i in chosen]

    def _check_staleness(self, groups: Sequence[TrajectoryGroup], version: int) -> None:
        for group in groups:
            staleness = version - group.oldest_version
            if not 0 <= staleness <= self._bound.max_staleness:
                raise AccountingError(
                    f"group {group.id} would be trained beyond the staleness bound",
                    got=f"staleness {staleness} at version {version}",
                    allowed=f"0 .. {self._bound.max_staleness}",
                    fix="this is a defect, please report it with the run folder",
                )
