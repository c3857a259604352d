"""Weights & Biases. Without a network: ``WANDB_MODE=offline``, and later ``wandb sync`` of the folder in ``trackers/wandb``."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import wandb

from oldlogits.core.tracker import Cell, TrackedRun


class WandbTracker:
    """Tracks a run in the project "oldlogits", or in that of ``WANDB_PROJECT``."""

    def __init__(self, run: TrackedRun) -> None:
        """Open the run; a resumed one goes on under the same id."""
        identity = hashlib.sha256(str(run.folder.resolve()).encode()).hexdigest()[:16]
        settings = wandb.Settings()
        self._run = wandb.init(
            project=settings.project or "oldlogits",
            name=run.name,
            id=identity,
            resume="allow",
            dir=str(run.folder),
            config=dict(run.config),
        )

    def log(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Log metrics."""
        self._run.log(dict(metrics), step=step)

    def log_episodes(self, rows: Sequence[Mapping[str, Cell]], *, step: int) -> None:
        """Log a table."""
        table = wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
        self._run.log({"episodes": table}, step=step)

    def finish(self, report: Path) -> None:
        """Attach the report and end the run."""
        if report.exists():
            self._run.log({"report": wandb.Html(report.read_text(encoding="utf-8"), inject=False)})
        self._run.finish()
