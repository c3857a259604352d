"""``oldlogits watch RUN``: a run and those beside it in a browser, live."""

from __future__ import annotations

import webbrowser
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated
from urllib.parse import quote

import tyro

from oldlogits.core.errors import ConfigError
from oldlogits.record.folder import RunFolder
from oldlogits.record.watch.server import WatchServer


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchOptions:
    """Serve a run folder to a browser on this machine: its report as it grows, its newest episodes, the runs beside it.

    Nothing is written, and other machines are not answered; end it with Ctrl-C.
    """

    run: Annotated[Path, tyro.conf.Positional] = Path("runs")
    """A run folder, running or ended, or a folder of run folders."""
    port: int = 8642
    """The port on 127.0.0.1; 0: any that is free."""
    open: bool = True
    """Open it in a browser, where there is one."""


def command(arguments: Sequence[str]) -> int:
    """Serve until it is interrupted."""
    options = tyro.cli(WatchOptions, prog="oldlogits watch", args=list(arguments))
    run = options.run.absolute()
    if not run.is_dir():
        allowed = "a run folder, or a folder of run folders"
        raise ConfigError(
            "there is no such folder", got=str(options.run), allowed=allowed, fix="oldlogits demo makes one in runs/"
        )
    is_run = RunFolder(path=run).events.is_file()
    with WatchServer(run.parent if is_run else run, options.port) as server:
        page = f"{server.url}run/{quote(run.name)}" if is_run else server.url
        print(f"watching {options.run}: {page}    (Ctrl-C ends it)", flush=True)
        if options.open:
            webbrowser.open(page)
        server.serve_forever()
    return 0
