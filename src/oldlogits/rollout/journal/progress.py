"""How far every group in flight has come: what records say, added up; and as records again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, groupby

from oldlogits.core.trajectory import Branches, Sampled, Segment, Trajectory, episode_of
from oldlogits.core.weights import PolicyVersion
from oldlogits.rollout.journal.records import (
    Admitted,
    Answered,
    Ended,
    Failed,
    Grew,
    LeftOut,
    Published,
    Record,
    Restarted,
    Running,
    SpanScored,
    StateSaved,
    Taken,
    Told,
)


@dataclass(slots=True, kw_only=True)
class EpisodeProgress:
    """One episode: its segments, what its running turn has sampled, and what became of it.

    Args:
        branches: Its further branches, by id, where it has some.
        running: What the running turn has sampled, piece by piece as it grew: `num_running` tokens.
        num_answered: Tokens of the turns that an agent program was given, whose segments are noted at its end.
        values: Old log-probs of all its tokens of a version, by version.
        state: The state of its environment as JSON text, after so many segments.
    """

    segments: list[Segment] = field(default_factory=list)
    running: list[Sampled] = field(default_factory=list)
    num_running: int = 0
    num_answered: int = 0
    values: dict[PolicyVersion, Sequence[float]] = field(default_factory=dict)
    state: tuple[int, str] | None = None
    ended: Ended | None = None
    failed: Failed | None = None
    branches: dict[str, EpisodeProgress] = field(default_factory=dict)

    @property
    def known(self) -> tuple[Segment, ...]:
        """Its segments, those of the running turn included."""
        return (*self.segments, *joined(self.running))

    @property
    def versions(self) -> dict[PolicyVersion, int]:
        """The number of its sampled tokens by version, those of all its branches."""
        found: dict[PolicyVersion, int] = {}
        for segment in chain(self.known, *(branch.known for branch in self.branches.values())):
            if isinstance(segment, Sampled):
                found[segment.version] = found.get(segment.version, 0) + len(segment.token_ids)
        return found

    @property
    def num_sampled(self) -> int:
        """Its sampled tokens."""
        return max(sum(self.versions.values()), self.num_answered)

    def extend(self, segments: Iterable[Segment]) -> None:
        """Add segments that are whole: no turn runs."""
        self.segments += segments
        self.running, self.num_running = [], 0

    def trajectories(self, id: str, group: str) -> Branches | None:
        """Its trajectories, if it ended well."""
        if self.ended is None:
            return None
        ended, every = self.ended, {id: self, **self.branches}
        return tuple(
            Trajectory(
                id=name,
                group_id=group,
                segments=tuple(branch.segments),
                reward=ended.reward,
                stop_reason=ended.stop_reason,
                turn_rewards=ended.turn_rewards,
                messages=ended.messages,
            )
            for name, branch in every.items()
            if branch.segments
        )

    def records(self, id: str) -> Iterator[Record]:
        """The episode as records."""
        for name, branch in self.branches.items():
            yield from branch.records(name)
        if self.segments:
            yield Grew(episode=id, start=0, segments=tuple(self.segments))
        if self.running:
            yield Running(episode=id, num_segments=len(self.segments), start=0, sampled=tuple(self.running))
        if self.num_answered:
            yield Answered(episode=id, num_tokens=self.num_answered)
        if self.state is not None:
            yield StateSaved(episode=id, num_segments=self.state[0], state=self.state[1])
        for version, values in self.values.items():
            yield SpanScored(episode=id, version=version, values=tuple(values))
        yield from (one for one in (self.ended, self.failed) if one is not None)


@dataclass(slots=True, kw_only=True)
class GroupProgress:
    """One group, and its episodes by id."""

    admitted: Admitted
    episodes: dict[str, EpisodeProgress] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class Progress:
    """All groups in flight, by id in the order of admission; and what happened since a checkpoint.

    Args:
        taken: The groups that were trained at each version.
        probes: What each version gave the fixed probe tokens.
        num_submitted: Episodes that were started, those that are played again included.
        num_failed: Episodes that failed.
        num_filtered: Episodes that ended well in groups that are not trained.
        next_row: The first training row that was not started.
        next_group: The first number that no group has.
        told: What happened since that events tell, in its order; only where it was read from files.
    """

    groups: dict[str, GroupProgress] = field(default_factory=dict)
    taken: dict[PolicyVersion, tuple[str, ...]] = field(default_factory=dict)
    probes: dict[PolicyVersion, tuple[float, ...]] = field(default_factory=dict)
    num_submitted: int = 0
    num_failed: int = 0
    num_filtered: int = 0
    next_row: int = 0
    next_group: int = 0
    told: list[Told] = field(default_factory=list)

    def apply(self, record: Record) -> bool:
        """Take note of a record; False: it is of a group that is not in flight, such as an evaluation, and says nothing.

        Raises:
            ValueError: Records before it are missing: tokens would stand in another context than they were sampled in.
        """
        match record:
            case Admitted():
                self.groups[record.group] = GroupProgress(admitted=record)
                self.num_submitted += record.size
                self.next_row = max(self.next_row, record.row + 1)
                self.next_group = max(self.next_group, number_of(record.group) + 1)
            case LeftOut():
                if self.groups.pop(record.group, None) is None:
                    return False
                self.num_filtered += len(record.rewards)
            case Taken():
                self.taken[record.version] = record.groups
            case Published():
                self.probes[record.version] = record.probe
            case _:
                return self._apply_to_episode(record)
        return True

    def records(self) -> Iterator[Record]:
        """All groups in flight as records, and what is known of versions that are made again."""
        for group in self.groups.values():
            yield group.admitted
            for id, episode in group.episodes.items():
                yield from episode.records(id)
        yield from (Taken(version=version, groups=groups) for version, groups in self.taken.items())
        yield from (Published(version=version, probe=probe) for version, probe in self.probes.items())

    def at(self, version: PolicyVersion) -> Progress:
        """How far all are at a checkpoint of this version: what happened before it is no longer counted."""
        taken = {at: groups for at, groups in self.taken.items() if at >= version}
        probes = {at: probe for at, probe in self.probes.items() if at > version}
        return Progress(groups=self.groups, taken=taken, probes=probes)

    def episode(self, id: str) -> EpisodeProgress | None:
        """What is known of an episode, or of a branch of one."""
        group = self.groups.get(group_of(id))
        known = group.episodes.get(episode_of(id)) if group is not None else None
        return known if known is None or id == episode_of(id) else known.branches.get(id)

    def unfinished(self) -> Iterator[tuple[str, EpisodeProgress]]:
        """The episodes that have not ended, of all that have begun, with their ids."""
        for group in self.groups.values():
            for id, episode in group.episodes.items():
                if episode.segments and episode.ended is None and episode.failed is None:
                    yield id, episode

    def num_segments(self, episode: str) -> int:
        """The segments of an episode that are known."""
        return len(known.segments) if (known := self.episode(episode)) is not None else 0

    def forget(self, groups: Iterable[str]) -> None:
        """Forget groups that were trained: the next checkpoint holds what they taught."""
        for group in groups:
            self.groups.pop(group, None)

    def _apply_to_episode(
        self, record: Grew | Running | Answered | StateSaved | SpanScored | Ended | Failed | Restarted
    ) -> bool:
        group = self.groups.get(group_of(record.episode))
        if group is None:
            return False
        if isinstance(record, Restarted):
            group.episodes.pop(record.episode, None)
            return True
        episode = group.episodes.setdefault(episode_of(record.episode), EpisodeProgress())
        if record.episode != episode_of(record.episode):
            episode = episode.branches.setdefault(record.episode, EpisodeProgress())
        match record:
            case Grew():
                if record.start != len(episode.segments):
                    raise ValueError(
                        f"segments from {record.start} on where {len(episode.segments)} are known: some are missing"
                    )
                episode.extend(record.segments)
            case Running():
                if (record.num_segments, record.start) != (known := (len(episode.segments), episode.num_running)):
                    got = f"{record.start} tokens of a turn after {record.num_segments} segments"
                    raise ValueError(f"what follows {got}, where {known[1]} after {known[0]} are known: some are missing")
                episode.running += record.sampled
                episode.num_running += sum(len(piece.token_ids) for piece in record.sampled)
            case Answered():
                episode.num_answered += record.num_tokens
            case StateSaved():
                episode.state = record.num_segments, record.state
            case SpanScored():
                episode.values[record.version] = record.values
            case Ended():
                episode.extend(joined(episode.running))  # a turn that was whole when its episode was taken up
                episode.ended = record
            case Failed():
                episode.failed = record
                self.num_failed += 1
                self.num_submitted += record.again
        return True


def joined(pieces: Iterable[Sampled]) -> list[Sampled]:
    """Join the pieces of a turn: those of one version, sampled over keys and values of one kind, are one segment."""
    return [_one(tuple(run)) for _, run in groupby(pieces, key=lambda piece: (piece.version, piece.kv, piece.temperature))]


def _one(pieces: Sequence[Sampled]) -> Sampled:
    ids, logps = (tuple(chain.from_iterable(parts)) for parts in zip(*((p.token_ids, p.logp_mu) for p in pieces), strict=True))
    routing = pieces[0].routing
    for piece in pieces[1:]:
        new = piece.routing.last(len(piece.token_ids)) if piece.routing is not None else None
        routing = routing + new if routing is not None and new is not None else None
    return replace(pieces[0], token_ids=ids, logp_mu=logps, routing=routing)


def group_of(episode: str) -> str:
    """The group of an episode, such as ``g000012`` of ``g000012.3``."""
    return episode.rpartition(".")[0]


def number_of(group: str) -> int:
    """The number of a group, such as 12 of ``g000012``."""
    return int(group[1:])
