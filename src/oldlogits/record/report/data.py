"""What a report shows, read from the files of a run folder. Everything may be missing: runs end early."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Final

from oldlogits.record.bus import EventKind
from oldlogits.record.episodes import Episode, read_episodes
from oldlogits.record.event_log import RecordedEvent, history, read_events
from oldlogits.record.folder import RunFolder
from oldlogits.record.jsonl import Json, number
from oldlogits.record.summary import Summary, summarise
from oldlogits.record.tables import Column, sample_tokens

MAX_TOKENS: Final = 200_000
"""Rows of the token tables that the distributions are drawn from."""

_TOKEN_COLUMNS: Final = ("staleness", "log_r_d", "log_r_s", "loss_mask", "band_mask", "clip_mask")


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """The metrics of the update that made `version`, and its trained tokens by staleness."""

    version: int
    metrics: Mapping[str, float]
    staleness_counts: Mapping[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """The held-out episodes of one version, with their 95% interval."""

    version: int
    stage: str
    mode: str
    mean: float
    low: float
    high: float
    num_episodes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunData:
    """A run as recorded, in order; after a resume, the line of history that went on.

    Args:
        started: The fields of ``run_started``; empty when the run never started.
        calibration: The fields of ``calibration``; empty when there was none.
        ended: The reason in ``run_ended``; None when the process was killed.
        tokens: A sample of the loss tokens, one array a column; arrays of length 0 without tables.
        episodes: Those with text, each id once.
    """

    path: Path
    started: Mapping[str, Json]
    updates: tuple[Update, ...]
    evaluations: tuple[Evaluation, ...]
    probe_max_abs_error: float | None
    audits: tuple[RecordedEvent, ...]
    resets: tuple[RecordedEvent, ...]
    calibration: Mapping[str, Json]
    warnings: tuple[str, ...]
    ended: str | None
    error: str | None
    summary: Summary
    tokens: Mapping[str, Column]
    episodes: tuple[Episode, ...]
    config: str

    def setting(self, name: str) -> str:
        """A field of ``run_started`` as text; "" when absent."""
        value = self.started.get(name)
        return "" if value is None else str(value)

    def bound(self, name: str) -> float | None:
        """A numeric field of ``run_started``."""
        return number(self.started.get(name))


def read_run(path: Path) -> RunData:
    """Read a run folder.

    Raises:
        RecordError: A file is damaged other than by a kill.
    """
    folder = RunFolder(path=path)
    events = list(read_events(folder.events))
    kept = history(events)
    ended = next((event for event in reversed(events) if event.kind is EventKind.RUN_ENDED), None)
    if ended is not None and any(event.kind is EventKind.RUN_STARTED for event in events[ended.seq + 1 :]):
        ended = None
    probes = [number(event.fields["max_abs_error"]) for event in kept if event.kind is EventKind.PROBE]
    started = [event for event in kept if event.kind is EventKind.RUN_STARTED]
    return RunData(
        path=path,
        started=started[-1].fields if started else {},
        updates=tuple(_update(event) for event in kept if event.kind is EventKind.UPDATE),
        evaluations=tuple(_evaluation(event) for event in kept if event.kind is EventKind.EVALUATION),
        probe_max_abs_error=max((probe for probe in probes if probe is not None), default=None),
        audits=tuple(event for event in kept if event.kind is EventKind.AUDIT),
        resets=tuple(event for event in kept if event.kind is EventKind.AVERAGE_RESET),
        calibration=next((event.fields for event in kept if event.kind is EventKind.CALIBRATION), {}),
        warnings=tuple(dict.fromkeys(str(event.fields["message"]) for event in kept if event.kind is EventKind.WARNING)),
        ended=str(ended.fields["reason"]) if ended else None,
        error=str(ended.fields["error"]) if ended and ended.fields["error"] else None,
        summary=summarise(events),
        tokens=_loss_tokens(sample_tokens(folder.tokens, names=_TOKEN_COLUMNS, max_rows=MAX_TOKENS)),
        episodes=tuple({e.id: e for e in read_episodes(folder.episodes) if e.segments}.values()),
        config=folder.config.read_text(encoding="utf-8") if folder.config.exists() else "",
    )


def binned(updates: Sequence[Update], max_points: int) -> tuple[Update, ...]:
    """Means of consecutive updates, so that at most `max_points` are left; each stands at its last version."""
    size = -(-len(updates) // max_points) or 1
    if size == 1:
        return tuple(updates)
    chunks = [updates[start : start + size] for start in range(0, len(updates), size)]
    return tuple(Update(version=chunk[-1].version, metrics=_mean(chunk), staleness_counts={}) for chunk in chunks)


def _mean(chunk: Sequence[Update]) -> dict[str, float]:
    names = {name for update in chunk for name in update.metrics}
    return {name: fmean(update.metrics[name] for update in chunk if name in update.metrics) for name in names}


def _update(event: RecordedEvent) -> Update:
    metrics, counts = event.fields["metrics"], event.fields["staleness_counts"]
    return Update(
        version=event.version,
        metrics={name: value for name, raw in _items(metrics) if (value := number(raw)) is not None},
        staleness_counts={int(lag): int(value) for lag, raw in _items(counts) if (value := number(raw)) is not None},
    )


def _items(value: Json) -> Iterable[tuple[str, Json]]:
    return value.items() if isinstance(value, Mapping) else ()


def _evaluation(event: RecordedEvent) -> Evaluation:
    mean, low, high, count = (number(event.fields[name]) for name in ("mean", "low", "high", "num_episodes"))
    mean = float("nan") if mean is None else mean
    return Evaluation(
        version=event.version,
        stage=str(event.fields["stage"]),
        mode=str(event.fields["mode"]),
        mean=mean,
        low=mean if low is None else low,
        high=mean if high is None else high,
        num_episodes=int(count or 0),
    )


def _loss_tokens(columns: Mapping[str, Column]) -> Mapping[str, Column]:
    mask = columns["loss_mask"].astype(bool)
    return {name: column[mask] for name, column in columns.items()}
