"""From a resident copy and new weights to a patch, and from patches to another version of the resident copy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from oldlogits.core.errors import ExactnessError
from oldlogits.versions.defer_sigint import defer_sigint
from oldlogits.versions.patches.digest import MASK
from oldlogits.versions.patches.flat import FlatWeights, fit
from oldlogits.versions.patches.kernel_choice import kernels_for
from oldlogits.versions.patches.layout import Entry, words_of
from oldlogits.versions.patches.patch import Patch, foreign, part_of
from oldlogits.versions.patches.streams import BLOCK_SIZE, Encoded, Encoder, Grid, Part

_SCRATCH = {"cpu": 1 << 19, "cuda": 1 << 23}


@torch.no_grad()
def encode(resident: FlatWeights, new: Mapping[str, Tensor]) -> Patch:
    """Make the patch from the resident version to `new`, which the resident copy then holds.

    Args:
        resident: The version before; changed.
        new: The version after, by the layout's names; one name of tied weights is enough, frozen ones may be left out. Tensors
            of another floating-point dtype than the layout's (float32 masters) are cast, block by block; those that lie
            elsewhere or are not contiguous are brought over.

    Raises:
        LayoutError: `new` does not fit the layout; nothing was changed.
        ExactnessError: The resident copy holds no version.
    """
    new = fit(resident.layout, new)
    base = _held(resident)
    encoders: list[Encoder] = []
    with defer_sigint():
        resident.digest = None
        try:
            for dtype in resident.layout.dtypes:
                grid = _grid(resident, resident.rows(dtype))
                words = resident.words(dtype)
                encoders.append(kernels_for(words).encoder(words, grid))
                _feed(encoders[-1], resident, dtype, grid, new)
            patch = _collected(resident, base, encoders)
        except BaseException:
            _move(resident, [_collected(resident, base, encoders)], -1)
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
        direction: 1: to the target of the last patch; -1: to the base of the first.

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
    with defer_sigint():
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
    change = 0
    for dtype in resident.layout.dtypes:
        parts = []
        for patch in patches[::direction]:
            rows, streams = part_of(patch, dtype)
            blocks = patch.blocks[rows]
            entry = blocks["entry"]
            offsets = resident.table.offsets[entry] + blocks["first"].astype(np.int64) - resident.table.starts[entry]
            parts.append(Part(blocks=blocks, offsets=offsets, keys=resident.table.keys[entry], streams=streams))
        words = resident.words(dtype)
        change += kernels_for(words).apply(words, parts, direction)
    return change & MASK


def _collected(resident: FlatWeights, base: int, encoders: Sequence[Encoder]) -> Patch:
    found = Encoded.cat([encoder.finish() for encoder in encoders])
    target = (base + found.change) & MASK
    return Patch(layout=resident.layout, base=base, target=target, blocks=found.blocks, streams=found.streams)


def _feed(encoder: Encoder, resident: FlatWeights, dtype: torch.dtype, grid: Grid, new: Mapping[str, Tensor]) -> None:
    """Give the new values of one buffer to its encoder.

    Large tensors of a dtype that the kernels take, on the right device and contiguous, are used where they are; everything else
    is copied (and cast) into a scratch buffer that has the form of the resident one, some blocks at a time.
    """
    limit = _SCRATCH.get(resident.device.type, _SCRATCH["cpu"])
    entries, firsts = grid.entries.tolist(), (grid.firsts - resident.table.starts[grid.entries]).tolist()
    offsets, ends = grid.offsets.tolist(), (grid.offsets + grid.counts).tolist()
    tensors = {i: new[resident.layout.entries[i].name].detach() for i in dict.fromkeys(entries)}
    is_direct = {i: _is_direct(tensor, resident.buffers[dtype], limit) for i, tensor in tensors.items()}
    scratch = torch.zeros(min(limit, resident.layout.numel(dtype)), dtype=dtype, device=resident.device)
    words, flat = words_of(scratch), dict[int, Tensor]()
    start = 0
    while start < len(entries):
        stop, entry, offset = start, entries[start], offsets[start]
        if is_direct[entry]:
            while stop < len(entries) and entries[stop] == entry:
                stop += 1
            encoder.add(words_of(tensors[entry]), offset, start, stop)
        else:
            while stop < len(entries) and not is_direct[entries[stop]] and ends[stop] - offset <= limit:
                stop += 1
            run = dict.fromkeys(entries[start:stop])
            flat = {i: flat[i] if i in flat else tensors[i].reshape(-1) for i in run}
            if len(run) > 1:
                words[: ends[stop - 1] - offset].zero_()
            row = start
            for i in run:
                last = row
                while last + 1 < stop and entries[last + 1] == i:
                    last += 1
                numel = ends[last] - offsets[row]
                scratch.narrow(0, offsets[row] - offset, numel).copy_(flat[i].narrow(0, firsts[row], numel))
                row = last + 1
            encoder.add(words[: ends[stop - 1] - offset], offset, start, stop)
        start = stop


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
    """The edges of the blocks of an entry, in elements of the whole parameter."""
    inside = range((entry.start // BLOCK_SIZE + 1) * BLOCK_SIZE, entry.stop, BLOCK_SIZE)
    return [entry.start, *inside, entry.stop] if entry.numel else [entry.start]


def _is_direct(tensor: Tensor, buffer: Tensor, limit: int) -> bool:
    fits = tensor.device == buffer.device and kernels_for(buffer).casts(tensor.dtype, buffer.dtype)
    return fits and tensor.is_contiguous() and tensor.numel() >= limit // 4
