"""MLflow: at ``MLFLOW_TRACKING_URI``, or in files in ``trackers/mlflow`` of the run folder."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from mlflow.entities import Metric, Param
from mlflow.tracking import MlflowClient

from oldlogits.core.tracker import Cell, TrackedRun

_MAX_METRICS: Final = 1000
_MAX_PARAMS: Final = 100
_MAX_VALUE: Final = 500
"""What a tracking server takes in one call, and characters of a parameter."""


class MlflowTracker:
    """Tracks a run in the experiment "oldlogits"."""

    def __init__(self, run: TrackedRun) -> None:
        """Open the run; a resumed one goes on with the run that lies in the same folder."""
        self._client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{run.folder.resolve()}/mlflow.db")
        found = self._client.get_experiment_by_name("oldlogits")
        experiment = found.experiment_id if found else self._client.create_experiment("oldlogits", _artifacts(run.folder))
        tag = str(run.folder.resolve())
        runs = self._client.search_runs([experiment], f"tags.folder = '{tag}'")
        self._id: str = (
            runs[0] if runs else self._client.create_run(experiment, tags={"folder": tag}, run_name=run.name)
        ).info.run_id
        if not runs:
            params = [Param(key, str(value)[:_MAX_VALUE]) for key, value in run.config.items()]
            for start in range(0, len(params), _MAX_PARAMS):
                self._client.log_batch(self._id, params=params[start : start + _MAX_PARAMS])

    def log(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Log metrics; MLflow knows no "@" in a name."""
        now = int(1000 * time.time())
        found = [Metric(name.replace("@", "."), value, now, step) for name, value in metrics.items()]
        for start in range(0, len(found), _MAX_METRICS):
            self._client.log_batch(self._id, metrics=found[start : start + _MAX_METRICS])

    def log_episodes(self, rows: Sequence[Mapping[str, Cell]], *, step: int) -> None:
        """Log a table as an artifact."""
        table = {"columns": list(rows[0]), "data": [list(row.values()) for row in rows]}
        self._client.log_dict(self._id, table, f"episodes/v{step:06d}-{rows[0]['stage']}.json")

    def finish(self, report: Path) -> None:
        """Attach the report and end the run."""
        if report.exists():
            self._client.log_artifact(self._id, str(report))
        self._client.set_terminated(self._id)


def _artifacts(folder: Path) -> str | None:
    """Where artifacts lie: with a server of one's own it decides."""
    return None if os.environ.get("MLFLOW_TRACKING_URI") else (folder.resolve() / "artifacts").as_uri()
