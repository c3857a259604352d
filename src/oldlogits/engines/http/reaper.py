"""Runs a command in its process group until it or a given parent ends: a server never outlives its run.

python reaper.py PARENT COMMAND ...     ends the command when the parent, a process id, is gone, even if killed

The command ends with this process, too, however that ends: some supervisors kill children, and not what these have started.

What a group has in shared memory under the names of Python's `multiprocessing` (such as vLLM's message queues) is removed with
it: the process that would do so is killed with the others.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

_PR_SET_PDEATHSIG: Final = 1
_LOOK_S: Final = 0.2
_SHARED_MEMORY: Final = Path("/dev/shm")


def main(parent: int, command: list[str]) -> int:
    """Run it; returns its exit status, or ends all of the group with SIGKILL."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=_die_with_parent)
    threading.Thread(target=_outlive, args=(parent,), daemon=True).start()
    status = process.wait()
    return status if status >= 0 else 128 - status


def _die_with_parent() -> None:
    """Ask Linux for SIGKILL at the end of the parent."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _outlive(parent: int) -> None:
    """End the group after the parent; a pipe would not tell where a fork of the parent holds its other end."""
    while os.getppid() == parent:
        time.sleep(_LOOK_S)
    end_group(os.getpgrp())


def end_group(group: int) -> None:
    """End all processes of a group at once, whatever they do, and remove what they leave in shared memory."""
    for path in mapped(group):
        with suppress(OSError):
            path.unlink()
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def mapped(group: int) -> list[Path]:
    """Files of `multiprocessing` that processes of a group have mapped; none where the system does not list them."""
    inodes = set(_mapped_inodes(group))  # a semaphore is mapped under the name that it had first
    found = []
    for path in (path for pattern in ("psm_*", "sem.mp-*") for path in _SHARED_MEMORY.glob(pattern)):
        with suppress(OSError):  # somebody else's, and gone by now
            if path.stat().st_ino in inodes:
                found.append(path)
    return found


def _mapped_inodes(group: int) -> Iterator[int]:
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or is somebody else's
            if os.getpgid(int(folder.name)) == group:
                for line in (folder / "maps").read_text().splitlines():
                    if f" {_SHARED_MEMORY}/" in line:
                        yield int(line.split()[4])


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
