"""Episodes as a reader sees them: which ones the report shows, and their text token by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, zip_longest
from typing import Final

from oldlogits.record.episodes import Episode, EpisodeSegment

NUM_TINTS: Final = 6
"""Colours of versions; they repeat, and every change of version is labelled as well."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Transcript:
    """An episode to show, and why."""

    title: str
    episode: Episode

    @property
    def turns(self) -> list[list[EpisodeSegment]]:
        """Its segments side by side of one kind: what was read, or what was sampled in one go."""
        return [list(turn) for _, turn in groupby(self.episode.segments, key=lambda segment: segment.kind)]

    def tint(self, segment: EpisodeSegment) -> int:
        """The number of the colour of a sampled segment's version."""
        return list[int | None](self.episode.versions).index(segment.version) % NUM_TINTS

    def tokens(self, segment: EpisodeSegment) -> Iterator[tuple[str, str]]:
        """The text of each sampled token, and its tooltip; all of the text at once where tokens were not recorded."""
        texts = segment.tokens or (segment.text,)
        logps = segment.logp_mu if len(segment.logp_mu) == len(texts) else ()
        for text, logp in zip_longest(texts, logps):
            yield text, f"version {segment.version}" + ("" if logp is None else f"\nlog-prob {logp:.3f}")


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
                chosen.setdefault(episode.id, Transcript(title=period, episode=episode))
    if not chosen:
        return [Transcript(title="Evaluation", episode=e) for e in episodes[-1:]]
    return list(chosen.values())
