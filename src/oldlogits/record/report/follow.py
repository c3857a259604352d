"""Writes ``report.html`` again and again while a run goes on, in a process of its own that gives way to the run's."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Final

from oldlogits.record.bus import Event
from oldlogits.record.events import Updated

EVERY_S: Final = 30.0
"""Seconds at least from the end of one writing to the beginning of the next."""
SHARE: Final = 0.02
"""The largest share of the time in which one is written: it takes longer the longer the run has gone on."""

_WRITE: Final = "import os, sys; os.nice(19); from oldlogits.cli.main import run; sys.exit(run(['report', sys.argv[1]]))"


class ReportFollower:
    """Subscribes to a run's events: after the first update, and then from time to time, it has the report written.

    Args:
        folder: The run folder.
        every_s: Seconds at least between two writings.
    """

    def __init__(self, folder: Path, *, every_s: float = EVERY_S) -> None:
        self._folder, self._every_s = folder, every_s
        self._writer: subprocess.Popen[bytes] | None = None
        self._began = self._next = 0.0

    def emit(self, event: Event) -> None:
        """Begin to write after an update, unless the last writing goes on or is too recent."""
        if not isinstance(event, Updated):
            return
        now = time.monotonic()
        if self._writer is not None and self._writer.poll() is not None:
            self._writer, self._next = None, now + max(self._every_s, (now - self._began) / SHARE)
        if self._writer is None and now >= self._next:
            self._began = now
            command, null = [sys.executable, "-c", _WRITE, str(self._folder)], subprocess.DEVNULL
            self._writer = subprocess.Popen(command, stdin=null, stdout=null, stderr=null, start_new_session=True)

    def close(self) -> None:
        """End what is being written: the run's own last report comes after it."""
        if self._writer is not None:
            self._writer.kill()
            self._writer.wait()
            self._writer = None
