"""Writes the journal, and reads it back.

    Rollouts, source, loop --records--> queue --> writer thread --> rollouts/000007.log

    rollouts/000007.base    all groups in flight at a checkpoint, which knows the number
    rollouts/000007.log     what happened after it, until the next base
    resume                  the base of the checkpoint, and all logs from its number on, in order; further records go to the last

Before the first base nothing is written: there is no checkpoint from which a run could go on. Nothing here is waited for, but
a base.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import BinaryIO

from oldlogits.core.errors import RunFolderError, writing
from oldlogits.core.trajectory import Segment
from oldlogits.rollout.journal.progress import Progress, group_of
from oldlogits.rollout.journal.records import Grew, Record, decode, encode


@dataclass(frozen=True, slots=True, kw_only=True)
class _Base:
    """What a log begins after; None: it is there, and is gone on with."""

    number: int
    records: Sequence[Record] | None
    is_there: Future[None] = field(default_factory=Future)


class Journal:
    """Takes note of what happens to groups and episodes; one thread calls it, another one writes.

    Args:
        folder: Where the files lie.
        progress: What a run that goes on has read; None: it begins.

    Raises:
        RunWriteError: The disk has refused an earlier record.
    """

    def __init__(self, folder: Path, progress: Progress | None = None) -> None:
        self._folder, self.progress = folder, progress or Progress()
        self._number = max(_logs(folder), default=0)
        self._queue: SimpleQueue[Record | _Base | None] = SimpleQueue()
        self._failure: BaseException | None = None
        self._is_written = progress is not None
        if self._is_written:
            self._queue.put(_Base(number=self._number, records=None))
        self._thread = threading.Thread(target=self._write, name="journal", daemon=True)
        self._thread.start()

    def note(self, record: Record) -> None:
        """Take note of something."""
        if self._failure is not None:
            raise self._failure
        self.progress.apply(record)
        if self._is_written:
            self._queue.put(record)

    def grew(self, episode: str, segments: Sequence[Segment]) -> None:
        """Take note of all segments that an episode of a group in flight has now."""
        group = self.progress.groups.get(group_of(episode))
        if group is not None:
            known = group.episodes[episode].segments if episode in group.episodes else []
            self.note(Grew(episode=episode, segments=tuple(segments[len(known) :])))

    def trained(self, groups: Iterable[str]) -> None:
        """Forget groups: the next checkpoint holds what they taught."""
        for group in groups:
            self.progress.groups.pop(group, None)

    async def begin(self) -> int:
        """Write what is in flight, for a checkpoint; returns the number by which `read` finds it, once it is on the disk."""
        self.progress, self._number, self._is_written = Progress(groups=self.progress.groups), self._number + 1, True
        base = _Base(number=self._number, records=list(self.progress.records()))
        self._queue.put(base)
        await asyncio.wrap_future(base.is_there)
        return self._number

    def forget(self, number: int) -> None:
        """Remove what is older than a base: no checkpoint needs it any more."""
        for path in self._folder.glob("*.*"):
            if path.stem.isdecimal() and int(path.stem) < number:
                path.unlink(missing_ok=True)

    def close(self) -> None:
        """Write what is left."""
        self._queue.put(None)
        self._thread.join()

    def _write(self) -> None:
        """The writer thread. What it has written is the system's, and outlives a kill of this process."""
        log: BinaryIO | None = None
        try:
            while (item := self._queue.get()) is not None:
                if isinstance(item, _Base):
                    if log is not None:
                        log.close()
                    log = self._open(item)
                elif log is not None:
                    with writing(self._folder):
                        log.write(encode(item))
                        if self._queue.empty():
                            log.flush()
        except Exception as error:  # supervision: whoever calls next hears of it
            self._failure = error
        finally:
            if log is not None:
                log.close()

    def _open(self, base: _Base) -> BinaryIO:
        try:
            with writing(self._folder):
                self._folder.mkdir(exist_ok=True)
                if base.records is not None:
                    partial = self._folder / "partial"
                    with partial.open("wb") as file:
                        file.writelines(map(encode, base.records))
                        file.flush()
                        os.fsync(file.fileno())
                    partial.replace(_base(self._folder, base.number))
                log = _log(self._folder, base.number).open("ab")
        except Exception as error:  # supervision: `begin` waits for it
            base.is_there.set_exception(error)
            raise
        base.is_there.set_result(None)
        return log


def read(folder: Path, number: int) -> Progress:
    """Read how far groups had come when a run ended that goes on from the checkpoint of a base.

    The incomplete last line of a log, which a kill leaves, is cut off.

    Raises:
        RunFolderError: A file is missing, or a line is not what was written.
    """
    progress = Progress()
    for record in _records(_base(folder, number)):
        progress.apply(record)
    progress = Progress(groups=progress.groups)
    for log in (path for at, path in sorted(_logs(folder).items()) if at >= number):
        _cut(log)
        for record in _records(log):
            progress.apply(record)
    return progress


def _records(path: Path) -> Iterator[Record]:
    try:
        with path.open("rb") as file:
            for index, line in enumerate(file, start=1):
                try:
                    yield decode(line)
                except ValueError as error:
                    raise RunFolderError(
                        f"line {index} of {path} is damaged",
                        got=str(error),
                        allowed="the bytes that were written",
                        fix=f"restore it from a copy; or remove {path.parent}, and what was in flight begins again",
                    ) from error
    except OSError as error:
        raise RunFolderError(
            f"{path} cannot be read",
            got=error.strerror or str(error),
            allowed="the file that the checkpoint was written with",
            fix=f"restore it from a copy; or remove {path.parent}, and what was in flight begins again",
        ) from error


def _cut(path: Path) -> None:
    with path.open("r+b") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)


def _base(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.base"


def _log(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.log"


def _logs(folder: Path) -> dict[int, Path]:
    return {int(path.stem): path for path in folder.glob("*.log") if path.stem.isdecimal()}
