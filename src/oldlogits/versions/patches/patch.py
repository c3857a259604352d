"""A patch: the reversible, lossless difference between two consecutive states of the same tensors.

It holds, for every value that changed, the wrapping integer difference of the bit patterns, so that one patch serves both
directions: ``new = old + delta``, ``old = new - delta``, whatever the values are (NaNs with their payloads, signed zeros).

The bytes of a patch::

    prefix    magic, format version, byte order, length of the header, crc32 of all that and the header
    header    JSON: tier, base and target digest, sections (name, bytes stored, bytes raw, crc32)
    sections  layout (JSON), blocks, gaps, values, wide, dense

In the cold tier every section is compressed apart (`cold.py`).
"""

from __future__ import annotations

import functools
import json
import struct
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from oldlogits.core.errors import LayoutError, PatchError, ReceiverBehindError
from oldlogits.versions.patches.cold import Section, Tier, damaged, pack, unpack
from oldlogits.versions.patches.digest import MASK
from oldlogits.versions.patches.layout import Layout
from oldlogits.versions.patches.streams import BLOCK, BLOCK_SIZE, SKIP, Blocks, Ints, Streams, stream_lengths

FORMAT = 1
_MAGIC = b"oldpatch"
_PREFIX, _CRC = struct.Struct("<8sHHI"), struct.Struct("<I")
_BYTE_ORDERS = {"little": 1, "big": 2}
_SECTIONS = ("layout", "blocks", "gaps", "values", "wide", "dense")


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
        packed = [
            pack(name, content, tier, runs)
            for name, content, runs in zip(_SECTIONS, contents, _runs(self.layout, self.blocks), strict=True)
        ]
        sections = [[section.name, section.stored, section.raw, section.crc] for section, _ in packed]
        header = json.dumps({"tier": tier, "base": self.base, "target": self.target, "sections": sections}).encode()
        start = _PREFIX.pack(_MAGIC, FORMAT, _BYTE_ORDERS[sys.byteorder], len(header)) + header
        head = start[: _PREFIX.size] + _CRC.pack(zlib.crc32(start)) + header
        return b"".join([head, *(stored for _, stored in packed)])

    @classmethod
    def from_bytes(cls, content: bytes | bytearray | memoryview, *, layout: Layout | None = None) -> Patch:
        """The patch that `to_bytes` wrote, in memory of its own.

        Args:
            content: All bytes of one patch.
            layout: The receiver's, if the patch is to be refused where its own differs.

        Raises:
            PatchError: Not a patch, of another format or byte order, or damaged; says where.
            LayoutError: The patch is of other tensors.
        """
        view = memoryview(content)
        tier, base, target, sections, at = _read_header(view)
        if len(view) - at != sum(section.stored for section in sections):
            raise damaged("length", f"{len(view)} bytes")
        parts = []
        for section in sections:
            parts.append((section, view[at : at + section.stored]))
            at += section.stored
        own = _layout_of(unpack(*parts[0], tier).tobytes())
        if layout is not None and own != layout:
            raise foreign(layout.difference(own))
        words = unpack(*parts[1], tier, [(parts[1][0].raw, BLOCK.itemsize)])
        if len(words) % BLOCK.itemsize:
            raise damaged("blocks", f"{len(words)} bytes")
        blocks = words.view(BLOCK)
        _check_blocks(own, blocks)
        runs = _runs(own, blocks)
        for (section, _), run in zip(parts[2:], runs[2:], strict=True):
            if section.raw != sum(length for length, _ in run):
                raise damaged(section.name, f"{section.raw} bytes, which is not what the table of blocks says")
        gaps, values, wide, dense = (
            torch.from_numpy(unpack(*part, tier, run)) for part, run in zip(parts[2:], runs[2:], strict=True)
        )
        streams = Streams(gaps, values.view(torch.int8), wide, dense)
        return cls(layout=own, base=base, target=target, blocks=blocks, streams=streams)


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


def _read_header(view: memoryview) -> tuple[Tier, int, int, list[Section], int]:
    """Tier, base, target, sections, and where the first section begins."""
    body = _PREFIX.size + _CRC.size
    if len(view) < body or bytes(view[: len(_MAGIC)]) != _MAGIC:
        raise _unreadable("bytes are no patch", got=repr(bytes(view[: len(_MAGIC)])), allowed=repr(_MAGIC))
    _, version, order, length = _PREFIX.unpack_from(view)
    if version != FORMAT:
        raise _unreadable("a patch of another format", got=f"format {version}", allowed=f"format {FORMAT}")
    if order != _BYTE_ORDERS[sys.byteorder]:
        raise _unreadable("a patch of another byte order", got=f"byte order {order}", allowed=f"{sys.byteorder} endian")
    header = bytes(view[body : body + length])
    if len(header) != length or _CRC.pack(zlib.crc32(bytes(view[: _PREFIX.size]) + header)) != view[_PREFIX.size : body]:
        raise damaged("header", f"{len(header)} of {length} bytes, or another checksum")
    try:
        content = json.loads(header)
        sections = [Section(name=name, stored=stored, raw=raw, crc=crc) for name, stored, raw, crc in content["sections"]]
        tier, base, target = (content[key] for key in ("tier", "base", "target"))
    except (ValueError, TypeError, KeyError) as error:
        raise damaged("header", f"JSON of another form: {error}") from error
    if tuple(section.name for section in sections) != _SECTIONS or tier not in ("memory", "cold"):
        raise damaged("header", f"tier {tier!r}, sections {[section.name for section in sections]}")
    return tier, base, target, sections, body + length


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
        raise damaged("blocks", "entries that the layout lacks, or out of order")
    starts, stops = (np.array([getattr(e, side) for e in layout.entries], np.uint64)[entries] for side in ("start", "stop"))
    if (blocks["first"] < starts).any() or (blocks["first"] + blocks["count"] > stops).any():
        raise damaged("blocks", "elements outside of their entry")
    counts = blocks["count"].astype(np.int64)
    if counts.max() > BLOCK_SIZE or (blocks["changes"] > counts).any() or (blocks["gaps"] > counts + counts // SKIP).any():
        raise damaged("blocks", "more changes than elements")


def _unreadable(what: str, *, got: str, allowed: str) -> PatchError:
    return PatchError(what, got=got, allowed=allowed, fix="write and read patches with the same release on like machines")
