"""Rollouts: groups of episodes as tasks that feed the buffer.

admit -> group task -> episode tasks -> engine.generate ...      (engine down: the error ends the run)
                   |<- trajectories, failures
                   -> buffer.close -> source.on_arrival
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import count, takewhile
from typing import TypeGuard

from oldlogits.core.environment import Row
from oldlogits.core.source import LogprobSource
from oldlogits.core.trajectory import Sampled, Segment, episode_of
from oldlogits.core.weights import PolicyVersion
from oldlogits.record.bus import Event, EventSink
from oldlogits.record.events import GroupAdmitted, GroupClosed, TrajectoryFailed, TrajectoryRestarted
from oldlogits.rollout.admission import Admission
from oldlogits.rollout.buffer import Buffer
from oldlogits.rollout.environment_errors import EnvironmentFailed
from oldlogits.rollout.journal.journal import Journal
from oldlogits.rollout.journal.progress import EpisodeProgress, GroupProgress, Progress, group_of
from oldlogits.rollout.journal.records import Admitted, Answered, Ended, Failed, LeftOut, Restarted, StateSaved, Told
from oldlogits.rollout.player import Outcome, Player, Watch
from oldlogits.rollout.tasks import TaskDataset
from oldlogits.rollout.turn_latency import TurnLatency
from oldlogits.rollout.turns import Failure, Known
from oldlogits.rollout.watches import FailureWatch, FilterWatch


class Rollouts(Admission):
    """Starts groups of episodes within the staleness bound and puts what they yield into the buffer.

    Args:
        player: Plays the episodes.
        rows: The tasks.
        buffer: Admits groups and collects their trajectories.
        source: Is told of trajectories that grow, of groups that end, and of those that are not trained.
        events: Takes an event whenever a group starts or ends, or an episode fails.
        tasks: Supervises the episodes: an error of the engine in one of them ends the run.
        group_size: Episodes per group.
        max_replays: How often a failed episode is played again.
        failures: Counts the failed episodes, and ends the run where they are too many.
        left_out: Counts the groups that are left out, and ends the run where they are too many.
        max_running_groups: Groups sampled at the same time; 0: as many as are admitted.
        journal: Takes note of all that a run needs to go on with its groups.
        next_row: The first training row that was never started.
        next_group: The first number that no group has had.
    """

    def __init__(
        self,
        *,
        player: Player,
        rows: TaskDataset,
        buffer: Buffer,
        source: LogprobSource,
        events: EventSink,
        tasks: asyncio.TaskGroup,
        group_size: int,
        max_replays: int,
        failures: FailureWatch,
        left_out: FilterWatch,
        max_running_groups: int,
        journal: Journal,
        next_row: int,
        next_group: int,
    ) -> None:
        super().__init__(buffer, tasks, max_running_groups=max_running_groups)
        self.latency = TurnLatency()
        self._player = player.watched(Watch(report=self._report, withdraw=self._withdraw, save=self._save, drop=source.drop))
        self._rows = rows
        self._source, self._events = source, events
        self._group_size, self._max_replays = group_size, max_replays
        self.failures, self._left_out = failures, left_out
        self._journal = journal
        self.next_row, self.next_group = next_row, next_group
        self._later: dict[str, GroupProgress] = {}  # of a run that goes on, held until it is where they were admitted
        self._untaken: dict[str, EpisodeProgress] = {}  # episodes of that run that do not go on yet
        self._makes_others = False  # whether the run makes other versions than before it was ended
        self._oldest_held: PolicyVersion = 0
        self._advanced = asyncio.Event()

    def start_group(self) -> asyncio.Task[None]:
        """Start the episodes of the next row."""
        index, group_id, size = self.next_row, f"g{self.next_group:06d}", self._group_size
        row = self._rows.train(index)
        self._buffer.admit(group_id, size=size, version=self.version)
        self._tell(Admitted(group=group_id, row=index, version=self.version, size=size))
        self.next_row, self.next_group = index + 1, self.next_group + 1
        return self._tasks.create_task(self._play_group(group_id, row))

    def go_on(self, version: PolicyVersion, oldest_held: PolicyVersion) -> None:
        """Hold what the journal has in flight, at a version, where the trainer can score at versions from `oldest_held` on."""
        self._oldest_held, taken = oldest_held, self._journal.progress.taken.values()
        restore(self._buffer, self._journal.progress)
        for id, group in self._journal.progress.groups.items():
            self._later[id] = group
            self._untaken |= {id: episode for id, episode in group.episodes.items() if episode.failed is None}
        if any(len(groups) != self._buffer.num_per_batch for groups in taken):  # by a recipe of another size of batches
            self.begin_again_from(version + 1)

    @property
    def oldest_untaken(self) -> PolicyVersion | None:
        """The oldest version of tokens that a run had before it was ended, and that do not go on yet."""
        return min((version for episode in self._untaken.values() for version in episode.versions), default=None)

    def admit(self, version: PolicyVersion, *, num_wanted: int, pace_s: float) -> None:
        """Start what the bound admits, and let episodes go on that wait for this version; see `Admission.admit`."""
        super().admit(version, num_wanted=num_wanted, pace_s=pace_s)
        self._advance()

    def fill(self) -> None:
        """Let in what is held; where nothing is, start groups."""
        self._let_in()
        super().fill()

    def begin_again_from(self, version: PolicyVersion) -> None:
        """Let episodes begin again that have tokens from a version on: the run makes another version of that number."""
        self._makes_others = True
        self._journal.progress.taken.clear()
        for id, episode in list(self._untaken.items()):
            if max(episode.versions, default=-1) >= version:
                self._lose(id, episode, f"the run made another version {version} when it went on")
        self._advance()

    def metrics(self) -> dict[str, float]:
        """What episodes waited for, which share of them failed, and what their player has done, since the last call."""
        return {**self.latency.metrics(), "rollout/failed_share": self.failures.share, **self._player.metrics()}

    def batch_taken(self) -> None:
        """Start groups in the place of those that are trained from here on."""
        self._left_out.batch_taken()
        self.fill()

    def _report(self, trajectory_id: str, segments: Sequence[Segment]) -> None:
        self.latency.grew(episode_of(trajectory_id), segments)
        if self._player.goes_on:  # otherwise it counts once it is whole
            self._journal.grew(trajectory_id, segments)
        elif turn := list(takewhile(lambda segment: isinstance(segment, Sampled), reversed(segments))):
            num_tokens = sum(len(segment.token_ids) for segment in turn)
            self._journal.note(Answered(episode=episode_of(trajectory_id), num_tokens=num_tokens))
        self._source.on_segment_closed(trajectory_id, segments)

    def _withdraw(self, trajectory_id: str, segments: Sequence[Segment]) -> None:
        if segments:
            self._source.on_withdrawn(trajectory_id, segments)
        else:
            self._source.drop([trajectory_id])

    def _save(self, trajectory_id: str, num_segments: int, state: str) -> None:
        self._journal.note(StateSaved(episode=trajectory_id, num_segments=num_segments, state=state))

    def _may_start(self) -> bool:
        return not self._later and super()._may_start()

    def _let_in(self) -> None:
        """Let in the groups that had been admitted by this version; where the run makes other versions, as there is room.

        Tokens go on in the group's own window only: elsewhere its episodes begin again.
        """
        for id, group in list(self._later.items()):
            asked = group.admitted.version
            fits = asked <= self.version and self._buffer.fits(asked, self.version)
            if asked <= self.version and not fits and not self._makes_others:  # by a recipe of another bound
                self.begin_again_from(self.version + 1)
            if not fits and not (self._makes_others and self._buffer.num_admissible() > 0):
                return
            del self._later[id]
            self._buffer.let_in(id, asked if fits else self.version)
            for name in group.episodes.keys() & self._untaken.keys() if not fits else ():
                self._lose(name, self._untaken[name], "its group was admitted again")
            self._running.add(self._tasks.create_task(self._play_group(id, self._rows.train(group.admitted.row), group)))

    def _lose(self, id: str, episode: EpisodeProgress, reason: str) -> None:
        """Let an episode begin again that was to go on."""
        del self._untaken[id]
        self._begin_again(Failure(id=id, group_id=group_of(id), reason=reason, num_tokens=episode.num_sampled))

    def _advance(self) -> None:
        self._advanced.set()
        self._advanced = asyncio.Event()

    async def _play_group(self, group_id: str, row: Row, known: GroupProgress | None = None) -> None:
        size, episodes = (known.admitted.size, known.episodes) if known else (self._group_size, {})
        async with asyncio.TaskGroup() as members:
            for member in range(size):
                members.create_task(self._play_member(group_id, member, row, episodes))
        await self._grade(group_id, row)
        closed = self._buffer.close(group_id)
        event = GroupClosed(
            version=self.version,
            group=group_id,
            rewards=[branches[0].reward for branches in closed.episodes],
            oldest_version=min((t.versions[0] for t in closed.trajectories), default=self.version),
            num_failed=closed.num_failed,
            filtered=closed.group is None,
        )
        self._events.emit(event)
        self._left_out.count(closed, self.version)
        self.group_ended()
        if closed.group is None:
            self._journal.note(
                LeftOut(
                    group=group_id,
                    version=event.version,
                    rewards=tuple(event.rewards),
                    oldest_version=event.oldest_version,
                    num_failed=event.num_failed,
                )
            )
            self._source.drop(t.id for t in closed.trajectories)
            if any(group_id in groups for groups in self._journal.progress.taken.values()):
                self.begin_again_from(self.version + 1)
                self.fill()
        else:
            await self._source.on_arrival(closed.trajectories)

    async def _grade(self, group_id: str, row: Row) -> None:
        """Give the episodes of a group the rewards that their player makes of them all; without these they have failed."""
        episodes = self._buffer.ended(group_id)
        try:
            self._buffer.regrade(group_id, await self._player.grade(row, episodes))
        except EnvironmentFailed as failure:
            self._buffer.fail_ended(group_id)
            for branches in episodes:
                id = branches[0].episode_id
                self._source.drop(branch.id for branch in branches)
                self._tell(Failed(episode=id, again=False, version=self.version, reason=str(failure)))
                self.failures.count(Failure(id=id, group_id=group_id, reason=str(failure)), self.version)

    async def _play_member(self, group_id: str, member: int, row: Row, episodes: Mapping[str, EpisodeProgress]) -> None:
        """Play an episode; where it fails, play it again as `g000012.3r1`, `g000012.3r2`, ..."""
        for replay in count():  # what was promised before the run was ended is played, whatever the recipe allows now
            id = f"{group_id}.{member}" + (f"r{replay}" if replay else "")
            known = episodes.get(id)
            if known is not None and known.failed is not None:
                if known.failed.again:
                    continue
                return
            outcome = await self._play(id, group_id, row, known)
            if not isinstance(outcome, Failure):
                for branch in outcome:
                    self._journal.grew(branch.id, branch.segments)
                self._journal.note(Ended.of(outcome[0]))
                self._buffer.end(outcome)
                self.failures.count(None, self.version)
                return
            again = replay < self._max_replays
            self._source.drop([id])
            self._tell(Failed(episode=id, again=again, version=self.version, reason=outcome.reason))
            self._buffer.fail(group_id, again=again)
            self.failures.count(outcome, self.version)
            if not again:
                return

    async def _play(self, id: str, group_id: str, row: Row, progress: EpisodeProgress | None) -> Outcome:
        """Play an episode to its end, from where it was; one that is lost begins again."""
        try:
            known = None if progress is None else await self._take_over(id, progress)
            if known is not None and progress is not None and (ended := progress.trajectories(id, group_id)) is not None:
                return ended
            self.latency.started(id)
            play = partial(self._player.play, row, id=id, group_id=group_id)
            while is_lost(outcome := await play(known=known)):
                self._begin_again(outcome)
                known = None
        except asyncio.CancelledError:
            self.latency.ended(id, well=False)
            self._source.drop([id])
            raise
        self.latency.ended(id, well=not isinstance(outcome, Failure))
        return outcome

    async def _take_over(self, id: str, progress: EpisodeProgress) -> Known | None:
        """Wait until the run has made the versions that an episode has tokens of, and go on with it; None: it begins again."""
        newest, known = max(progress.versions, default=0), progress.known
        while self.version < newest and id in self._untaken:
            await self._advanced.wait()
        if id not in self._untaken:
            return None
        if progress.ended is None and not self._player.goes_on:
            self._lose(id, progress, "an agent program begins again when its run goes on")
            return None
        branches = {name: branch for name, branch in {id: progress, **progress.branches}.items() if branch.known}
        if not all(self._source.restore(n, b.known, b.values, self._oldest_held) for n, b in branches.items()):
            self._source.drop(branches)
            self._lose(id, progress, "its old log-probs cannot be computed any more")
            return None
        del self._untaken[id]
        self._journal.grew(id, known)  # what comes of the running turn comes after what it has
        num_saved, state = progress.state or (0, "")
        return Known(segments=known, num_saved=num_saved, state=state)

    def _begin_again(self, lost: Failure) -> None:
        self._source.drop([lost.id])
        record = Restarted(episode=lost.id, version=self.version, reason=lost.reason, num_lost_tokens=lost.num_tokens)
        self._tell(record)

    def _tell(self, record: Told) -> None:
        """Take note of what an event tells, and emit that event."""
        self._journal.note(record)
        self._events.emit(event_of(record))


def event_of(record: Told) -> Event:
    """The event that tells what a record of the journal says."""
    match record:
        case Admitted():
            return GroupAdmitted(version=record.version, group=record.group)
        case Failed():
            return TrajectoryFailed(version=record.version, trajectory=record.episode, stage="train", reason=record.reason)
        case Restarted():
            version, num_lost = record.version, record.num_lost_tokens
            return TrajectoryRestarted(
                version=version, trajectory=record.episode, reason=record.reason, num_lost_tokens=num_lost
            )
        case LeftOut():
            return GroupClosed(
                version=record.version,
                group=record.group,
                rewards=record.rewards,
                oldest_version=record.oldest_version,
                num_failed=record.num_failed,
                filtered=True,
            )


def restore(buffer: Buffer, progress: Progress) -> None:
    """Put all groups that a run goes on with into the buffer."""
    for id, group in progress.groups.items():
        failed = [episode.failed for episode in group.episodes.values() if episode.failed is not None]
        num_failed = sum(not failure.again for failure in failed)
        buffer.restore(id, size=group.admitted.size, version=group.admitted.version, num_failed=num_failed)


def is_lost(outcome: Outcome) -> TypeGuard[Failure]:
    """Return whether an episode begins again."""
    return isinstance(outcome, Failure) and outcome.begins_again


def restarted(failure: Failure, version: PolicyVersion) -> TrajectoryRestarted:
    """The event of an episode that begins again."""
    return TrajectoryRestarted(
        version=version, trajectory=failure.id, reason=failure.reason, num_lost_tokens=failure.num_tokens
    )
