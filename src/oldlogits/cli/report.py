"""``oldlogits report RUN [RUN ...]``: write a run's report again from its files, or several runs on one page."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from oldlogits.core.errors import ConfigError
from oldlogits.record.folder import RunFolder, unreadable_run
from oldlogits.record.report.comparison import write_comparison
from oldlogits.record.report.page import write_report


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportOptions:
    """Write report.html of a run folder again, from its recorded files; of several, one page that compares them."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders; a run may still go on."""
    out: Path = Path("comparison.html")
    """With several runs: where the page goes."""


def command(arguments: Sequence[str]) -> int:
    """Write the page and print where it is."""
    options = tyro.cli(ReportOptions, prog="oldlogits report", args=list(arguments))
    for run in options.runs:
        if not RunFolder(path=run).events.exists():
            raise ConfigError(
                f"{run} is no run folder",
                got="no events.jsonl" if run.is_dir() else "no folder",
                allowed="a folder that oldlogits train has written",
                fix="pass the folder that was given as --out",
            )
    if not options.runs:
        raise ConfigError("no run is named", got="nothing", allowed="run folders", fix="oldlogits report runs/NAME")
    with ExitStack() as stack:
        for run in options.runs:
            stack.enter_context(unreadable_run(run))
        print(write_report(options.runs[0]) if len(options.runs) == 1 else write_comparison(options.runs, options.out))
    return 0
