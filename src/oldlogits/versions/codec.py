"""From a resident copy and new weights to a patch, and from patches to another version of the resident copy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from oldlogits.core.errors import ExactnessError
from oldlogits.versions.digest import MASK
from oldlogits.versions.fastpath import kernels_for
from oldlogits.versions.flat import FlatWeights, check
from oldlogits.versions.layout import Entry, words_of
from oldlogits.versions.patch import Patch, foreign, part_of
from oldlogits.versions.shield import shielded
from oldlogits.versions.streams import BLOCK, BLOCK_SIZE, Encoded, Grid, Part, Streams

_SCRATCH = {"cpu": 1 << 17, "cuda": 1 << 26}


@torch.no_grad()
def encode(resident: FlatWeights, new: Mapping[str, Tensor]) -> Patch:
    """The patch from the resident version to `new`, which the resident copy then holds.

    Args:
        resident: The version before; changed.
        new: The version after, by the layout's names; aliases and frozen names may be left out. Tensors of another
            floating-point dtype than the layout's (float32 masters) are cast, block by block; so are tensors elsewhere or not
            contiguous brought over.

    Raises:
        LayoutError: `new` does not fit the layout; nothing was changed.
        ExactnessError: The resident copy holds no version.
    """
    check(resident.layout, new)
    base = _held(resident)
    found: list[Encoded] = []
    with shielded():
        resident.digest = None
        try:
            for dtype in resident.layout.dtypes:
                kernels, words = kernels_for(resident.device), resident.words(dtype)
                for offset, values, grid in _batches(resident, dtype, new):
                    found.append(kernels.encode(words.narrow(0, offset, len(values)), values, grid))
            patch = _collected(resident, base, found)
        except BaseException:
            _move(resident, [_collected(resident, base, found)], -1)
            resident.digest = base
            raise
        resident.digest = patch.target
    return patch


@torch.no_grad()
def apply(resident: FlatWeights, patches: Sequence[Patch], direction: Literal[1, -1] = 1) -> int:
    """Take the resident copy over consecutive patches in one go: memory is passed over once, however many they are.

    Args:
        resident: At the base of the first patch (direction 1), or at the target of the last (-1); changed.
        patches: Oldest first, in both directions.
        direction: 1 to the target of the last patch, -1 to the base of the first.

    Returns:
        The digest of what the resident copy then holds, computed from the words that were read and written.

    Raises:
        LayoutError: A patch is of other tensors; nothing was changed.
        ExactnessError: The patches do not follow one another or do not begin at the resident version; or the bits that came
            out are not those that were encoded. The resident copy is as it was.
    """
    held = _held(resident)
    if not patches:
        return held
    for patch in patches:
        if patch.layout != resident.layout:
            raise foreign(resident.layout.difference(patch.layout))
    ends = [patches[0].base, *(patch.target for patch in patches)][::direction]
    if any(a.target != b.base for a, b in pairwise(patches)) or ends[0] != held:
        raise ExactnessError(
            "patches do not lead on from the resident version",
            got=f"patches from {ends[0]:016x}, resident {held:016x}",
            allowed="consecutive patches, oldest first, the nearest of them at the resident version",
            fix="check out the version that the patches begin at, or load the full weights",
        )
    with shielded():
        resident.digest = None
        reached = (held + _move(resident, patches, direction)) & MASK
        if reached != ends[-1]:
            _move(resident, patches, -direction)
        resident.digest = reached if reached == ends[-1] else held
    if reached != ends[-1]:
        raise ExactnessError(
            "the bits that came out of patches are not those that went in",
            got=f"digest {reached:016x}",
            allowed=f"digest {ends[-1]:016x}",
            fix="verify the resident copy: a patch or the memory is damaged; load the full weights of this version",
        )
    return reached


def _held(resident: FlatWeights) -> int:
    if resident.digest is None:
        raise ExactnessError(
            "the resident copy holds no version",
            got="a change that broke off, or buffers whose digest was never taken",
            allowed="a copy with a digest",
            fix="load full weights into it, or set digest = full_digest() if its bits are known to be right",
        )
    return resident.digest


def _move(resident: FlatWeights, patches: Sequence[Patch], direction: int) -> int:
    """Add or subtract all patches, buffer by buffer; returns by how much the digest moved."""
    change, kernels = 0, kernels_for(resident.device)
    for dtype in resident.layout.dtypes:
        parts = []
        for patch in patches[::direction]:
            rows, streams = part_of(patch, dtype)
            blocks = patch.blocks[rows]
            entry = blocks["entry"]
            offsets = resident.table.offsets[entry] + blocks["first"].astype(np.int64) - resident.table.starts[entry]
            parts.append(Part(blocks=blocks, offsets=offsets, keys=resident.table.keys[entry], streams=streams))
        change += kernels.apply(resident.words(dtype), parts, direction)
    return change & MASK


def _collected(resident: FlatWeights, base: int, found: Sequence[Encoded]) -> Patch:
    return Patch(
        layout=resident.layout,
        base=base,
        target=(base + sum(part.change for part in found)) & MASK,
        blocks=np.concatenate([part.blocks for part in found]) if found else np.zeros(0, BLOCK),
        streams=Streams.cat([part.streams for part in found]),
    )


def _batches(resident: FlatWeights, dtype: torch.dtype, new: Mapping[str, Tensor]) -> Iterator[tuple[int, Tensor, Grid]]:
    """The new values of one buffer in its order: where they begin in the buffer, the words, the blocks in them.

    Large tensors that have the right dtype, device and form are used where they are; everything else is copied (and cast) into
    a scratch buffer that has the form of the resident one, a few blocks at a time, while they are in cache.
    """
    grid, limit = _grid(resident, resident.rows(dtype)), _SCRATCH.get(resident.device.type, 1 << 17)
    tensors = {i: new[resident.layout.entries[i].name].detach() for i in np.unique(grid.entries).tolist()}
    direct = {i: _is_direct(tensor, resident.buffers[dtype], limit) for i, tensor in tensors.items()}
    is_direct = np.array([direct[i] for i in grid.entries.tolist()], bool)
    scratch = torch.zeros(min(limit, resident.layout.numel(dtype)), dtype=dtype, device=resident.device)
    flat: dict[int, Tensor] = {}
    at = 0
    while at < len(grid):
        start, entry = int(grid.offsets[at]), int(grid.entries[at])
        if direct[entry]:
            end = int(np.searchsorted(grid.entries, entry, side="right"))
            yield start, words_of(tensors[entry]), grid.rows(at, end, start)
        else:
            end = at + int(np.searchsorted(grid.offsets[at:] + grid.counts[at:] - start, limit, side="right"))
            end = min([end, *(at + np.flatnonzero(is_direct[at:end])[:1])])
            flat = {i: flat.get(i, tensors[i].reshape(-1)) for i in dict.fromkeys(grid.entries[at:end].tolist())}
            run = grid.rows(at, end, start)
            yield start, words_of(_filled(scratch, flat, run, resident.table.starts)), run
        at = end


def _grid(resident: FlatWeights, rows: slice) -> Grid:
    """All blocks of some entries."""
    entries = range(rows.start, rows.stop)
    edges = [_edges(resident.layout.entries[i]) for i in entries]
    numbers = np.repeat(np.array(entries, np.int64), [len(e) - 1 for e in edges])
    firsts = np.array([a for e in edges for a in e[:-1]], np.int64)
    counts = np.array([b - a for e in edges for a, b in pairwise(e)], np.int64)
    table = resident.table
    offsets = table.offsets[numbers] + firsts - table.starts[numbers]
    return Grid(entries=numbers, firsts=firsts, counts=counts, offsets=offsets, keys=table.keys[numbers])


def _edges(entry: Entry) -> list[int]:
    """Where the blocks of an entry meet, in elements of the whole parameter."""
    inside = range((entry.start // BLOCK_SIZE + 1) * BLOCK_SIZE, entry.stop, BLOCK_SIZE)
    return [entry.start, *inside, entry.stop] if entry.numel else [entry.start]


def _is_direct(tensor: Tensor, buffer: Tensor, limit: int) -> bool:
    same = tensor.dtype == buffer.dtype and tensor.device == buffer.device
    return same and tensor.is_contiguous() and tensor.numel() >= limit // 4


def _filled(scratch: Tensor, flat: Mapping[int, Tensor], run: Grid, starts: NDArray[np.int64]) -> Tensor:
    """The new values of a run of blocks, in the form of the resident buffer; 0 between entries."""
    length = int(run.offsets[-1] + run.counts[-1])
    if len(flat) > 1:
        scratch[:length].zero_()
    for entry, source in flat.items():
        rows = np.flatnonzero(run.entries == entry)
        first, offset, numel = int(run.firsts[rows[0]] - starts[entry]), int(run.offsets[rows[0]]), int(run.counts[rows].sum())
        scratch[offset : offset + numel].copy_(source[first : first + numel])
    return scratch[:length]
