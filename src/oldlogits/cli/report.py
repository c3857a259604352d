"""``oldlogits report RUN``: write a run's report again from its files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from oldlogits.core.errors import ConfigError
from oldlogits.record.folder import RunFolder, unreadable_run
from oldlogits.record.report.page import write_report


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportOptions:
    """Write report.html of a run folder again, from its recorded files."""

    run: Annotated[Path, tyro.conf.Positional]
    """A run folder; the run may still go on."""


def command(arguments: Sequence[str]) -> int:
    """Write the report and print where it is."""
    run = tyro.cli(ReportOptions, prog="oldlogits report", args=list(arguments)).run
    if not RunFolder(path=run).events.exists():
        raise ConfigError(
            f"{run} is no run folder",
            got="no events.jsonl" if run.is_dir() else "no folder",
            allowed="a folder that oldlogits train has written",
            fix="pass the folder that was given as --out",
        )
    with unreadable_run(run):
        print(write_report(run))
    return 0
