"""What a report shows, read from the files of a run folder. Everything may be missing: runs end early."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Final

import numpy as np

from oldlogits.record.episodes import Episode, read_episodes
from oldlogits.record.event_log import history, read_events, typed
from oldlogits.record.events import Audited, AverageWasReset, Calibrated, Evaluated, RunEnded, RunStarted, Updated, Warned
from oldlogits.record.folder import RunFolder
from oldlogits.record.summary import Summary, summarise

if TYPE_CHECKING:
    from oldlogits.record.tables import Column

MAX_TOKENS: Final = 200_000
"""Rows of the token tables that the distributions are drawn from."""

_TOKEN_COLUMNS: Final = ("staleness", "log_r_d", "log_r_s", "loss_mask", "band_mask", "clip_mask")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunData:
    """A run as recorded, in order; after a resume, the line of history that went on.

    Args:
        started: None when the run never started.
        calibration: None when there was none.
        ended: The reason in ``run_ended``; None when the process was killed.
        tokens: A sample of the loss tokens, one array a column; arrays of length 0 without tables.
        episodes: Those with text, each id once.
    """

    path: Path
    started: RunStarted | None
    updates: Sequence[Updated]
    evaluations: Sequence[Evaluated]
    audits: Sequence[Audited]
    resets: Sequence[AverageWasReset]
    calibration: Calibrated | None
    warnings: Sequence[str]
    ended: str | None
    error: str
    summary: Summary
    tokens: Mapping[str, Column]
    episodes: tuple[Episode, ...]
    config: str

    def setting(self, name: str) -> str:
        """A field of ``run_started`` as text; "" when absent."""
        value = getattr(self.started, name, None)
        return "" if value is None else str(value)

    def bound(self, name: str) -> float | None:
        """A numeric field of ``run_started``."""
        value: float | None = getattr(self.started, name, None)
        return value


def read_run(path: Path) -> RunData:
    """Read a run folder.

    Raises:
        RecordError: A file is damaged other than by a kill.
    """
    folder = RunFolder(path=path)
    events = list(read_events(folder.events))
    kept = history(events)
    ended = next(iter(typed(kept[-1:], RunEnded)), None)
    tokens = _sample(folder.tokens)
    loss_mask = tokens["loss_mask"].astype(bool)
    return RunData(
        path=path,
        started=next(reversed(typed(kept, RunStarted)), None),
        updates=typed(kept, Updated),
        evaluations=typed(kept, Evaluated),
        audits=typed(kept, Audited),
        resets=typed(kept, AverageWasReset),
        calibration=next(iter(typed(kept, Calibrated)), None),
        warnings=list(dict.fromkeys(warning.message for warning in typed(kept, Warned))),
        ended=ended.reason if ended else None,
        error=ended.error if ended else "",
        summary=summarise(events),
        tokens={name: column[loss_mask] for name, column in tokens.items()},
        episodes=tuple({e.id: e for e in read_episodes(folder.episodes) if e.segments}.values()),
        config=folder.config.read_text(encoding="utf-8") if folder.config.exists() else "",
    )


def binned(updates: Sequence[Updated], max_points: int) -> Sequence[Updated]:
    """Means of consecutive updates, so that at most `max_points` are left; each stands at its last version."""
    size = -(-len(updates) // max_points) or 1
    if size == 1:
        return updates
    chunks = [updates[start : start + size] for start in range(0, len(updates), size)]
    return [Updated(version=chunk[-1].version, metrics=_mean(chunk), staleness_counts={}) for chunk in chunks]


def _mean(chunk: Sequence[Updated]) -> dict[str, float]:
    names = {name for update in chunk for name in update.metrics}
    return {name: fmean(update.metrics[name] for update in chunk if name in update.metrics) for name in names}


def _sample(folder: Path) -> dict[str, Column]:
    """Rows of the token tables; without one, what reads them is not imported."""
    if not any(folder.glob("v*.parquet")):
        return {name: np.empty(0) for name in _TOKEN_COLUMNS}
    from oldlogits.record.tables import sample_tokens

    return sample_tokens(folder, names=_TOKEN_COLUMNS, max_rows=MAX_TOKENS)
