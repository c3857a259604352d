"""Sections of bytes, raw or compressed: zstd at level 1, words as byte planes (all first bytes, then all second bytes, ...)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import zstandard
from numpy.typing import NDArray

Tier = Literal["memory", "cold"]
Bytes = NDArray[np.uint8]

_LEVEL = 1


def pack(content: Bytes, tier: Tier, runs: Sequence[tuple[int, int]] = ()) -> bytes:
    """The bytes to store; `runs` is what the content is made of: (bytes, bytes of a word); none: bytes."""
    if tier == "memory":
        return content.tobytes()
    return zstandard.ZstdCompressor(level=_LEVEL).compress(_transposed(content, runs, splits=True).data)


def unpack(stored: memoryview, num_bytes: int, tier: Tier, runs: Sequence[tuple[int, int]] = ()) -> Bytes:
    """The content that `pack` was given, writable; a `ValueError` if its length is not `num_bytes` or not that of the runs."""
    content: bytes | bytearray = bytearray(stored)
    if tier == "cold":
        content = zstandard.ZstdDecompressor().decompress(stored, max_output_size=num_bytes)
    if len(content) != num_bytes or (runs and num_bytes != sum(length for length, _ in runs)):
        raise ValueError(f"a section of {len(content)} bytes, which is not what the header or the table of blocks says")
    array = np.frombuffer(content, np.uint8)
    return array if tier == "memory" else _transposed(array, runs, splits=False)


def _transposed(content: Bytes, runs: Sequence[tuple[int, int]], *, splits: bool) -> Bytes:
    """Split words into byte planes, run by run, or join the planes to words again."""
    parts, at = [], 0
    for length, width in runs:
        form = (-1, width) if splits else (width, -1)
        parts.append(content[at : at + length].reshape(form).T.reshape(-1))
        at += length
    return np.concatenate(parts) if parts else content.copy()
