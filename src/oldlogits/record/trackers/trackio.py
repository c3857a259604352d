"""Trackio: metrics in a local database, shown by ``trackio show``; ``TRACKIO_DIR`` says where it lies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import trackio

from oldlogits.core.tracker import Cell, TrackedRun


class TrackioTracker:
    """Tracks a run in the project "oldlogits" of the local database."""

    def __init__(self, run: TrackedRun) -> None:
        """Open the run; a resumed one goes on under the same name."""
        self._run = trackio.init(
            project="oldlogits", name=run.name, config=dict(run.config), resume="allow", embed=False, auto_log_gpu=False
        )

    def log(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Log metrics."""
        self._run.log(dict(metrics), step=step)

    def log_episodes(self, rows: Sequence[Mapping[str, Cell]], *, step: int) -> None:
        """Log a table."""
        self._run.log({"episodes": trackio.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])}, step=step)

    def finish(self, report: Path) -> None:
        """Say where the report lies and end the run."""
        self._run.log({"report": trackio.Markdown(f"report of the run: `{report.resolve()}`")})
        self._run.finish()
