"""The format of a log of versions: its records, and the scan of a file that may be torn or damaged.

A record is a header (magic, index, kind, version, length and checksum of the payload, checksum of the header) and a payload.
"""

from __future__ import annotations

import itertools
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Final

from oldlogits.core.errors import LogDamagedError

Payload = Sequence[bytes | memoryview]
"""The parts of a payload, in order; each a run of bytes."""

FORMAT: Final = 1
"""Version of the format of the log."""
FILE_HEADER: Final = struct.Struct("<8sII")
_FILE_MAGIC: Final = b"OLVLOG\r\n"
_RECORD: Final = struct.Struct("<4sIBqQII")
_RECORD_MAGIC: Final = b"OLVr"
CHUNK: Final = 1 << 24


class Kind(IntEnum):
    """What a record holds."""

    COPY = 1
    """A full copy of a version."""
    PATCH = 2
    """The patch that leads to a version from the one before."""
    RETAIN = 3
    """No payload: versions below the record's are no longer needed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """The place of a record.

    Args:
        index: The number of the record in its file, from 0.
        kind: What the record holds.
        version: The version that the record is about.
        offset: The place of its header, in bytes from the beginning of the file.
        num_bytes: The length of its payload.
        checksum: The CRC-32 of its payload.
    """

    index: int
    kind: Kind
    version: int
    offset: int
    num_bytes: int
    checksum: int

    @property
    def start(self) -> int:
        """The place of its payload."""
        return self.offset + _RECORD.size

    @property
    def end(self) -> int:
        """The place of the next record."""
        return self.start + self.num_bytes

    @property
    def whole_bytes(self) -> int:
        """The length of header and payload."""
        return self.end - self.offset

    def __str__(self) -> str:
        """The name of the record in an error."""
        return f"record {self.index} ({self.kind.name.lower()} of version {self.version}) at byte {self.offset}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """What was cut off the end of a log when it was opened: the size of the file after it, the bytes cut, and why."""

    offset: int
    num_bytes: int
    reason: str


def file_header() -> bytes:
    """The bytes with which a log begins."""
    head = FILE_HEADER.pack(_FILE_MAGIC, FORMAT, 0)[:-4]
    return head + struct.pack("<I", zlib.crc32(head))


def describe(index: int, kind: Kind, version: int, offset: int, payload: Payload) -> tuple[Record, bytes]:
    """A record and the bytes of its header."""
    checksum, length = 0, 0
    for part in payload:
        checksum, length = zlib.crc32(part, checksum), length + memoryview(part).nbytes
    record = Record(index=index, kind=kind, version=version, offset=offset, num_bytes=length, checksum=checksum)
    head = _RECORD.pack(_RECORD_MAGIC, index, kind, version, length, checksum, 0)[:-4]
    return record, head + struct.pack("<I", zlib.crc32(head))


def scan(file: int, path: Path, *, cut_damage: bool) -> tuple[list[Record], Cut | None]:
    """The whole records of a file, each checked, and what follows them."""
    size = os.fstat(file).st_size
    if os.pread(file, FILE_HEADER.size, 0) != file_header():
        raise LogDamagedError(
            f"{path} does not begin as a log of versions",
            got=f"{os.pread(file, FILE_HEADER.size, 0)!r} at byte 0",
            allowed=f"a log of format {FORMAT}",
            fix="restore the file from a copy, or publish to a new folder",
        )
    records: list[Record] = []
    reason = "a torn record"
    try:
        records.extend(_whole_records(file, size, path))
    except LogDamagedError as error:
        if not cut_damage:
            raise
        reason = error.what
    end = end_of(records)
    return records, None if end == size else Cut(offset=end, num_bytes=size - end, reason=reason)


def _whole_records(file: int, size: int, path: Path) -> Iterator[Record]:
    """The records of a file up to a torn end; the error of a damaged record names it."""
    offset, before = FILE_HEADER.size, "the beginning"
    for index in itertools.count():
        head = os.pread(file, _RECORD.size, offset)
        if len(head) < _RECORD.size:
            return
        magic, number, kind, version, length, checksum, own_checksum = _RECORD.unpack(head)
        if zlib.crc32(head[:-4]) != own_checksum or magic != _RECORD_MAGIC or number != index:
            if not any(chunk.count(0) < len(chunk) for chunk in _chunks(file, offset, size)):
                return  # zeros: a file system may have made room for what was never written
            raise damaged(path, f"record {index} at byte {offset}, after {before},", "its header is damaged", offset)
        record = Record(index=index, kind=Kind(kind), version=version, offset=offset, num_bytes=length, checksum=checksum)
        if record.end > size:
            return
        found = 0
        for chunk in _chunks(file, record.start, record.end):
            found = zlib.crc32(chunk, found)
        if found != checksum:
            raise damaged(path, str(record), "its payload has another checksum", offset)
        yield record
        offset, before = record.end, f"version {version}"


def _chunks(file: int, start: int, end: int) -> Iterator[bytes]:
    """Bytes ``[start, end)`` of a file, chunk by chunk."""
    while start < end and (chunk := os.pread(file, min(CHUNK, end - start), start)):
        yield chunk
        start += len(chunk)


def damaged(path: Path, where: str, found: str, offset: int) -> LogDamagedError:
    """The error for a part of a log that is not what was written."""
    return LogDamagedError(
        f"{where} of {path} is damaged",
        got=found,
        allowed="the bytes that were written",
        fix=f"restore the file from a copy, or open it with cut_damage=True to keep what lies before byte {offset}",
    )


def end_of(records: Sequence[Record]) -> int:
    """The place of the next record."""
    return records[-1].end if records else FILE_HEADER.size
