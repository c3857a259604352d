"""What a run knew when it was struck, against what it trained at its end: the tokens that were lost.

The journal is added up here, apart from the product, from its decoded lines.

    struck     what each episode had sampled by the journal, and the tables of the updates that were made
    the end    every token that was trained (or is in flight), by trajectory and position

A known token is lost where the end has another one, or none, at its position. The half turns of which nobody had heard but
the engine are estimated: as many tokens as the turn has that was sampled in their place.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet as pq

from oldlogits.core.trajectory import Sampled, Segment
from oldlogits.rollout.journal.records import Admitted, Ended, Grew, LeftOut, Record, Restarted, Running, decode

Token = tuple[int, int]
"""A token's id, and the version that sampled it."""
Tokens = Mapping[str, Mapping[int, Token]]
"""The sampled tokens of trajectories by position."""


@dataclass(slots=True, kw_only=True)
class Episode:
    """What the journal says of an episode."""

    segments: list[Segment] = field(default_factory=list)
    running: Sequence[Segment] = ()
    has_ended: bool = False

    @property
    def known(self) -> list[Segment]:
        """All its segments."""
        return [*self.segments, *self.running]

    @property
    def length(self) -> int:
        """Its tokens, context included."""
        return sum(len(segment.token_ids) for segment in self.known)

    @property
    def samples(self) -> bool:
        """Whether a turn of it is being sampled."""
        return not self.has_ended and bool(self.segments) and (bool(self.running) or not isinstance(self.segments[-1], Sampled))

    @property
    def tokens(self) -> dict[int, Token]:
        """Its sampled tokens by position."""
        found: dict[int, Token] = {}
        at = 0
        for segment in self.known:
            if isinstance(segment, Sampled):
                found |= {at + k: (token, segment.version) for k, token in enumerate(segment.token_ids)}
            at += len(segment.token_ids)
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A run when it was struck: its episodes since the checkpoint from which it can go on, and its updates by version.

    Args:
        restarted: Episodes that have begun again, because their environment could not be carried on.
    """

    episodes: Mapping[str, Episode]
    trained: Mapping[int, Tokens]
    checkpoint: int
    restarted: frozenset[str] = frozenset()

    @property
    def num_sampled(self) -> int:
        """Sampled tokens that it had: those taught to the checkpoint, and those since."""
        taught = [
            tokens for version, tables in self.trained.items() if version <= self.checkpoint for tokens in tables.values()
        ]
        return sum(map(len, taught)) + sum(len(episode.tokens) for episode in self.episodes.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """What one strike cost.

    Args:
        num_known: Tokens that the journal knew and that the end does not have.
        num_restarted: The same of episodes that have begun again, because their environment could not be carried on.
        num_half_turns: An estimate of those that only the engine knew.
        num_sampled: Sampled tokens that the run had when it was struck.
        wrong: What must never be.
    """

    num_known: int = 0
    num_restarted: int = 0
    num_half_turns: int = 0
    num_sampled: int = 0
    wrong: tuple[str, ...] = ()

    @property
    def num(self) -> int:
        """All of them, but those that no run could keep."""
        return self.num_known + self.num_half_turns


def episodes_of(records: Iterable[Record]) -> dict[str, Episode]:
    """Add up the records of a journal."""
    found: dict[str, Episode] = {}
    groups: set[str] = set()
    for record in records:
        match record:
            case Admitted():
                groups.add(record.group)
            case LeftOut():
                groups.discard(record.group)
                found = {id: episode for id, episode in found.items() if _group(id) != record.group}
            case Restarted():
                found.pop(record.episode, None)
            case Grew() | Running() | Ended() if _group(record.episode) in groups:
                episode = found.setdefault(record.episode, Episode())
                if isinstance(record, Grew):
                    episode.segments += record.segments
                    episode.running = ()
                elif isinstance(record, Running):
                    episode.running = (*episode.running, *record.sampled)
                else:
                    episode.has_ended = True
    return found


def losses(
    snapshots: Sequence[Snapshot],
    end: Mapping[int, Tokens],
    in_flight: Tokens,
    num_slots: int,
    restarted: Set[str] = frozenset(),
) -> list[Loss]:
    """What each strike cost; a token that several strikes saw counts for the last one, after which it was gone.

    Args:
        snapshots: The run at every strike, in order.
        end: Its updates at the end, by version.
        in_flight: What it had in flight then.
        num_slots: Turns that the engine samples at the same time.
        restarted: Episodes that have begun again since no run could carry on their environment.
    """
    kept = {id: tokens for tables in end.values() for id, tokens in tables.items()}
    kept |= {id: tokens for id, tokens in in_flight.items() if id not in kept}
    seen: set[tuple[str, int, Token]] = set()
    found: list[Loss] = []
    for snapshot in reversed(snapshots):
        gone = {
            (id, at, token)
            for id, episode in snapshot.episodes.items()
            for at, token in episode.tokens.items()
            if kept.get(id, {}).get(at) != token
        }
        half = sorted(
            (
                _turn_from(kept.get(id, {}), episode.length)
                for id, episode in snapshot.episodes.items()
                if episode.samples and id not in restarted
            ),
            reverse=True,
        )
        found.append(
            Loss(
                num_known=sum(id not in restarted for id, _, _ in gone - seen),
                num_restarted=sum(id in restarted for id, _, _ in gone - seen),
                num_half_turns=sum(half[:num_slots]),
                num_sampled=snapshot.num_sampled,
                wrong=tuple(_wrong(snapshot, end, kept)),
            )
        )
        seen |= gone
    return found[::-1]


def snapshot_of(run: Path, checkpoint: Path, number: int, in_flight: str) -> Snapshot:
    """Read a run folder whose run has ended.

    Args:
        run: The folder.
        checkpoint: The checkpoint from which it goes on.
        number: The number of the file of the journal that begins there.
        in_flight: Where the groups in flight lie in the checkpoint.
    """
    files = [checkpoint / in_flight, *_journal(run, number)]
    records = list(_read(files))
    return Snapshot(
        episodes=episodes_of(records),
        trained=tables_of(run),
        checkpoint=int(checkpoint.name[1:]),
        restarted=frozenset({record.episode for record in records if isinstance(record, Restarted)} | _restarted(run)),
    )


def loss_of_all(run: Path) -> Loss:
    """What a run costs that was struck before its first checkpoint, from which alone it could go on."""
    num = sum(len(episode.tokens) for episode in episodes_of(_read(_journal(run, 0))).values())
    return Loss(num_known=num, num_sampled=num)


def tables_of(run: Path) -> dict[int, Tokens]:
    """The sampled tokens that each update has trained; one that is not whole, which a kill leaves, is left out."""
    found: dict[int, Tokens] = {}
    for path in sorted((run / "tokens").glob("v*.parquet")):
        try:
            columns = pq.read_table(path, columns=["trajectory", "index", "token_id", "version"]).to_pydict()
        except (OSError, ValueError):
            continue
        tokens: dict[str, dict[int, Token]] = {}
        for id, at, token, version in zip(*columns.values(), strict=True):
            tokens.setdefault(id, {})[at] = (token, version)
        found[int(path.stem[1:])] = tokens
    return found


def faults_of_tables(run: Path, num_updates: int) -> list[str]:
    """Whether every update is there, trained no token twice, and had exact old logits alone."""
    paths = sorted((run / "tokens").glob("*.parquet"))
    wrong = [] if len(paths) == num_updates else [f"{len(paths)} of {num_updates} updates are there"]
    seen: set[tuple[str, int]] = set()
    for path in paths:
        columns = pq.read_table(path, columns=["trajectory", "index", "provenance"]).to_pydict()
        tokens = set(zip(columns["trajectory"], columns["index"], strict=True))
        if len(tokens) != len(columns["index"]) or tokens & seen:
            wrong.append(f"{path.name} trains tokens twice")
        if set(columns["provenance"]) != {"exact"}:
            wrong.append(f"{path.name} has old logits that are not exact")
        seen |= tokens
    return wrong


def _wrong(snapshot: Snapshot, end: Mapping[int, Tokens], kept: Tokens) -> Iterable[str]:
    for id, episode in snapshot.episodes.items():
        if episode.has_ended and dict(kept.get(id, {})) != episode.tokens:
            yield f"{id}, which had ended, was lost"
    for version, tokens in snapshot.trained.items():
        if version in end and end[version] != tokens:
            yield f"update {version} was made again with other tokens"


def _turn_from(tokens: Mapping[int, Token], at: int) -> int:
    """The sampled tokens from a position on without a gap."""
    num = 0
    while at + num in tokens:
        num += 1
    return num


def _journal(run: Path, number: int) -> list[Path]:
    return sorted(path for path in (run / "rollouts").glob("*.jsonl") if int(path.stem) >= number)


def _read(files: Iterable[Path]) -> Iterable[Record]:
    """Read files of records; an incomplete last line, which a kill leaves, is left out."""
    lines = [line for path in files for line in path.read_bytes().splitlines(keepends=True)]
    return (decode(line) for line in lines if line.endswith(b"\n"))


def _restarted(run: Path) -> set[str]:
    """The episodes that have begun again by the events: the journal forgets them with its older files."""
    lines = (run / "events.jsonl").read_bytes().splitlines(keepends=True)
    told = [line for line in lines if b'"kind": "trajectory_restarted"' in line and line.endswith(b"\n")]
    return {json.loads(line)["trajectory"] for line in told}


def _group(episode: str) -> str:
    return episode.rpartition(".")[0]
