"""An evaluation on disk, as `oldlogits eval` writes it: its episodes, what they come to, and what two of them differ by.

OUT/config.toml   OUT/episodes.jsonl   OUT/transcripts.txt   OUT/summary.json
"""

from __future__ import annotations

import json
import textwrap
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Final, Literal, Self

from pydantic import TypeAdapter, ValidationError

from oldlogits.core.trajectory import is_success
from oldlogits.record.episodes import EpisodeSegment
from oldlogits.record.events import Evaluated
from oldlogits.record.failures import tallied
from oldlogits.record.folder import write_atomic
from oldlogits.record.intervals import Interval, mean_interval, paired_gain
from oldlogits.record.jsonl import RecordError, encode, read_lines
from oldlogits.record.trials import avg_at_k, pass_at_k

_WIDTH: Final = 80


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluatedEpisode:
    """One episode of an evaluation.

    Args:
        row: The number of its row, from 0.
        repeat: How often the row was played before.
        subset: The value of the field by which results are told apart; empty: there is no such field.
        task: A digest of the row.
        reward: None where the episode failed.
        failure: Why it failed; empty: it did not.
        branches: The text of each of its conversations.
    """

    id: str
    row: int
    repeat: int
    subset: str
    task: str
    reward: float | None
    failure: str
    stop_reason: str
    num_turns: int
    branches: tuple[tuple[EpisodeSegment, ...], ...]

    def transcript(self) -> str:
        """The episode as text of at most 80 columns."""
        verdict = f"failed: {self.failure}" if self.reward is None else f"reward {self.reward:g}, {self.stop_reason}"
        head = f"{self.id}: row {self.row}, repeat {self.repeat}{f', {self.subset}' if self.subset else ''}, {verdict}"
        lines = ["=" * _WIDTH, *textwrap.wrap(head, _WIDTH)]
        for branch in self.branches:
            lines.append("-" * _WIDTH)
            for segment in branch:
                lines += _told("agent" if segment.kind == "sampled" else "", segment.text)
        return "\n".join([*lines, ""])


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What episodes come to; None: none was played. Intervals are over rows: repeats of a row are no independent tasks.

    Args:
        success: The mean over rows of each one's rate of success, which is avg@k where each was played `k` times.
        pass_at: pass@k by `k`, from 2 to the number of repeats: over the rows that were played `k` times or more.
        num_whole: Rows that were played as often as they were to be, which are those of the last pass@k.
    """

    success: Interval | None
    reward: Interval | None
    num_played: int
    num_failed: int
    pass_at: Mapping[str, Interval] = field(default_factory=dict)
    num_whole: int = 0

    def __str__(self) -> str:
        """``50.0% [25.4%, 74.6%] of 12, mean reward 0.500 [0.205, 0.795]``."""
        failed = f", {self.num_failed} failed" if self.num_failed else ""
        if self.success is None or self.reward is None:
            return f"none played{failed}"
        return f"{self.success} of {self.num_played}{failed}, mean reward {self.reward.plain}"

    @classmethod
    def of(cls, episodes: Sequence[EvaluatedEpisode], success_at: float, repeats: int = 1) -> Self:
        """Add up episodes of rows that were to be played `repeats` times each."""
        return cls.of_rewards([(episode.row, episode.reward) for episode in episodes], success_at, repeats)

    @classmethod
    def of_rewards(cls, episodes: Sequence[tuple[int, float | None]], success_at: float, repeats: int = 1) -> Self:
        """Add up episodes, each by the number of its row and its reward."""
        rewards = _by_row(episodes)
        played = [reward for found in rewards.values() for reward in found]
        if not played:
            return cls(success=None, reward=None, num_played=0, num_failed=len(episodes))
        hits = [[is_success(reward, success_at) for reward in found] for found in rewards.values()]
        by_k = {k: [found for found in hits if len(found) >= k] for k in range(2, repeats + 1)}
        return cls(
            success=avg_at_k(hits, 1),
            reward=mean_interval([fmean(found) for found in rewards.values()]),
            num_played=len(played),
            num_failed=len(episodes) - len(played),
            pass_at={str(k): pass_at_k(found, k) for k, found in by_k.items() if found},
            num_whole=sum(len(found) >= repeats for found in hits),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSummary:
    """What an evaluation came to.

    Args:
        subset: The field by which results are told apart; empty: none.
        num_episodes: Those that were to be played; `all` counts those that were.
        failures: Failed episodes by reason.
        gateway: What an agent program asked for, and what became of it, as in the summary of a run; empty: there is none.
    """

    model: str
    target: str
    mode: Literal["sampled", "greedy"]
    success_at: float
    num_rows: int
    repeats: int
    num_episodes: int
    all: Figures
    subset: str
    subsets: Mapping[str, Figures]
    failures: Mapping[str, int]
    seconds_s: float
    gateway: Mapping[str, int] = field(default_factory=dict)

    def write(self, out: Path) -> None:
        """Write ``summary.json`` into the folder of the evaluation."""
        write_atomic(out / "summary.json", json.dumps(json.loads(encode(asdict(self))), indent=2, ensure_ascii=False) + "\n")


def subsets_of(episodes: Sequence[EvaluatedEpisode], success_at: float, repeats: int = 1) -> dict[str, Figures]:
    """What the episodes of each subset come to, by its name."""
    names = sorted({episode.subset for episode in episodes} - {""})
    return {name: Figures.of([e for e in episodes if e.subset == name], success_at, repeats) for name in names}


def by_environment(evaluated: Evaluated) -> dict[str, Figures]:
    """What an evaluation within a run comes to for each environment of a mixture; empty without one."""
    rewards: dict[str, list[tuple[int, float | None]]] = {}
    for row, (name, reward) in enumerate(zip(evaluated.environments, evaluated.rewards, strict=False)):
        rewards.setdefault(name, []).append((row, reward))
    return {name: Figures.of_rewards(rewards[name], evaluated.success_at) for name in sorted(rewards)}


def failures_of(episodes: Sequence[EvaluatedEpisode]) -> dict[str, int]:
    """Failed episodes by reason."""
    return tallied(episode.failure for episode in episodes if episode.reward is None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What the second of two evaluations of the same rows has more than the first, over the rows that both played."""

    success: Interval
    reward: Interval
    num_left_out: int


