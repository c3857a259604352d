"""Append-only JSON lines that survive a kill: valid JSON always, a torn last line is cut on reopening."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from oldlogits.core.errors import OldLogitsError, writing

Json = str | int | float | bool | None | Sequence["Json"] | Mapping[str, "Json"]
"""What can be recorded. Non-finite floats are written as the strings "nan", "inf" and "-inf"."""


class RecordError(OldLogitsError, ValueError):
    """A record does not have the shape that its readers rely on."""


def encode(value: Json) -> str:
    """One line of strict JSON; ``float(text)`` reads a non-finite number back.

    Example:
        >>> encode({"rho": float("nan"), "n": 3})
        '{"rho": "nan", "n": 3}'
    """
    return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False)


def revived(value: Json) -> Json:
    """What was recorded, at any depth with the non-finite numbers that `encode` writes as strings."""
    if isinstance(value, Mapping):
        return {key: revived(item) for key, item in value.items()}
    if isinstance(value, list):
        return [revived(item) for item in value]
    return float(value) if value in ("nan", "inf", "-inf") else value


class LineFile:
    """Appends JSON lines to a file, each written as a whole or not at all. One thread writes at a time.

    What is no Unicode is written as "?". An absent file is created; of an existing one an incomplete last line is cut, of
    `num_cut_bytes`.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with writing(path):
            self.num_lines, self.num_cut_bytes = _cut_torn_line(path)
            self._file = path.open("ab", buffering=0)

    def append(self, value: Mapping[str, Json]) -> None:
        """Write one line.

        Raises:
            RunWriteError: The disk is full, or the file was deleted.
        """
        line = (encode(value) + "\n").encode(errors="replace")
        with writing(self._path):
            found = os.fstat(self._file.fileno())
            if not found.st_nlink:
                raise FileNotFoundError(errno.ENOENT, "the file was deleted")
            try:
                while line:
                    line = line[self._file.write(line) :]
            except OSError:
                with suppress(OSError):
                    self._file.truncate(found.st_size)
                raise
        self.num_lines += 1

    def sync(self) -> None:
        """Bring what was written to the disk."""
        with writing(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._file.close()

    def __enter__(self) -> Self:
        """The file itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Close the file."""
        self.close()


def _without_line(path: Path, number: int) -> str:
    return f"remove the line: sed -i '{number}d' {path}"


def read_lines(path: Path, remedy: Callable[[Path, int], str] = _without_line) -> Iterator[Mapping[str, Json]]:
    """The lines of a file; an incomplete last line is left out, an absent file has none.

    Args:
        path: The file.
        remedy: What to advise about a damaged line, by its number from 1.

    Raises:
        RecordError: A complete line is no JSON object.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                continue
            try:
                value = json.loads(line.decode())
            except (ValueError, RecursionError):
                value = None
            if not isinstance(value, dict):
                raise RecordError(
                    f"line {number} of {path.name} is damaged",
                    got=repr(line[:80].decode(errors="replace")),
                    allowed="one JSON object a line",
                    fix=remedy(path, number),
                )
            yield value


def _finite(value: Json) -> Json:
    if isinstance(value, float):
        return value if math.isfinite(value) else str(float(value))
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(item) for item in value]
    return value


def _cut_torn_line(path: Path) -> tuple[int, int]:
    """Cut what follows the last newline; returns the number of lines left, and of bytes cut."""
    if not path.exists():
        return 0, 0
    with path.open("r+b") as file:
        content = file.read()
        file.truncate(whole := content.rfind(b"\n") + 1)
    return content.count(b"\n"), len(content) - whole
