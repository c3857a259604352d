"""The processes of a run: what they are called where the system lists them (`ps`, `top`, `pkill`), and how they ended."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

PREFIX = "oldlogits-"
"""The system keeps 15 characters, so five are left for the kind: oldlogits-train, -engin, -score, -serve."""


def name_process(kind: str) -> None:
    """Name this process after what it does; where the system has no such names, nothing happens."""
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text(f"{PREFIX}{kind}"[:15], encoding="ascii")


def exit_code(process: BaseProcess, patience_s: float = 10.0) -> int | None:
    """The exit code of a child that is ending; None if it does not end.

    Several threads may ask at the same time. The system tells one of them, and `multiprocessing` tells the others that there is
    none until that one has kept it.
    """
    ends = time.monotonic() + patience_s
    process.join(patience_s)
    while process.exitcode is None and time.monotonic() < ends:
        time.sleep(0.001)
    return process.exitcode


def keep_what_is_built() -> None:
    """Have the garbage collector leave alone what this process holds now, such as its modules, for as long as it lives.

    What a started process holds is half a million objects, which a full collection reads each time: 0.3 to 0.5 seconds in which
    nothing else happens.
    """
    gc.collect()
    gc.freeze()


@contextlib.contextmanager
def keeping_what_is_built() -> Iterator[None]:
    """Do so for a while, in a process that others go on to use."""
    keep_what_is_built()
    try:
        yield
    finally:
        gc.unfreeze()
