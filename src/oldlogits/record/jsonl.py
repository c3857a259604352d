"""Append-only JSON lines that survive a kill: valid JSON always, a torn last line is cut on reopening."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from oldlogits.core.errors import OldLogitsError

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
    """Appends JSON lines to a file, each flushed as it is written; "?" for what is no Unicode. One thread writes at a time.

    An absent file is created; of an existing one an incomplete last line is cut.
    """

    def __init__(self, path: Path) -> None:
        self.num_lines = _cut_torn_line(path)
        self._file = path.open("a", encoding="utf-8", errors="replace", buffering=1, newline="\n")

    def append(self, value: Mapping[str, Json]) -> None:
        """Write one line."""
        self._file.write(encode(value) + "\n")
        self.num_lines += 1

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._file.close()

    def __enter__(self) -> Self:
        """The file itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Close the file."""
        self.close()


def read_lines(path: Path) -> Iterator[Mapping[str, Json]]:
    """The lines of a file; an incomplete last line is left out, an absent file has none.

    Raises:
        RecordError: A complete line is no JSON object.
    """
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
        for index, line in enumerate(file, start=1):
            if not line.endswith("\n"):
                continue
            try:
                value = json.loads(line)
            except json.JSONDecodeError:
                value = None
            if not isinstance(value, dict):
                raise RecordError(
                    f"line {index} of {path.name} is damaged",
                    got=repr(line[:80]),
                    allowed="one JSON object a line",
                    fix=f"remove the line from {path}",
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


def _cut_torn_line(path: Path) -> int:
    """Cut what follows the last newline; returns the number of lines left."""
    if not path.exists():
        return 0
    with path.open("r+b") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
    return content.count(b"\n")
