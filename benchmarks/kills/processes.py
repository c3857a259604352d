"""The processes of a run as the system lists them, and its disk."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

from benchmarks.kills.starts import Start

GONE_S = 20.0
"""Seconds that the processes of a run may take to go after it."""
DISK_BYTES = 256 << 20


def family(root: int) -> list[tuple[int, str]]:
    """The process ids and names of all descendants of a process."""
    parents, titles = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            before, _, after = path.read_text().rpartition(")")
        except OSError:
            continue
        pid = int(path.parent.name)
        titles[pid], parents[pid] = before.partition("(")[2], int(after.split()[1])
    found, frontier = [], {root}
    while frontier := {pid for pid, parent in parents.items() if parent in frontier}:
        found += [(pid, titles[pid]) for pid in sorted(frontier)]
    return found


def born(pid: int) -> str | None:
    """When a process that runs began, as the system counts; one that has ended and that nobody waited for does not run."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return fields[19] if fields[0] != "Z" else None


def left_over(members: Iterable[tuple[int, str | None]]) -> list[int]:
    """Those of some processes, each with its birth, that do not go."""
    ends, members = time.monotonic() + GONE_S, [member for member in members if member[1] is not None]
    while (left := [pid for pid, birth in members if born(pid) == birth]) and time.monotonic() < ends:
        time.sleep(0.1)
    return left


def end_all(process: Start, others: Iterable[int] = ()) -> None:
    """Leave nothing of a run behind, however it went."""
    for pid in [*(pid for pid, _ in family(process.pid)), *others]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.kill()


class Disk:
    """A folder for a run; a small disk of its own, if it is to be one and this user may mount it. Else files are limited."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._filler, self.is_mounted = folder, folder / "filler", False

    def open(self, *, is_small: bool) -> None:
        """Make the folder."""
        self._folder.mkdir(parents=True, exist_ok=True)
        if is_small and os.geteuid() == 0:
            mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "kills", str(self._folder)]
            self.is_mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0

    def fill(self, controller: int, log: Path) -> None:
        """Let nothing more be written: by anyone, or by the controller at the end of the log."""
        if not self.is_mounted:
            size = log.stat().st_size
            resource.prlimit(controller, resource.RLIMIT_FSIZE, (size, size))
            return
        with contextlib.suppress(OSError), self._filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 20) if _free(self._folder) > 1 << 20 else bytes(4096))

    def empty(self) -> None:
        """Make room again."""
        self._filler.unlink(missing_ok=True)

    def close(self, kept: Path | None) -> None:
        """Give the disk back; what is on it is copied to `kept`."""
        if self.is_mounted:
            if kept is not None:
                shutil.copytree(self._folder, kept, dirs_exist_ok=True)
            subprocess.run(["umount", "-l", str(self._folder)], check=False)
            self.is_mounted = False


def _free(folder: Path) -> int:
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize
