"""Sections of bytes, raw or compressed: zstd at level 1, words as byte planes (all first bytes, then all second bytes, ...)."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
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
    """Make a section and the bytes to store; `runs` is what the content is made of: (bytes, bytes of a word); none: bytes."""
    stored = content.tobytes()
    if tier == "cold":
        stored = zstandard.ZstdCompressor(level=_LEVEL).compress(_transposed(content, runs, splits=True).data)
    return Section(name=name, stored=len(stored), raw=len(content), crc=zlib.crc32(stored)), stored


def unpack(section: Section, stored: memoryview, tier: Tier, runs: Sequence[tuple[int, int]] = ()) -> Bytes:
    """The content of a section, writable; a `PatchError` if the bytes are damaged."""
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
    return _transposed(np.frombuffer(content, np.uint8), runs, splits=False)


def damaged(section: str, got: str) -> PatchError:
    """The error for a section that is not what was written."""
    return PatchError(
        f"a patch is damaged in its {section}",
        got=got,
        allowed="the bytes that Patch.to_bytes wrote",
        fix="fetch the patch again, or fall back on a full copy of the weights",
    )


def _transposed(content: Bytes, runs: Sequence[tuple[int, int]], *, splits: bool) -> Bytes:
    """Split words into byte planes, run by run, or join the planes to words again."""
    parts, at = [], 0
    for length, width in runs:
        form = (-1, width) if splits else (width, -1)
        parts.append(content[at : at + length].reshape(form).T.reshape(-1))
        at += length
    return np.concatenate(parts) if parts else content.copy()
