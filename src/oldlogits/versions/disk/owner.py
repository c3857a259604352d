"""One owner of a folder at a time."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from oldlogits.core.errors import LogBusyError


def own(folder: Path) -> int:
    """Make a folder if there is none, and lock it.

    Returns:
        An open file that holds the lock, until it is closed or the process ends.

    Raises:
        LogBusyError: It has an owner, who is named.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / "owner.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.pwrite(lock, f"{os.getpid():<20}\n".encode(), 0)
    except BlockingIOError:
        owner = os.pread(lock, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(lock)
        raise LogBusyError(
            f"the versions in {folder} have an owner",
            got=f"a second owner, process {os.getpid()}; the first is process {owner}",
            allowed="one owner at a time",
            fix=f"end process {owner} or close its store, or give another folder",
        ) from None
    except BaseException:
        os.close(lock)
        raise
    return lock
