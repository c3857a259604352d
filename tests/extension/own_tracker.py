"""A tracker from outside of the package: the recipe names it by ``tests.extension.own_tracker:JsonTracker``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from oldlogits.core.tracker import Cell, TrackedRun


class JsonTracker:
    """Appends each thing that it is told to a file of JSON lines in its folder."""

    def __init__(self, run: TrackedRun) -> None:
        self._path = run.folder / "told.jsonl"
        self._write(name=run.name, config=dict(run.config))

    def log(self, metrics: Mapping[str, float], *, step: int) -> None:
        self._write(step=step, metrics=dict(metrics))

    def log_episodes(self, rows: Sequence[Mapping[str, Cell]], *, step: int) -> None:
        self._write(step=step, episodes=[dict(row) for row in rows])

    def finish(self, report: Path) -> None:
        self._write(report=report.name)

    def _write(self, **told: object) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(told, default=str) + "\n")
