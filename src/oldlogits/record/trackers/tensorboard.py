"""TensorBoard: event files in ``trackers/tensorboard`` of the run folder; ``tensorboard --logdir RUN`` shows them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from oldlogits.core.tracker import Cell, TrackedRun


class TensorBoardTracker:
    """Writes scalars, and tables and the recipe as text."""

    def __init__(self, run: TrackedRun) -> None:
        """Open the event file; a resumed run writes another one beside it."""
        self._writer = SummaryWriter(str(run.folder))
        recipe = json.dumps(dict(run.config), indent=2, default=str)
        self._writer.add_text("config", f"```json\n{recipe}\n```")

    def log(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Write scalars."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def log_episodes(self, rows: Sequence[Mapping[str, Cell]], *, step: int) -> None:
        """Write a table as Markdown."""
        lines: list[list[Cell]] = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
        cells = [
            "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", "<br>") for cell in line) + " |" for line in lines
        ]
        self._writer.add_text("episodes", "\n".join(cells), step)

    def finish(self, report: Path) -> None:
        """Say where the report lies and close the file."""
        self._writer.add_text("report", f"`{report.resolve()}`")
        self._writer.close()
