"""The kernels as torch operations: on a GPU, and on a CPU without numba."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from oldlogits.core.errors import PatchError
from oldlogits.versions.patches.digest import MASK, terms
from oldlogits.versions.patches.streams import BLOCK, SKIP, WIDE, Encoded, Encoder, Grid, Ints, Part, Streams, stream_lengths

_GROUP = {"cpu": 1 << 20, "cuda": 1 << 23}


class TorchEncoder:
    """See `Encoder`. Temporaries take about 100 bytes for each element of a group of blocks."""

    def __init__(self, words: Tensor, grid: Grid) -> None:
        self._words, self._grid = words, grid
        self._found: list[Encoded] = []

    def add(self, new: Tensor, offset: int, start: int, stop: int) -> None:
        """See `Encoder.add`."""
        words = self._words.narrow(0, offset, len(new))
        for i, j in _groups(self._grid.counts[start:stop], _GROUP.get(words.device.type, 1 << 20)):
            self._found.append(_encode(words, new, self._grid.rows(start + i, start + j, offset)))

    def finish(self) -> Encoded:
        """See `Encoder.finish`."""
        return Encoded.cat(self._found)


class TorchKernels:
    """`Kernels` for tensors on any device."""

    def casts(self, source: torch.dtype, target: torch.dtype) -> bool:
        """See `Kernels.casts`."""
        return source == target

    def encoder(self, words: Tensor, grid: Grid) -> Encoder:
        """See `Kernels.encoder`."""
        return TorchEncoder(words, grid)

    def apply(self, words: Tensor, parts: Sequence[Part], direction: int) -> int:
        """See `Kernels.apply`."""
        change = 0
        for part in parts:
            lengths = stream_lengths(part.blocks, words.itemsize)
            ends = np.concatenate([np.zeros((4, 1), np.int64), lengths.cumsum(1)], 1)
            for i, j in _groups(lengths[0] + lengths[3], _GROUP.get(words.device.type, 1 << 20)):
                group = Part(
                    blocks=part.blocks[i:j],
                    offsets=part.offsets[i:j],
                    keys=part.keys[i:j],
                    streams=part.streams.part(ends[:, i], ends[:, j]).to(words.device),
                )
                change += _apply_sparse(words, group, direction) + _apply_dense(words, group, direction)
        return change & MASK

    def digest(self, words: Tensor, offsets: Ints, starts: Ints, numels: Ints, keys: Ints) -> int:
        """See `Kernels.digest`."""
        total, step = 0, _GROUP.get(words.device.type, 1 << 20)
        for offset, start, numel, key in zip(*(c.tolist() for c in (offsets, starts, numels, keys)), strict=True):
            for at in range(0, numel, step):
                part = words[offset + at : offset + min(at + step, numel)]
                total += int(terms(key, _count(start + at, part), part).sum())
        return total & MASK


def _groups(sizes: Ints, limit: int) -> Iterator[tuple[int, int]]:
    """Runs of rows of at most `limit` in sum, but of one row at least."""
    ends = np.concatenate([[0], sizes.cumsum()])
    i = 0
    while i < len(sizes):
        j = max(i + 1, int(np.searchsorted(ends, ends[i] + limit, side="right")) - 1)
        yield i, j
        i = j


def _count(first: int, like: Tensor) -> Tensor:
    return torch.arange(first, first + len(like), dtype=torch.int64, device=like.device)


def _encode(words: Tensor, new: Tensor, grid: Grid) -> Encoded:
    """One group of blocks: find the changes, count them by block, write the streams."""
    device, width, num = words.device, words.itemsize, len(grid)
    start, stop = int(grid.offsets[0]), int(grid.offsets[-1] + grid.counts[-1])
    old_span, new_span = words[start:stop], new[start:stop]
    at = torch.nonzero(old_span != new_span).squeeze(1)
    old, now = old_span[at], new_span[at]
    delta = now - old
    edges, firsts, keys = (torch.from_numpy(c).to(device) for c in (grid.offsets - start, grid.firsts, grid.keys))
    block = torch.searchsorted(edges, at, right=True) - 1
    place = at - edges[block]
    index = firsts[block] + place
    change = int((terms(keys[block], index, now) - terms(keys[block], index, old)).sum())

    before = torch.where(block == torch.nn.functional.pad(block, (1, 0), value=-1)[:-1], _previous(place) + 1, 0)
    gap = place - before
    num_gaps = gap // SKIP + 1
    is_wide = (delta < -127) | (delta > 127)
    gaps, changes, wide = (_sums(block, values, num) for values in (num_gaps, torch.ones_like(block), is_wide.long()))
    dense = (2 * (gaps + changes + wide * width) > grid.counts * width) & (changes > 0)

    blocks = np.zeros(num, BLOCK)
    blocks["entry"], blocks["first"], blocks["count"] = grid.entries, grid.firsts, grid.counts
    blocks["is_dense"], blocks["changes"] = dense, changes
    blocks["gaps"], blocks["wide"] = np.where(dense, 0, gaps), np.where(dense, 0, wide)
    spans = [(int(o) - start, int(o + n) - start) for o, n in zip(grid.offsets[dense], grid.counts[dense], strict=True)]
    whole = [new_span[a:b] - old_span[a:b] for a, b in spans]
    old_span.copy_(new_span)

    if dense.any():
        kept = ~torch.from_numpy(dense).to(device)[block]
        gap, num_gaps, delta, is_wide = gap[kept], num_gaps[kept], delta[kept], is_wide[kept]
    gap_stream = torch.full((int(num_gaps.sum()),), SKIP, dtype=torch.uint8, device=device)
    gap_stream[num_gaps.cumsum(0) - 1] = (gap % SKIP).to(torch.uint8)
    streams = Streams(
        gaps=gap_stream,
        values=torch.where(is_wide, WIDE, delta).to(torch.int8),
        wide=delta[is_wide].view(torch.uint8),
        dense=torch.cat(whole).view(torch.uint8) if whole else gap_stream[:0],
    )
    return Encoded(blocks=blocks[changes > 0], streams=streams, change=change)


def _as_words(stream: Tensor, like: Tensor) -> Tensor:
    """Bytes as words; an empty stream may have no stride that torch can view anew."""
    return stream.view(like.dtype) if stream.numel() else like[:0]


def _previous(values: Tensor) -> Tensor:
    return torch.nn.functional.pad(values, (1, 0))[:-1]


def _sums(block: Tensor, values: Tensor, num: int) -> NDArray[np.int64]:
    """The sum of `values` in each block, int64 [num]."""
    sums = torch.zeros(num, dtype=torch.int64, device=block.device).index_add_(0, block, values)
    return sums.cpu().numpy()


def _apply_sparse(words: Tensor, part: Part, direction: int) -> int:
    """Decode the gaps of all sparse blocks at once: a block's positions are a running sum less that at its beginning."""
    blocks = part.blocks
    sparse = blocks["is_dense"] == 0
    if not sparse.any():
        return 0
    columns = (blocks["gaps"], blocks["changes"], blocks["count"], blocks["first"], part.offsets, part.keys)
    gaps, changes, counts, firsts, offsets, keys = (
        torch.from_numpy(column[sparse].astype(np.int64)).to(words.device) for column in columns
    )
    steps = part.streams.gaps.to(torch.int64)
    is_change = steps != SKIP
    reached = (steps + is_change).cumsum(0)
    bases = _previous(reached[gaps.cumsum(0) - 1])
    row = torch.repeat_interleave(torch.arange(len(gaps), device=words.device), changes)
    ends = reached[is_change]
    delta = part.streams.values.to(words.dtype)
    is_wide = part.streams.values == WIDE
    wide = _as_words(part.streams.wide, words)
    if len(ends) != len(row) or len(delta) != len(row) or int(is_wide.sum()) != len(wide):
        raise _broken("streams of different lengths")
    delta[is_wide] = wide
    place = ends - 1 - bases[row]
    if bool((place >= counts[row]).any()) or bool((place < 0).any()):
        raise _broken("a change outside of its block")
    at = offsets[row] + place
    old = words[at]
    now = old + delta if direction > 0 else old - delta
    words[at] = now
    index = firsts[row] + place
    return int((terms(keys[row], index, now) - terms(keys[row], index, old)).sum())


