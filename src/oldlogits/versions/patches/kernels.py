"""The kernels for tensors on the CPU, where numba can be had: arrays and addresses for the loops in `compiled.py`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from oldlogits.versions.patches import digest
from oldlogits.versions.patches.compiled import SLACK, apply_blocks, block_buffers, digest_of, encode_blocks
from oldlogits.versions.patches.intrinsics import LANES
from oldlogits.versions.patches.streams import BLOCK, BLOCK_SIZE, Encoded, Encoder, Grid, Ints, Part, Streams, stream_lengths

_ROOM = 1 << 22


class NumbaEncoder:
    """See `Encoder`."""

    def __init__(self, words: Tensor, grid: Grid) -> None:
        self._words, self._source = words.numpy(), grid
        self._grid = np.stack([grid.offsets, grid.counts, grid.keys, grid.firsts])
        self._table = np.zeros((len(grid), 4), np.int64)
        room, item = min(len(words), _ROOM) + BLOCK_SIZE, self._words.dtype
        self._streams = (
            np.empty(room + room // 128 + SLACK, np.uint8), np.empty(room, np.int8), np.empty(room, item), np.empty(room, item)
        )  # fmt: skip
        self._buffers = block_buffers(self._words)
        self._ends = np.zeros(5, np.int64)
        self._book = (self._grid, self._table, self._ends)
        nan = item.type(_nan_of_bfloat16() if words.itemsize == 2 else 0)
        self._scalars = (nan, _mask(words.itemsize))
        self._full: list[Streams] = []

    def add(self, new: Tensor, offset: int, start: int, stop: int) -> None:
        """See `Encoder.add`."""
        while start < stop:
            start = encode_blocks(
                self._words, new.numpy(), (offset, start, stop), self._book, self._streams, self._buffers, self._scalars
            )
            if start < stop:
                self._empty()

    def finish(self) -> Encoded:
        """See `Encoder.finish`."""
        self._empty()
        blocks = np.zeros(len(self._source), BLOCK)
        blocks["entry"], blocks["first"], blocks["count"] = self._source.entries, self._source.firsts, self._source.counts
        blocks["is_dense"], blocks["gaps"], blocks["changes"], blocks["wide"] = self._table.T
        changed = blocks[self._table[:, 2] > 0]
        return Encoded(blocks=changed, streams=Streams.cat(self._full), change=int(self._ends[4]) & digest.MASK)

    def _empty(self) -> None:
        """Copy what the streams hold, to go on with empty ones."""
        used = zip(self._streams, self._ends[:4], strict=True)
        gaps, values, wide, dense = (torch.from_numpy(stream[:end].view(np.uint8).copy()) for stream, end in used)
        self._full.append(Streams(gaps, values.view(torch.int8), wide, dense))
        self._ends[:4] = 0


class NumbaKernels:
    """`Kernels` for tensors on the CPU; one thread, without the interpreter's lock."""

    def casts(self, source: torch.dtype, target: torch.dtype) -> bool:
        """See `Kernels.casts`."""
        return source == target or (source, target) == (torch.float32, torch.bfloat16)

    def encoder(self, words: Tensor, grid: Grid) -> Encoder:
        """See `Kernels.encoder`."""
        return NumbaEncoder(words, grid)

    def apply(self, words: Tensor, parts: Sequence[Part], direction: int) -> int:
        """See `Kernels.apply`. All parts go in one call, ordered by place: memory is passed over once."""
        if not parts:
            return 0
        streams = [part.streams.to("cpu") for part in parts]
        jobs = np.concatenate([_jobs(p, s, words.itemsize) for p, s in zip(parts, streams, strict=True)], axis=1)
        order = np.argsort(jobs[0], kind="stable")
        return int(apply_blocks(words.numpy(), order, jobs, direction, _mask(words.itemsize))) & digest.MASK

    def digest(self, words: Tensor, offsets: Ints, starts: Ints, numels: Ints, keys: Ints) -> int:
        """See `Kernels.digest`."""
        columns = [np.ascontiguousarray(column) for column in (offsets, starts, numels, keys)]
        return int(digest_of(words.numpy(), *columns, _mask(words.itemsize)))


def _nan_of_bfloat16() -> int:
    """What torch casts a NaN of float32 to, which depends on the machine, as a signed word."""
    return int(torch.full((LANES,), torch.nan).to(torch.bfloat16).view(torch.int16)[0])


def _mask(width: int) -> np.uint64:
    """The bits of a word."""
    return np.uint64((1 << 8 * width) - 1)


def _jobs(part: Part, streams: Streams, width: int) -> Ints:
    """int64 [12, block]: place, first element, key, elements; addresses in the streams; bytes of gaps, changes, wide, kind."""
    blocks, lengths = part.blocks, stream_lengths(part.blocks, width)
    jobs = np.empty((12, len(blocks)), np.int64)
    jobs[0], jobs[1], jobs[2], jobs[3] = part.offsets, blocks["first"], part.keys, blocks["count"]
    starts = np.array([stream.data_ptr() for stream in streams], np.int64)
    jobs[4:8] = starts[:, None] + lengths.cumsum(1) - lengths
    jobs[8], jobs[9], jobs[10], jobs[11] = blocks["gaps"], blocks["changes"], blocks["wide"], blocks["is_dense"]
    return jobs
