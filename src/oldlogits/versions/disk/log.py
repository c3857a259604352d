"""An append-only log of byte records in one folder: it survives a kill at any byte, and a flipped bit never passes.

    owner.lock             held with flock by the one owner; names its process
    versions.log           file header, then records; opened again it ends after the last whole record
    versions.log.partial   a log that was being created or rewritten; removed on opening

The store on disk can be opened again, rewound and verified: this is what a run needs to go on from its own versions.
A record that the file is too short for was being written when the process died: it is cut, and `VersionLog.cut` reports it.
A record that is all there and has another checksum is damage: an error names it, and nothing of it is ever returned.
"""

from __future__ import annotations

import fcntl
import os
import weakref
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Self

from oldlogits.core.errors import LogBusyError, LogDamagedError, LogWriteError, StoreUseError
from oldlogits.versions.disk.log_format import (
    CHUNK,
    FILE_HEADER,
    Cut,
    Kind,
    Payload,
    Record,
    damaged,
    describe,
    end_of,
    file_header,
    scan,
)


class VersionLog:
    """One owner's log; make it with `create` or `open`. One thread uses it at a time.

    Args:
        folder: The folder of the log.
        lock: An open file that holds the folder's lock.
        sync: Whether a record is on the disk, not only with the operating system, when `append` returns.
    """

    def __init__(self, folder: Path, lock: int, *, sync: bool) -> None:
        self._path, self._sync = folder / "versions.log", sync
        self._partial = self._path.with_name(self._path.name + ".partial")
        self._lock = weakref.finalize(self, os.close, lock)
        self._file = -1
        self._close_file: weakref.finalize[[int], VersionLog] | None = None
        self._records: list[Record] = []
        self.cut: Cut | None = None

    @classmethod
    def create(cls, folder: Path, *, sync: bool = True) -> Self:
        """Become the owner of a folder without records, and make an empty log; a `LogWriteError` if there are records."""
        log = cls(folder, _own(folder), sync=sync)
        if log._path.exists() and log._path.stat().st_size > FILE_HEADER.size:
            log.close()
            raise LogWriteError(
                f"{folder} holds versions already",
                got=log._path.name,
                allowed="a folder without records",
                fix="open it to go on from what it holds, or give another folder",
            )
        try:
            log.rewrite(())
        except BaseException:
            log.close()
            raise
        return log

    @classmethod
    def open(cls, folder: Path, *, sync: bool = True, cut_damage: bool = False) -> Self:
        """Become the owner of a folder's log, check every record, and cut a torn end.

        With `cut_damage` the log is also cut before the first damaged record: it and all that follow are lost. Without it, such
        a record is a `LogDamagedError`, as is a folder without a log.
        """
        if not (folder / "versions.log").is_file():
            raise LogDamagedError(
                f"{folder} holds no versions", got="no versions.log", allowed="the folder of a store", fix="publish to it first"
            )
        log = cls(folder, _own(folder), sync=sync)
        try:
            log._partial.unlink(missing_ok=True)
            log._take(os.open(log._path, os.O_RDWR | os.O_CLOEXEC))
            log._records, log.cut = scan(log._file, log._path, cut_damage=cut_damage)
            if log.cut is not None:
                os.ftruncate(log._file, log.cut.offset)
        except BaseException:
            log.close()
            raise
        return log

    @property
    def records(self) -> tuple[Record, ...]:
        """All records, in their order."""
        return tuple(self._records)

    @property
    def num_bytes(self) -> int:
        """The size of the file."""
        return end_of(self._records)

    def append(self, kind: Kind, version: int, payload: Payload = ()) -> Record:
        """Add a record, wholly or not at all; a `LogWriteError` leaves the log as it was before."""
        self._check_open()
        record, header = describe(len(self._records), kind, version, self.num_bytes, payload)
        try:
            if os.fstat(self._file).st_size != record.offset:  # an append that failed left something behind
                os.ftruncate(self._file, record.offset)
            _write(self._file, record.offset, (header, *payload))
            if self._sync and kind is not Kind.RETAIN:
                os.fdatasync(self._file)
        except BaseException as error:
            self._cut_back(record.offset)
            if isinstance(error, OSError):
                raise _not_written(self._path, record, error) from error
            raise
        self._records.append(record)
        return record

    def read(self, record: Record) -> bytearray:
        """The payload of a record; a `LogDamagedError` if it is not what was written."""
        self._check_open()
        payload = bytearray(record.num_bytes)
        view, done = memoryview(payload), 0
        while done < record.num_bytes and (count := os.preadv(self._file, [view[done:]], record.start + done)):
            done += count
        if done < record.num_bytes or zlib.crc32(payload) != record.checksum:
            raise damaged(self._path, str(record), "its payload has another checksum", record.offset)
        return payload

    def rewrite(self, entries: Iterable[tuple[Kind, int, Payload]]) -> tuple[Record, ...]:
        """Replace the log by a new file with these records, which are returned, wholly or not at all.

        The old file is readable meanwhile. A `LogWriteError` leaves the log as it was before.
        """
        file, records = -1, list[Record]()
        try:
            file = os.open(self._partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
            _write(file, 0, (file_header(),))
            for kind, version, payload in entries:
                record, header = describe(len(records), kind, version, end_of(records), payload)
                _write(file, record.offset, (header, *payload))
                records.append(record)
            os.fsync(file)
            os.replace(self._partial, self._path)
        except BaseException as error:
            if file >= 0 and not self._partial.exists():  # renamed before the error came
                self._take(file)
                self._records = records
            elif file >= 0:
                os.close(file)
                self._partial.unlink()
            if isinstance(error, OSError) and not isinstance(error, LogWriteError | LogDamagedError):
                raise _not_written(self._path, None, error) from error
            raise
        self._take(file)
        self._records = records
        _sync_folder(self._path.parent)
        return self.records

    def close(self) -> None:
        """Give the folder up; a second call does nothing."""
        if self._close_file is not None:
            self._close_file()
        self._file = -1
        self._lock()

    def _take(self, file: int) -> None:
        if self._close_file is not None:
            self._close_file()
        self._file, self._close_file = file, weakref.finalize(self, os.close, file)

    def _cut_back(self, size: int) -> None:
        try:
            os.ftruncate(self._file, size)
        except OSError:  # the next append tries again, and a torn end is cut on opening
            return

    def _check_open(self) -> None:
        if self._file < 0:
            raise StoreUseError(
                f"the log {self._path} is closed", got="a call after close()", allowed="calls before it", fix="open it again"
            )


def _own(folder: Path) -> int:
    """Make a folder if there is none; returns an open file that locks it until it is closed or the process ends."""
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


def _write(file: int, offset: int, parts: Iterable[bytes | memoryview]) -> None:
    for part in parts:
        view = memoryview(part).cast("B")
        for start in range(0, len(view), CHUNK):
            chunk = view[start : start + CHUNK]
            while chunk:
                count = os.pwrite(file, chunk, offset)
                chunk, offset = chunk[count:], offset + count


def _not_written(path: Path, record: Record | None, error: OSError) -> LogWriteError:
    return LogWriteError(
        f"{record or 'a new file'} of {path} could not be written",
        got=str(error),
        allowed="a disk with room for it",
        fix="free space on that disk and publish again; what was published before is intact",
    )


def _sync_folder(folder: Path) -> None:
    """Put the names of a folder's files on the disk."""
    file = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)
