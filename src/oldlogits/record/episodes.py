"""``episodes.jsonl``: one JSON line an episode; some carry their text, token by token, with the version that sampled it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Literal, cast

from pydantic import TypeAdapter, ValidationError

from oldlogits.core.environment import Split
from oldlogits.core.trajectory import Sampled, Segment, Trajectory
from oldlogits.record.bus import Event
from oldlogits.record.events import Evaluated, Updated
from oldlogits.record.jsonl import LineFile, RecordError, read_lines

Stage = Literal["train", "before", "during", "after"]
Decode = Callable[[Sequence[int]], str]
"""Token ids to text."""

_NUM_EVALUATED: Final = 4
"""Episodes of an evaluation that are written."""
_NUM_BEFORE: Final = 12
"""Tokens before a token that are decoded with it: more than the bytes of any three characters that a cut leaves incomplete."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeSegment:
    """Text that the agent read, or that one version of it sampled.

    Args:
        version: The version that sampled it; None for context.
        tokens: The decoded tokens one by one; may be left empty.
        logp_mu: The log-prob of each; empty, or as many as `tokens`.
    """

    kind: Literal["context", "sampled"]
    text: str
    num_tokens: int
    version: int | None = None
    tokens: tuple[str, ...] = ()
    logp_mu: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Episode:
    """One episode; `segments` holds its text, which is left out for most.

    Args:
        version: The version that its update made; for an evaluation, the version that was evaluated.
        versions: The distinct versions that sampled it, ascending.
        turn_rewards: What the environment gave for each turn, where it does; they are a part of `reward`.
    """

    id: str
    group: str
    version: int
    split: Split
    stage: Stage
    reward: float
    stop_reason: str
    num_turns: int
    versions: tuple[int, ...]
    turn_rewards: tuple[float, ...] = ()
    segments: tuple[EpisodeSegment, ...] = ()


class EpisodeRecorder:
    """Writes the episodes of updates and, a few of each, of evaluations.

    Args:
        file: The file to write to, ``episodes.jsonl``.
        decode: Turns token ids into text, for transcripts.
        every: Updates between two of which the first group is written with its text; 0: none is.
        others: Whoever else takes each episode.
    """

    def __init__(self, file: LineFile, decode: Decode, *, every: int, others: Sequence[Callable[[Episode], None]] = ()) -> None:
        self._file, self._decode, self._every, self._others = file, decode, every, others

    def emit(self, event: Event) -> None:
        """Write the episodes that an event brings."""
        if isinstance(event, Updated):
            with_text = bool(self._every) and (event.version - 1) % self._every == 0
            first = event.trajectories[0].group_id if event.trajectories else ""
            for trajectory in event.trajectories:
                self._write(trajectory, event.version, "train", with_text=with_text and trajectory.group_id == first)
        elif isinstance(event, Evaluated):
            for trajectory in event.trajectories[:_NUM_EVALUATED]:
                self._write(trajectory, event.version, cast(Stage, event.stage), with_text=True)

    def _write(self, trajectory: Trajectory, version: int, stage: Stage, *, with_text: bool) -> None:
        episode = Episode(
            id=trajectory.id,
            group=trajectory.group_id,
            version=version,
            split="train" if stage == "train" else "heldout",
            stage=stage,
            reward=trajectory.reward,
            stop_reason=trajectory.stop_reason,
            num_turns=trajectory.num_turns,
            versions=trajectory.versions,
            turn_rewards=trajectory.turn_rewards,
            segments=tuple(map(self._segment, trajectory.segments)) if with_text else (),
        )
        self._file.append(asdict(episode))
        for take in self._others:
            take(episode)

    def _segment(self, segment: Segment) -> EpisodeSegment:
        ids = tuple(segment.token_ids)
        if not isinstance(segment, Sampled):
            return EpisodeSegment(kind="context", text=self._decode(ids), num_tokens=len(ids))
        text = self._decode(ids)
        return EpisodeSegment(
            kind="sampled",
            text=text,
            num_tokens=len(ids),
            version=segment.version,
            tokens=pieces_of(text, ids, self._decode),
            logp_mu=tuple(segment.logp_mu),
        )


def pieces_of(text: str, ids: Sequence[int], decode: Decode) -> tuple[str, ...]:
    """Give the text that each token adds to those before it; the pieces joined are the text.

    Each token is decoded behind a few of those before it, so that the time grows with their number and not with its square.
    One that ends within a character adds nothing; the character is of the token that completes it. Where the pieces of a
    tokenizer do not add up to the text, the first holds all of it.
    """
    pieces: list[str] = []
    for index in range(len(ids)):
        start = max(0, index - _NUM_BEFORE)
        before, after = _whole(decode(ids[start:index])), decode(ids[start : index + 1])
        pieces.append((after if index == len(ids) - 1 else _whole(after))[len(before) :])
    return tuple(pieces) if "".join(pieces) == text else (text, *[""] * (len(ids) - 1))


def _whole(text: str) -> str:
    """The text without what may be the beginning of a character: at most three bytes, each shown as U+FFFD."""
    return text[:-3] + text[-3:].rstrip("\ufffd")


def read_episodes(path: Path) -> Iterator[Episode]:
    """The episodes of a file in order; an incomplete last line is left out.

    Raises:
        RecordError: A line is no episode.
    """
    adapter = TypeAdapter(Episode)
    for line in read_lines(path):
        try:
            yield adapter.validate_python(line, extra="forbid")
        except ValidationError as error:
            raise RecordError(
                f"a line of {path.name} is no episode",
                got=repr(error),
                allowed="the fields of Episode",
                fix="read the folder with the version of oldlogits that wrote it",
            ) from error
