"""What the journal says: one dataclass for each kind of record, and a line with a checksum for each record."""

from __future__ import annotations

import json
import zlib
from base64 import urlsafe_b64encode
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Final, cast, get_args

from pydantic import TypeAdapter

from oldlogits.core.trajectory import Flat, Sampled, Segment, Trajectory
from oldlogits.core.weights import PolicyVersion


@dataclass(frozen=True, slots=True, kw_only=True)
class Admitted:
    """A group of `size` episodes of a training row was started at a version."""

    group: str
    row: int
    version: PolicyVersion
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Grew:
    """An episode has further segments, after the first `start` ones."""

    episode: str
    start: int
    segments: tuple[Segment, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """What the turn after the first `num_segments` segments has sampled after its first `start` tokens.

    The next `Grew` of the episode holds the whole turn.
    """

    episode: str
    num_segments: int
    start: int
    sampled: tuple[Sampled, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """An agent program was given a turn of so many tokens: they are lost where its episode begins again."""

    episode: str
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StateSaved:
    """The state of an environment, as JSON text, after the first `num_segments` segments of its episode."""

    episode: str
    num_segments: int
    state: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanScored:
    """The old log-probs of all tokens of an episode that one version sampled, in nats, in token order."""

    episode: str
    version: PolicyVersion
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """An episode ended well."""

    episode: str
    reward: float
    stop_reason: str
    turn_rewards: tuple[float, ...] = ()
    messages: tuple[Mapping[str, str], ...] = ()

    @classmethod
    def of(cls, first: Trajectory) -> Ended:
        """What became of an episode, by its first branch."""
        return cls(
            episode=first.episode_id,
            reward=first.reward,
            stop_reason=first.stop_reason,
            turn_rewards=first.turn_rewards,
            messages=first.messages,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """The environment ended an episode, at a version; `again`: another one is played in its place."""

    episode: str
    again: bool
    version: PolicyVersion
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Restarted:
    """An episode begins again, at a version: the `num_lost_tokens` that it had are of no use."""

    episode: str
    version: PolicyVersion
    reason: str
    num_lost_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """A group is not trained: what its episodes that ended well have, and what `GroupClosed` says of it."""

    group: str
    version: PolicyVersion
    rewards: tuple[float, ...]
    oldest_version: PolicyVersion
    num_failed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """The groups that are trained at a version."""

    version: PolicyVersion
    groups: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """A version, known by the log-probs that its weights give the fixed probe tokens."""

    version: PolicyVersion
    probe: tuple[float, ...]


Record = (
    Admitted | Grew | Running | Answered | StateSaved | SpanScored | Ended | Failed | Restarted | LeftOut | Taken | Published
)
Told = Admitted | Failed | Restarted | LeftOut
"""What an event tells as well."""

_KINDS: Final = {kind.__name__: TypeAdapter(kind) for kind in get_args(Record)}


def encode(record: Record) -> bytes:
    """Write a record as a line: the CRC-32 of the rest, the kind, and JSON (with Python's names of non-finite numbers)."""
    text = f"{type(record).__name__} {json.dumps(record, default=_fields, separators=(',', ':'))}".encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def decode(line: bytes) -> Record:
    """Read what `encode` wrote; a line that is something else is a ValueError."""
    checksum, _, text = line.rstrip(b"\n").partition(b" ")
    if checksum != b"%08x" % zlib.crc32(text):
        raise ValueError("another checksum")
    kind, _, content = text.partition(b" ")
    if kind.decode() not in _KINDS:
        raise ValueError(f"no such record: {kind.decode()}")
    return cast(Record, _KINDS[kind.decode()].validate_json(content))


def _fields(value: object) -> object:
    if isinstance(value, bytes):
        return urlsafe_b64encode(value).decode()
    if isinstance(value, Flat):
        return list(value)
    assert is_dataclass(value), f"{type(value).__name__} in a record"
    return {field.name: getattr(value, field.name) for field in fields(value)}
