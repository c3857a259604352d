"""What the processes of a run are called where the system lists them (`ps`, `top`, `pkill`)."""

from __future__ import annotations

import contextlib
from pathlib import Path

PREFIX = "oldlogits-"
"""The system keeps 15 characters, so five are left for the kind: oldlogits-train, -engin, -score, -serve."""


def name_process(kind: str) -> None:
    """Name this process after what it does; where the system has no such names, nothing happens."""
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text(f"{PREFIX}{kind}"[:15], encoding="ascii")
