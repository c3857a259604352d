"""Sections of bytes, raw or compressed: zstd at level 1, words as byte planes (all first bytes, then all second bytes, ...)."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import zstandard
from numpy.typing import NDArray

from oldlogits.core.errors import PatchError

Tier = Literal["memory", "cold"]
Bytes = NDArray[np.uint8]

_LEVEL = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One run of bytes in a patch: its name, its length as stored and as it was, the crc32 of what is stored."""

    name: str
    stored: int
    raw: int
    crc: int


def pack(name: str, content: Bytes, tier: Tier, runs: Sequence[tuple[int, int]] = ()) -> tuple[Section, bytes]:
    """A section and the bytes to store.

    Args:
        name: For errors.
        content: uint8 [n].
        tier: "memory": as it is; "cold": compressed.
        runs: What `content` is made of: (bytes, bytes of a word), in order; none: bytes.
    """
    stored = content.tobytes()
    if tier == "cold":
        stored = zstandard.ZstdCompressor(level=_LEVEL).compress(split(content, runs).data)
    return Section(name=name, stored=len(stored), raw=len(content), crc=zlib.crc32(stored)), stored


def unpack(section: Section, stored: memoryview, tier: Tier, runs: Sequence[tuple[int, int]] = ()) -> Bytes:
    """The content of a section, writable.

    Raises:
        PatchError: The bytes are damaged.
    """
    if len(stored) != section.stored or zlib.crc32(stored) != section.crc:
        raise damaged(section.name, f"{len(stored)} bytes with another checksum than the one recorded")
    if tier == "memory":
        return np.frombuffer(bytearray(stored), np.uint8)
    try:
        content = zstandard.ZstdDecompressor().decompress(stored, max_output_size=section.raw)
    except zstandard.ZstdError as error:
        raise damaged(section.name, str(error)) from error
    if len(content) != section.raw:
        raise damaged(section.name, f"{len(content)} bytes instead of {section.raw}")
    return join(np.frombuffer(content, np.uint8), runs)


def split(content: Bytes, runs: Sequence[tuple[int, int]]) -> Bytes:
    """Words as byte planes, run by run."""
    return _each_run(content, runs, lambda part, width: part.reshape(-1, width).T)


def join(planes: Bytes, runs: Sequence[tuple[int, int]]) -> Bytes:
    """The inverse of `split`."""
    return _each_run(planes, runs, lambda part, width: part.reshape(width, -1).T)


def damaged(section: str, got: str) -> PatchError:
    """The error for a section that is not what was written."""
    return PatchError(
        f"a patch is damaged in its {section}",
        got=got,
        allowed="the bytes that Patch.to_bytes wrote",
        fix="fetch the patch again, or fall back on a full copy of the weights",
    )


def _each_run(content: Bytes, runs: Sequence[tuple[int, int]], form: Callable[[Bytes, int], Bytes]) -> Bytes:
    parts, at = [], 0
    for length, width in runs:
        parts.append(form(content[at : at + length], width).reshape(-1))
        at += length
    return np.concatenate(parts) if parts else content.copy()
