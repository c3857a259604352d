"""The parts of a patch that kernels write and read: a table of blocks and four streams.

A block is at most 65,536 elements of one entry, cut at multiples of 65,536 of the whole parameter; unchanged blocks are absent.
Its words differ by ``delta = new - old``, wrapping, of the bit patterns seen as signed integers.

* Sparse block. `gaps`, uint8: how many unchanged elements stand before the next change; 255 says to go on by 255 and that no
  change stands there. `values`, int8: the change's delta; -128 says that it is the next whole word of `wide`.
* Dense block, where the sparse form would take more than half of its bytes. `dense`: the deltas of all elements, whole words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from oldlogits.versions.patches.digest import MASK

BLOCK_SIZE = 65_536
SKIP = 255
WIDE = -128

BLOCK = np.dtype(
    [
        ("entry", np.uint32),
        ("is_dense", np.uint32),
        ("first", np.uint64),
        ("count", np.uint32),
        ("gaps", np.uint32),
        ("changes", np.uint32),
        ("wide", np.uint32),
    ]
)
"""A block's entry, its kind, its first element in the whole parameter, its elements, bytes of its gaps, elements that changed
(bytes of its values, if it is sparse), words in `wide`."""

Ints = NDArray[np.int64]
Blocks = NDArray[np.void]


class Streams(NamedTuple):
    """The four streams of one or more blocks, one after another: uint8, int8, uint8, uint8; whole words in native order."""

    gaps: Tensor
    values: Tensor
    wide: Tensor
    dense: Tensor

    @property
    def num_bytes(self) -> int:
        """Bytes of all four."""
        return sum(stream.nbytes for stream in self)

    def to(self, device: torch.device | str) -> Streams:
        """Bring the streams to another device."""
        return Streams(*(stream.to(device) for stream in self))

    def part(self, starts: Ints, stops: Ints) -> Streams:
        """The bytes ``[start, stop)`` of each stream; no copy."""
        return Streams(*(stream[int(a) : int(b)] for stream, a, b in zip(self, starts, stops, strict=True)))

    @classmethod
    def cat(cls, parts: Sequence[Streams]) -> Streams:
        """Join the streams of blocks that follow one another; empty ones may lie on any device."""
        parts = [part for part in parts if part.num_bytes] or list(parts[:1])
        if not parts:
            empty = torch.empty(0, dtype=torch.uint8)
            return cls(empty, empty.view(torch.int8), empty, empty)
        if len(parts) == 1:
            return parts[0]
        return cls(*(torch.cat(same) for same in zip(*parts, strict=True)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Blocks of one buffer that may have changed, int64 [block].

    Args:
        entries: The number of the entry in the layout.
        firsts: First element, in the whole parameter.
        counts: Elements.
        offsets: Place of the first element in the words at hand.
        keys: The name's key in the digest.
    """

    entries: Ints
    firsts: Ints
    counts: Ints
    offsets: Ints
    keys: Ints

    def rows(self, start: int, stop: int, offset: int = 0) -> Grid:
        """Some of the blocks, for words that begin at `offset` of the words at hand."""
        part = slice(start, stop)
        return Grid(
            entries=self.entries[part],
            firsts=self.firsts[part],
            counts=self.counts[part],
            offsets=self.offsets[part] - offset,
            keys=self.keys[part],
        )

    def __len__(self) -> int:
        return len(self.entries)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What a patch changes in one buffer: blocks, the place of each in the buffer, its key in the digest, all their streams."""

    blocks: Blocks
    offsets: Ints
    keys: Ints
    streams: Streams


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """What a kernel found: the changed blocks, their streams, and by how much the digest moved (mod 2^64)."""

    blocks: Blocks
    streams: Streams
    change: int

    @classmethod
    def cat(cls, found: Sequence[Encoded]) -> Encoded:
        """Join what was found in blocks that follow one another."""
        return cls(
            blocks=np.concatenate([part.blocks for part in found]) if found else np.zeros(0, BLOCK),
            streams=Streams.cat([part.streams for part in found]),
            change=sum(part.change for part in found) & MASK,
        )


class Encoder(Protocol):
    """Takes the new values of one buffer, part by part, in its order."""

    def add(self, new: Tensor, offset: int, start: int, stop: int) -> None:
        """Write new values over the resident words, and keep what changed.

        Args:
            new: Signed integers [n]: what the words from `offset` on are to be, or the words of values of a dtype that
                `Kernels.casts`; between blocks they are that already.
            offset: Place of the first.
            start: First block of the grid that they hold.
            stop: One past the last.
        """
        ...

    def finish(self) -> Encoded:
        """Give what changed in all parts that were added."""
        ...


class Kernels(Protocol):
    """The loops over values. Every implementation writes the same streams, bit for bit."""

    def casts(self, source: torch.dtype, target: torch.dtype) -> bool:
        """Whether encoders take values of `source`, as words, for a buffer of `target`, and cast them as torch does."""
        ...

    def encoder(self, words: Tensor, grid: Grid) -> Encoder:
        """An encoder of new values for `words`, signed integers [n]; `grid`: the blocks in them, ascending."""
        ...

    def apply(self, words: Tensor, parts: Sequence[Part], direction: int) -> int:
        """Add the deltas of all parts (`direction` 1), or subtract them (-1); returns by how much the digest moved."""
        ...

    def digest(self, words: Tensor, offsets: Ints, starts: Ints, numels: Ints, keys: Ints) -> int:
        """The sum of the digest's terms of some entries of a buffer: int64 [entry] each, as in `EntryTable`."""
        ...


def stream_lengths(blocks: Blocks, width: Ints | int) -> NDArray[np.int64]:
    """Bytes of each block in the four streams, int64 [4, block]."""
    dense = blocks["is_dense"] != 0
    changes, counts = blocks["changes"].astype(np.int64), blocks["count"].astype(np.int64)
    wide = blocks["wide"].astype(np.int64) * width
    return np.stack([blocks["gaps"].astype(np.int64), np.where(dense, 0, changes), wide, np.where(dense, counts * width, 0)])
