"""The seam of tracking tools: what a run tells to W&B, Trackio, TensorBoard, MLflow, or one of your own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from oldlogits.core.registry import Registry

Cell = str | int | float
"""A value of a table of episodes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackedRun:
    """What a tracker is opened with.

    Args:
        name: The name of the run, which is that of its folder.
        folder: An existing folder for what the tracker writes on this machine.
        config: The recipe as resolved, by dotted key.
    """

    name: str
    folder: Path
    config: Mapping[str, object]


class Tracker(Protocol):
    """Takes what a run measures to a tracking tool. Whatever it raises is warned of once, and never ends the run.

    The constructor opens it; the other methods are called one after another from a thread of their own.
    """

    def __init__(self, run: TrackedRun) -> None:
        """Begin to track a run, or go on with one that was resumed."""
        ...

    def log(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Take the metrics of the update that made version `step`, or of an evaluation of that version."""
        ...

    def log_episodes(self, rows: Sequence[Mapping[str, Cell]], *, step: int) -> None:
        """Take the episodes of an update or an evaluation as a table; all rows have the same columns."""
        ...

    def finish(self, report: Path) -> None:
        """End the tracking; `report` is the page that shows the whole run."""
        ...


TRACKERS: Final[Registry[type[Tracker]]] = Registry(
    "tracker",
    key="record.trackers",
    builtin={name: f"oldlogits.record.trackers.{name}:{kind}" for name, kind in (
        ("wandb", "WandbTracker"),
        ("trackio", "TrackioTracker"),
        ("tensorboard", "TensorBoardTracker"),
        ("mlflow", "MlflowTracker"),
    )},
    needs=("log", "log_episodes", "finish"),
)  # fmt: skip
"""The built-in tracking tools. Each has the name of its package, which its own file alone imports."""
