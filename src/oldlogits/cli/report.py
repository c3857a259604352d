"""``oldlogits report RUN``: write a run's report again from its files."""

from __future__ import annotations

from pathlib import Path

from oldlogits.core.errors import ConfigError
from oldlogits.record.folder import RunFolder
from oldlogits.record.report import write_report


def report(run: Path) -> Path:
    """Write ``report.html`` of a run folder, complete or not; returns its path.

    Raises:
        ConfigError: The folder holds no run.
    """
    if not RunFolder(path=run).events.exists():
        raise ConfigError(
            f"{run} is no run folder",
            got="no events.jsonl" if run.is_dir() else "no folder",
            allowed="a folder that oldlogits train has written",
            fix="pass the folder that was given as --out",
        )
    return write_report(run)
