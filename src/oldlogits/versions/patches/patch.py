"""A patch: the reversible, lossless difference between two consecutive states of the same tensors.

It holds, for every value that changed, the wrapping integer difference of the bit patterns, so that one patch serves both
directions: ``new = old + delta``, ``old = new - delta``, whatever the values are (NaNs with their payloads, signed zeros).

The bytes of a patch::

    prefix    magic, format version, byte order, length of the header, crc32 of all that follows
    header    JSON: tier, base and target digest, bytes of each section as stored and as they were
    sections  layout (JSON), blocks, gaps, values, wide, dense

In the cold tier every section is compressed apart, words as byte planes: all first bytes, then all second bytes, ...
"""

from __future__ import annotations

import functools
import json
import struct
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import zstandard
from numpy.typing import NDArray

from oldlogits.core.errors import LayoutError, PatchError, ReceiverBehindError
from oldlogits.versions.patches.digest import MASK
from oldlogits.versions.patches.layout import Layout
from oldlogits.versions.patches.streams import BLOCK, BLOCK_SIZE, SKIP, Blocks, Ints, Streams, stream_lengths

Tier = Literal["memory", "cold"]
Bytes = NDArray[np.uint8]

FORMAT = 2
_MAGIC = b"oldpatch"
_ZSTD_LEVEL = 1
_PREFIX = struct.Struct("<8sHHII")
_BYTE_ORDERS = {"little": 1, "big": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Patch:
    """The difference between a base and a target version of one layout.

    Args:
        layout: The layout of both versions.
        base: Digest of the base, unsigned 64 bits.
        target: Digest of the target.
        blocks: [block] of `streams.BLOCK`: the blocks that changed; those of a dtype together, in the order of the buffers.
        streams: Gaps, values, wide words and dense words of these blocks, in the same order.
    """

    layout: Layout
    base: int
    target: int
    blocks: Blocks
    streams: Streams

    @property
    def num_bytes(self) -> int:
        """Bytes in the memory tier, the layout excluded: versions share it."""
        return self.blocks.nbytes + self.streams.num_bytes

    @property
    def num_changed(self) -> int:
        """Values whose bits differ."""
        return int(self.blocks["changes"].sum(dtype=np.int64))

    @property
    def share_changed(self) -> float:
        """`num_changed` / values of the layout; 0 of none."""
        return self.num_changed / max(1, self.layout.num_values)

    def to_bytes(self, tier: Tier = "cold") -> bytes:
        """The patch as bytes: "memory" raw, "cold" compressed."""
        contents = [np.frombuffer(self.layout.to_json().encode(), np.uint8), np.ascontiguousarray(self.blocks).view(np.uint8)]
        contents += [stream.cpu().numpy().view(np.uint8) for stream in self.streams]
        runs = _runs(self.layout, self.blocks)
        stored = [pack(content, tier, run) for content, run in zip(contents, runs, strict=True)]
        sizes = [(len(part), len(content)) for part, content in zip(stored, contents, strict=True)]
        header = json.dumps({"tier": tier, "base": self.base, "target": self.target, "sizes": sizes}).encode()
        body = b"".join([header, *stored])
        return _PREFIX.pack(_MAGIC, FORMAT, _BYTE_ORDERS[sys.byteorder], len(header), zlib.crc32(body)) + body

    @classmethod
    def from_bytes(cls, content: bytes | bytearray | memoryview, *, layout: Layout | None = None) -> Patch:
        """The patch that `to_bytes` wrote, in memory of its own.

        Args:
            content: All bytes of one patch.
            layout: The receiver's, if the patch is to be refused where its own differs.

        Raises:
            PatchError: Not a patch, of another format or byte order, or damaged.
            LayoutError: The patch is of other tensors.
        """
        view = memoryview(content)
        length = _check_prefix(view)
        try:
            at = _PREFIX.size + length
            header = json.loads(bytes(view[_PREFIX.size : at]))
            tier, base, target, sizes = (header[key] for key in ("tier", "base", "target", "sizes"))
            parts: list[tuple[memoryview, int]] = []
            for stored, raw in sizes:
                parts.append((view[at : at + stored], raw))
                at += stored
            own = _layout_of(unpack(*parts[0], tier).tobytes())
            blocks = unpack(*parts[1], tier, [(parts[1][1], BLOCK.itemsize)]).view(BLOCK)
            _check_blocks(own, blocks)
            runs = _runs(own, blocks)[2:]
            streams = [torch.from_numpy(unpack(*part, tier, run)) for part, run in zip(parts[2:], runs, strict=True)]
        except (ValueError, TypeError, KeyError, IndexError, zstandard.ZstdError) as error:
            raise _damaged(str(error)) from error
        if layout is not None and own != layout:
            raise foreign(layout.difference(own))
        gaps, values, wide, dense = streams
        return cls(
            layout=own, base=base, target=target, blocks=blocks, streams=Streams(gaps, values.view(torch.int8), wide, dense)
        )


def concatenate(patches: Sequence[Patch]) -> Patch:
    """Join the patches of shards, all between the same two versions, to that of the whole; nothing is decoded.

    Raises:
        LayoutError: The shards overlap or leave a gap; see `Layout.union`.
    """
    layout = Layout.union([patch.layout for patch in patches])
    index = {entry.name: i for i, entry in enumerate(layout.entries)}
    tables, parts = [], []
    for dtype in layout.dtypes:
        for patch in patches:
            rows, streams = part_of(patch, dtype)
            table = patch.blocks[rows].copy()
            names = np.array([index[entry.name] for entry in patch.layout.entries], np.uint32)
            table["entry"] = names[table["entry"]]
            tables.append(table)
            parts.append(streams)
    return Patch(
        layout=layout,
        base=sum(patch.base for patch in patches) & MASK,
        target=sum(patch.target for patch in patches) & MASK,
        blocks=np.concatenate(tables) if tables else np.zeros(0, BLOCK),
        streams=Streams.cat(parts),
    )


def pack(content: Bytes, tier: Tier, runs: Sequence[tuple[int, int]] = ()) -> bytes:
    """The bytes to store; `runs` is what the content is made of: (bytes, bytes of a word); none: bytes."""
    if tier == "memory":
        return content.tobytes()
    return zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compress(_transposed(content, runs, splits=True).data)


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


def part_of(patch: Patch, dtype: torch.dtype) -> tuple[slice, Streams]:
    """The blocks of one dtype, which stand together, and their streams; no copy."""
    widths = _widths(patch.layout, patch.blocks)
    of_dtype = np.array([entry.dtype == dtype for entry in patch.layout.entries], bool)[patch.blocks["entry"]]
    at = np.flatnonzero(of_dtype)
    rows = slice(int(at[0]), int(at[-1]) + 1) if len(at) else slice(0, 0)
    lengths = stream_lengths(patch.blocks, widths)
    starts = lengths[:, : rows.start].sum(1)
    stops = starts + lengths[:, rows].sum(1)
    return rows, patch.streams.part(starts, stops)


def foreign(difference: str) -> LayoutError:
    """The error for a patch of other tensors."""
    return LayoutError(
        "a patch is of other tensors than these weights",
        got=difference,
        allowed="the same names, dtypes, shapes and ranges",
        fix="concatenate the patches of all shards, or send the full weights once",
    )


def receiver_behind(got: str, allowed: str) -> ReceiverBehindError:
    """The error of a receiver that cannot take a patch."""
    what, fix = "the receiver cannot go on from what it holds", "send the full weights of the version once"
    return ReceiverBehindError(what, got=got, allowed=allowed, fix=fix)


def _widths(layout: Layout, blocks: Blocks) -> Ints:
    """Bytes of a word of each block, int64 [block]."""
    return np.array([entry.dtype.itemsize for entry in layout.entries], np.int64)[blocks["entry"].astype(np.int64)]


def _runs(layout: Layout, blocks: Blocks) -> list[list[tuple[int, int]]]:
    """The runs of words that each section is made of: (bytes, bytes of a word); wide words come first."""
    lengths, widths = stream_lengths(blocks, _widths(layout, blocks)), _widths(layout, blocks)
    words = [[(int(row[widths == width].sum()), width) for width in (8, 4, 2, 1)] for row in lengths[2:]]
    gaps, values = ([(int(row.sum()), 1)] for row in lengths[:2])
    return [[], [(blocks.nbytes, BLOCK.itemsize)], gaps, values, *words]


def _check_prefix(view: memoryview) -> int:
    """Refuse bytes that are no patch, or not as they were written; returns the length of the header."""
    if len(view) < _PREFIX.size or bytes(view[: len(_MAGIC)]) != _MAGIC:
        raise _unreadable("bytes are no patch", got=repr(bytes(view[: len(_MAGIC)])), allowed=repr(_MAGIC))
    _, version, order, length, crc = _PREFIX.unpack_from(view)
    if version != FORMAT:
        raise _unreadable("a patch of another format", got=f"format {version}", allowed=f"format {FORMAT}")
    if order != _BYTE_ORDERS[sys.byteorder]:
        raise _unreadable("a patch of another byte order", got=f"byte order {order}", allowed=f"{sys.byteorder} endian")
    if zlib.crc32(view[_PREFIX.size :]) != crc:
        raise _damaged(f"{len(view)} bytes with another checksum than the one recorded")
    return int(length)


@functools.lru_cache(maxsize=4)
def _layout_of(text: bytes) -> Layout:
    """Patches of one store share their layout: it is read once."""
    return Layout.from_json(text)


def _check_blocks(layout: Layout, blocks: Blocks) -> None:
    """Refuse a table that leads out of the layout, or in which the blocks of a dtype do not stand together."""
    entries = blocks["entry"]
    if len(blocks) == 0:
        return
    order = {dtype: i for i, dtype in enumerate(layout.dtypes)}
    groups = np.array([order[entry.dtype] for entry in layout.entries], np.int64)
    if entries.max() >= len(layout.entries) or (np.diff(groups[entries]) < 0).any():
        raise ValueError("entries that the layout lacks, or out of order")
    starts, stops = (np.array([getattr(e, side) for e in layout.entries], np.uint64)[entries] for side in ("start", "stop"))
    if (blocks["first"] < starts).any() or (blocks["first"] + blocks["count"] > stops).any():
        raise ValueError("elements outside of their entry")
    counts = blocks["count"].astype(np.int64)
    if counts.max() > BLOCK_SIZE or (blocks["changes"] > counts).any() or (blocks["gaps"] > counts + counts // SKIP).any():
        raise ValueError("more changes than elements")


def _unreadable(what: str, *, got: str, allowed: str) -> PatchError:
    return PatchError(what, got=got, allowed=allowed, fix="write and read patches with the same release on like machines")


def _damaged(got: str) -> PatchError:
    return PatchError(
        "a patch is damaged",
        got=got,
        allowed="the bytes that Patch.to_bytes wrote",
        fix="fetch the patch again, or fall back on a full copy of the weights",
    )
