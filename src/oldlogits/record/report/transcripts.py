"""Episodes as a reader sees them: which ones the report shows, and their text token by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Final

from oldlogits.record.episodes import Episode, EpisodeSegment

NUM_TINTS: Final = 6
"""Colours of versions; they repeat, and every change of version is labelled as well."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """A sampled token: its text and its tooltip."""

    text: str
    tip: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Tokens of one version, with the number of its colour."""

    version: int
    tint: int
    tokens: tuple[Token, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What was read (`text`), or what was sampled in one go (`spans`)."""

    text: str = ""
    num_tokens: int = 0
    spans: tuple[Span, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Transcript:
    """An episode to show, and why."""

    title: str
    episode: Episode
    turns: tuple[Turn, ...]


def chosen_transcripts(episodes: Sequence[Episode]) -> list[Transcript]:
    """The lowest and the highest reward, early and late in training; of equals, those of the most versions."""
    training = sorted((e for e in episodes if e.stage == "train"), key=lambda e: e.version)
    third = -(-len(training) // 3)
    early, late = training[:third], training[third:][-third:][::-1]
    chosen: dict[str, Transcript] = {}
    for period, pool in (("Early in training", early), ("Late in training", late)):
        if pool:
            lowest = min(pool, key=lambda e: (e.reward, -len(e.versions)))
            highest = max(pool, key=lambda e: (e.reward, len(e.versions)))
            for episode in (lowest, highest):
                chosen.setdefault(episode.id, Transcript(title=period, episode=episode, turns=tuple(_turns(episode))))
    if not chosen:
        return [Transcript(title="Evaluation", episode=e, turns=tuple(_turns(e))) for e in episodes[-1:]]
    return list(chosen.values())


def _turns(episode: Episode) -> Iterator[Turn]:
    tints = {version: index % NUM_TINTS for index, version in enumerate(sorted(set(episode.versions)))}
    for kind, group in groupby(episode.segments, key=lambda segment: segment.kind):
        segments = list(group)
        num_tokens = sum(segment.num_tokens for segment in segments)
        if kind == "context":
            yield Turn(text="".join(segment.text for segment in segments), num_tokens=num_tokens)
        else:
            yield Turn(spans=tuple(_span(segment, tints) for segment in segments), num_tokens=num_tokens)


def _span(segment: EpisodeSegment, tints: dict[int, int]) -> Span:
    version = -1 if segment.version is None else segment.version
    texts = segment.tokens or (segment.text,)
    logps = segment.logp_mu if len(segment.logp_mu) == len(texts) else (None,) * len(texts)
    tokens = tuple(Token(text=text, tip=_tip(version, logp)) for text, logp in zip(texts, logps, strict=True))
    return Span(version=version, tint=tints.get(version, 0), tokens=tokens)


def _tip(version: int, logp_mu: float | None) -> str:
    return f"version {version}" if logp_mu is None else f"version {version}\nlog-prob {logp_mu:.3f}"
