"""Runs a command in its process group until it ends, or until standard input does: a server never outlives its run.

python leash.py COMMAND ...      whoever holds the other end of standard input holds the leash, even if killed

The command ends with this process, too, however that ends: some supervisors kill children, and not what these have started.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
from typing import Final

_PR_SET_PDEATHSIG: Final = 1


def main(command: list[str]) -> int:
    """Run it; returns its exit status, or ends all of the group with SIGKILL."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=_die_with_parent)
    threading.Thread(target=_wait_for_the_end_of_input, daemon=True).start()
    status = process.wait()
    return status if status >= 0 else 128 - status


def _die_with_parent() -> None:
    """Ask Linux for SIGKILL at the end of the parent."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _wait_for_the_end_of_input() -> None:
    while os.read(0, 1024):
        pass
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
