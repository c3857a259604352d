"""How tests wait: for what happens, not for a time. Time only ends tests that hang."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

HUNG_S: Final = 600.0
"""Seconds after which a wait counts as hung, far beyond what the slowest machine needs; pytest's own limit is above it."""


def wait_until(holds: Callable[[], object], what: str, *, hung_s: float = HUNG_S) -> None:
    """Return as soon as something holds.

    Raises:
        TimeoutError: It does not come to hold.
    """
    ends = time.monotonic() + hung_s
    while not holds():
        if time.monotonic() > ends:
            raise TimeoutError(f"after {hung_s:g} s still not: {what}")
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    """Return whether a process runs; one that has ended and that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