def compare(first: Path, second: Path) -> dict[str, Comparison]:
    """Compare two evaluations, row by row: all rows under the name "all", then those of each subset.

    Raises:
        RecordError: They are none, or not of the same rows and the same measure.
    """
    a, b = ((read_summary(out), list(read_evaluation(out))) for out in (first, second))
    if a[0].success_at != b[0].success_at:
        got = f"success at {a[0].success_at:g} and at {b[0].success_at:g}"
        raise RecordError(
            "two evaluations call different things a success", got=got, allowed="one eval.success_at", fix="evaluate one again"
        )
    rows = [{episode.row: (episode.task, episode.subset) for episode in episodes} for _, episodes in (a, b)]
    other = [row for row in rows[0].keys() & rows[1].keys() if rows[0][row][0] != rows[1][row][0]]
    if other or not rows[0].keys() & rows[1].keys():
        got = f"row {min(other)} is another task" if other else "no row in common"
        fix = "evaluate both with the same env.target and env.eval_data"
        raise RecordError("two evaluations are of other tasks", got=got, allowed="the same held-out rows", fix=fix)
    names = sorted({subset for _, subset in rows[0].values()} - {""}) if a[0].subset == b[0].subset else []
    found = {"all": _compared(a[1], b[1], a[0].success_at)}
    for name in names:
        of_first, of_second = ([e for e in episodes if e.subset == name] for _, episodes in (a, b))
        found[name] = _compared(of_first, of_second, a[0].success_at)
    return found


def _compared(first: Sequence[EvaluatedEpisode], second: Sequence[EvaluatedEpisode], success_at: float) -> Comparison:
    before, after = (_by_row([(episode.row, episode.reward) for episode in found]) for found in (first, second))
    both = sorted(before.keys() & after.keys())
    if not both:
        raise RecordError("no row was played in both", got="0 rows", allowed="at least 1", fix="evaluate again")
    hits = [[fmean(is_success(reward, success_at) for reward in found[row]) for row in both] for found in (before, after)]
    means = [[fmean(found[row]) for row in both] for found in (before, after)]
    num_rows = len({episode.row for episode in (*first, *second)})
    return Comparison(success=paired_gain(*hits), reward=paired_gain(*means), num_left_out=num_rows - len(both))


def read_summary(out: Path) -> EvaluationSummary:
    """Read the summary of an evaluation.

    Raises:
        RecordError: There is none.
    """
    try:
        return TypeAdapter(EvaluationSummary).validate_json((out / "summary.json").read_text(encoding="utf-8"), extra="forbid")
    except (OSError, ValidationError) as error:
        raise _unreadable(out, error) from error


def read_evaluation(out: Path) -> Iterator[EvaluatedEpisode]:
    """Read the episodes of an evaluation, in the order in which they ended.

    Raises:
        RecordError: A line is none.
    """
    adapter = TypeAdapter(EvaluatedEpisode)
    for line in read_lines(out / "episodes.jsonl"):
        try:
            yield adapter.validate_python(line, extra="forbid")
        except ValidationError as error:
            raise _unreadable(out, error) from error


def _unreadable(out: Path, error: Exception) -> RecordError:
    allowed, fix = "the folder that oldlogits eval has written", "name what was given as --out"
    return RecordError("an evaluation cannot be read", got=f"{out}: {error}"[:300], allowed=allowed, fix=fix)


def _by_row(episodes: Sequence[tuple[int, float | None]]) -> dict[int, list[float]]:
    """The rewards of each row that was played."""
    found: dict[int, list[float]] = defaultdict(list)
    for row, reward in episodes:
        if reward is not None:
            found[row].append(reward)
    return found


def _told(who: str, text: str) -> Iterator[str]:
    """A text beside the name of who said it."""
    for number, line in enumerate(text.splitlines() or [""]):
        for part in textwrap.wrap(line, _WIDTH - 8, break_on_hyphens=False) or [""]:
            yield f"{who if not number else '':>5} | {part}".rstrip()
            who = ""
