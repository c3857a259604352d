"""One patch in the place of several that follow one another: differences add up, so that no weights are needed.

blocks of all of them -> their differences, summed in a scratch buffer of some blocks at a time -> streams
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Final

import numpy as np
import torch
from torch import Tensor

from oldlogits.core.errors import PatchError
from oldlogits.versions.patches.kernel_choice import kernels_for
from oldlogits.versions.patches.layout import ALIGNMENT, WORDS
from oldlogits.versions.patches.patch import Patch, part_of
from oldlogits.versions.patches.streams import Blocks, Encoded, Grid, Ints, Part, Streams, stream_lengths

_SCRATCH: Final = 1 << 22
"""Words that are summed at once."""
_FIRST_BITS: Final = 43
"""Bits of the number of an element in its parameter."""


@torch.no_grad()
def compose(patches: Sequence[Patch]) -> Patch:
    """Make the patch from the base of the first to the target of the last; a value that came back is not in it.

    Args:
        patches: At least one; each begins where the one before ends.

    Raises:
        PatchError: They do not follow one another, or are of other tensors.
    """
    first, last = patches[0], patches[-1]
    if any(a.target != b.base or a.layout != b.layout for a, b in pairwise(patches)):
        raise PatchError(
            "patches that do not follow one another cannot be one",
            got=", ".join(f"{patch.base:016x} to {patch.target:016x}" for patch in patches),
            allowed="patches of one layout, each from the version that the one before leads to",
            fix="compose the patches of one store, in the order of their versions",
        )
    if len(patches) == 1:
        return first
    found = [piece for dtype in first.layout.dtypes for piece in _summed(patches, dtype)]
    together = Encoded.cat(found)
    return Patch(layout=first.layout, base=first.base, target=last.target, blocks=together.blocks, streams=together.streams)


def _summed(patches: Sequence[Patch], dtype: torch.dtype) -> Iterator[Encoded]:
    """Sum the differences of one dtype up, some blocks at a time."""
    parts = [(patch.blocks[rows], streams) for patch in patches for rows, streams in [part_of(patch, dtype)]]
    ends = [_ends(blocks, dtype.itemsize) for blocks, _ in parts]
    places = [_places(blocks) for blocks, _ in parts]
    assert all((np.diff(of) > 0).all() for of in places), "a store's own patches have their blocks in order"
    every, index = np.unique(np.concatenate(places), return_index=True)
    blocks, device = np.concatenate([blocks for blocks, _ in parts])[index], _device(patches)
    start = 0
    for stop in _stops(blocks["count"].astype(np.int64), dtype):
        grid, num_words = _grid(blocks[start:stop], dtype)
        words = torch.zeros(num_words, dtype=WORDS[dtype.itemsize], device=device)
        here = every[start:stop]
        chosen = [_part(*of, at, end, grid, here) for of, at, end in zip(parts, places, ends, strict=True)]
        kernels = kernels_for(words)
        kernels.apply(words, chosen, 1)
        encoder = kernels.encoder(torch.zeros_like(words), grid)
        encoder.add(words, 0, 0, len(grid))
        yield encoder.finish()
        start = stop


def _part(blocks: Blocks, streams: Streams, places: Ints, ends: Ints, grid: Grid, here: Ints) -> Part:
    """Select a patch's blocks among those `here`, and tell where each lies in the scratch buffer."""
    i, j = np.searchsorted(places, here[0]), np.searchsorted(places, here[-1], side="right")
    offsets = grid.offsets[np.searchsorted(here, places[i:j])]
    keys = np.zeros(len(offsets), np.int64)
    return Part(blocks=blocks[i:j], offsets=offsets, keys=keys, streams=streams.part(ends[:, i], ends[:, j]))


def _grid(blocks: Blocks, dtype: torch.dtype) -> tuple[Grid, int]:
    """Lay blocks out side by side, each aligned as in a flat buffer."""
    counts, step = blocks["count"].astype(np.int64), ALIGNMENT // dtype.itemsize
    after = np.cumsum(-(-counts // step) * step)
    grid = Grid(
        entries=blocks["entry"].astype(np.int64),
        firsts=blocks["first"].astype(np.int64),
        counts=counts,
        offsets=np.concatenate([[0], after[:-1]]).astype(np.int64),
        keys=np.zeros(len(blocks), np.int64),
    )
    return grid, int(after[-1])


def _stops(counts: Ints, dtype: torch.dtype) -> Iterator[int]:
    """End runs of blocks of at most `_SCRATCH` words together, or of one block."""
    num = 0
    for at, count in enumerate(counts.tolist()):
        if num and num + count > _SCRATCH:
            yield at
            num = 0
        num += count
    if num:
        yield len(counts)


def _places(blocks: Blocks) -> Ints:
    """Give the place of each block as one number: its entry, then its first element."""
    return (blocks["entry"].astype(np.int64) << _FIRST_BITS) + blocks["first"].astype(np.int64)


def _ends(blocks: Blocks, width: int) -> Ints:
    """Give where the streams of each block begin, and where the last ones end: int64 [4, block + 1]."""
    lengths = stream_lengths(blocks, width)
    return np.concatenate([np.zeros((4, 1), np.int64), lengths.cumsum(1)], 1)


def _device(patches: Sequence[Patch]) -> torch.device:
    """Find the device of the first stream that is not empty."""
    streams: Iterator[Tensor] = (stream for patch in patches for stream in patch.streams if stream.numel())
    return next((stream.device for stream in streams), torch.device("cpu"))
