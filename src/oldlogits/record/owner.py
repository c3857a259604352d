"""The one owner of a run folder: two processes that write into it would count everything twice."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from oldlogits.core.errors import RunFolderError, writing
from oldlogits.record.folder import LOCK

_held: set[int] = set()
"""Open files that lock a folder."""


@contextmanager
def owned(path: Path) -> Iterator[None]:
    """Own a run folder, which is made if it is absent, until the block or this process ends, however it ends.

    Raises:
        RunFolderError: A process that lives owns it.
        RunWriteError: It cannot be written.
    """
    import fcntl  # Unix alone has it

    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
        lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    _held.add(lock)
    try:
        with writing(path / LOCK):
            _lock(lock, path)
        yield
    finally:
        if lock in _held:  # not in a child that was forked
            _held.discard(lock)
            fcntl.flock(lock, fcntl.LOCK_UN)  # for a child, too, that is being forked
            os.close(lock)


def is_owned(path: Path) -> bool:
    """Whether a process that lives owns the folder: a run that goes on."""
    import fcntl

    try:
        lock = os.open(path / LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


def _lock(lock: int, path: Path) -> None:
    import fcntl

    me = f"process {os.getpid()} on {socket.gethostname()}"
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.pread(lock, 1000, 0).decode(errors="replace").strip() or "a process that has just taken it"
        raise RunFolderError(
            f"{path} has an owner: a run is writing it",
            got=f"{me}; the owner is {owner}",
            allowed="one run at a time",
            fix="wait until that run has ended, end it, or choose another --out",
        ) from None
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{me}\n".encode(), 0)


def _let_go() -> None:
    """A child that environment code has forked does not keep the lock of its parent."""
    for lock in _held:
        os.close(lock)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)