def _apply_dense(words: Tensor, part: Part, direction: int) -> int:
    """Dense blocks that follow one another in one entry are taken together."""
    rows = np.flatnonzero(part.blocks["is_dense"])
    change, at = 0, 0
    dense = _as_words(part.streams.dense, words)
    if len(dense) != int(part.blocks["count"][rows].astype(np.int64).sum()):
        raise _broken("a dense stream of another length")
    firsts, counts = (part.blocks[name][rows].astype(np.int64) for name in ("first", "count"))
    entries, offsets, keys = part.blocks["entry"][rows], part.offsets[rows], part.keys[rows]
    begins = np.ones(len(rows), bool)
    begins[1:] = (entries[1:] != entries[:-1]) | (firsts[1:] != firsts[:-1] + counts[:-1])
    runs = np.flatnonzero(begins)
    for run, numel in zip(runs, np.add.reduceat(counts, runs) if len(runs) else (), strict=True):
        span = words[offsets[run] : offsets[run] + numel]
        delta = dense[at : at + numel]
        index = _count(int(firsts[run]), span)
        before = terms(int(keys[run]), index, span).sum()
        span.add_(delta) if direction > 0 else span.sub_(delta)
        change += int(terms(int(keys[run]), index, span).sum() - before)
        at += int(numel)
    return change


def _broken(got: str) -> PatchError:
    return PatchError(
        "the streams of a patch contradict its table", got=got, allowed="what encode wrote", fix="fetch the patch again"
    )
