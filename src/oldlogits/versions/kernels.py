"""The kernels compiled with numba, for tensors on the CPU.

They are written for any CPU: a comparison of 64 values at a time is LLVM's to translate into what the machine has. Machine code
is kept in numba's cache: beside this file or, where that cannot be written, in the user's cache folder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from llvmlite import binding, ir
from numba import config, njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from oldlogits.versions import digest
from oldlogits.versions.streams import BLOCK, BLOCK_SIZE, SKIP, WIDE, Encoded, Grid, Ints, Part, Streams, stream_lengths

_G, _W = np.uint64(digest.G), np.uint64(digest.W)
_M1, _M2 = np.uint64(digest.M1), np.uint64(digest.M2)
_S30, _S27, _S31 = np.uint64(30), np.uint64(27), np.uint64(31)
_NONE, _ONE = np.uint64(0), np.uint64(1)
_LANES = 64
_FLUSH = 2048


def refusal() -> str:
    """Why these kernels are not to be used although numba is here; empty if they are."""
    return "numba's compiler is switched off (NUMBA_DISABLE_JIT)" if config.DISABLE_JIT else ""


def description() -> str:
    """The machine as LLVM sees it."""
    features = binding.get_host_cpu_features()
    widest = next((f for f in ("avx512bw", "avx2", "neon", "sse4.2") if features.get(f)), "generic")
    return f"numba on {binding.get_host_cpu_name()} ({widest})"


def _jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile when first called; without a folder that can be written, in every process anew."""
    try:
        return njit(cache=True, nogil=True, error_model="numpy")(function)
    except RuntimeError:
        return njit(nogil=True, error_model="numpy")(function)


@intrinsic
def _changed(typing: Any, a: Any, i: Any, b: Any, j: Any) -> Any:
    """uint64: bit k is set where ``a[i + k] != b[j + k]``, for 64 values."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        values = [_vector(context, builder, signature.args[k], arguments[k], arguments[k + 1]) for k in (0, 2)]
        loaded = [builder.load(pointer, typ=kind, align=align) for pointer, kind, align in values]
        return builder.bitcast(builder.icmp_unsigned("!=", *loaded), ir.IntType(_LANES))

    return types.uint64(a, types.int64, b, types.int64), generate


@intrinsic
def _copy(typing: Any, a: Any, i: Any, b: Any, j: Any) -> Any:
    """``a[i : i + 64] = b[j : j + 64]``."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        target, _, align = _vector(context, builder, signature.args[0], arguments[0], arguments[1])
        source, kind, _ = _vector(context, builder, signature.args[2], arguments[2], arguments[3])
        builder.store(builder.load(source, typ=kind, align=align), target, align=align)
        return context.get_dummy_value()

    return types.void(a, types.int64, b, types.int64), generate


def _vector(context: Any, builder: Any, array_type: Any, array: Any, at: Any) -> Any:
    """A pointer to 64 values of an array from `at` on, their type, and their alignment in bytes."""
    item = context.get_data_type(array_type.dtype)
    data = context.make_array(array_type)(context, builder, array).data
    kind = ir.VectorType(item, _LANES)
    return builder.bitcast(builder.gep(data, [at]), kind.as_pointer()), kind, array_type.dtype.bitwidth // 8


@intrinsic
def _trailing_zeros(typing: Any, bits: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], cgutils.true_bit)

    return types.int64(types.uint64), generate


@intrinsic
def _load(typing: Any, address: Any, at: Any, like: Any) -> Any:
    """Item `at` of the values of the type of the array `like` that begin at `address`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        item = context.get_data_type(signature.args[2].dtype)
        pointer = builder.gep(builder.inttoptr(arguments[0], item.as_pointer()), [arguments[1]])
        return builder.load(pointer, typ=item, align=1)

    return like.dtype(types.int64, types.int64, like), generate


@_jit
def _term(key, index, word):  # type: ignore[no-untyped-def]
    z = index * _G + word * _W + key
    z = (z ^ (z >> _S30)) * _M1
    z = (z ^ (z >> _S27)) * _M2
    return z ^ (z >> _S31)


@_jit
def _moved(key, first, places, olds, news, num, mask):  # type: ignore[no-untyped-def]
    """By how much `num` changed words move the digest."""
    total = _NONE
    for k in range(num):
        index = first + np.uint64(places[k])
        total += _term(key, index, np.uint64(news[k]) & mask) - _term(key, index, np.uint64(olds[k]) & mask)
    return total


@_jit
def _sum(words, offsets, starts, numels, keys, mask):  # type: ignore[no-untyped-def]
    total = _NONE
    for row in range(len(offsets)):
        key, start, offset = np.uint64(keys[row]), np.uint64(starts[row]), offsets[row]
        for k in range(numels[row]):
            total += _term(key, start + np.uint64(k), np.uint64(words[offset + k]) & mask)
    return total


@_jit
def _encode(words, new, row, offsets, firsts, counts, keys, table, gaps, values, wide, dense, mask, width):  # type: ignore[no-untyped-def]
    """Encode blocks from `row` on while every stream has room for one more; returns the next row and the streams' ends."""
    places = np.empty(BLOCK_SIZE, np.uint32)
    olds, news = np.empty(BLOCK_SIZE, words.dtype), np.empty(BLOCK_SIZE, words.dtype)
    num_gaps, num_values, num_wide, num_dense, total = 0, 0, 0, 0, _NONE
    while row < len(offsets):
        offset, count = offsets[row], counts[row]
        room = min(len(gaps) - num_gaps - BLOCK_SIZE // 128, len(values) - num_values, len(wide) - num_wide)
        if min(room, len(dense) - num_dense) < count:
            break
        changes = _find(words, new, offset, count, places, olds, news)
        if changes > 0:
            total += _moved(np.uint64(keys[row]), np.uint64(firsts[row]), places, olds, news, changes, mask)
            gap_end, wide_end, before = num_gaps, num_wide, -1
            for k in range(changes):
                place = np.int64(places[k])
                gap = place - before - 1
                while gap >= SKIP:
                    gaps[gap_end] = SKIP
                    gap_end += 1
                    gap -= SKIP
                gaps[gap_end] = gap
                gap_end += 1
                before = place
                wide[wide_end] = np.int64(news[k]) - np.int64(olds[k])
                delta = np.int64(wide[wide_end])
                fits = -127 <= delta <= 127
                values[num_values + k] = delta if fits else WIDE
                wide_end += 0 if fits else 1
            sparse = (gap_end - num_gaps) + changes + (wide_end - num_wide) * width
            table[row, 2] = changes
            if 2 * sparse > count * width:
                table[row, 0] = 1
                dense[num_dense : num_dense + count] = 0
                for k in range(changes):
                    dense[num_dense + places[k]] = np.int64(news[k]) - np.int64(olds[k])
                num_dense += count
            else:
                table[row, 1], table[row, 3] = gap_end - num_gaps, wide_end - num_wide
                num_gaps, num_values, num_wide = gap_end, num_values + changes, wide_end
        row += 1
    return row, num_gaps, num_values, num_wide, num_dense, total


@_jit
def _find(words, new, offset, count, places, olds, news):  # type: ignore[no-untyped-def]
    """Write the new words of one block; keep the places, old and new words of what changed. Returns how many."""
    num, whole = 0, count - count % _LANES
    for at in range(0, whole, _LANES):
        bits = _changed(words, offset + at, new, offset + at)
        if bits:
            while bits:
                place = at + _trailing_zeros(bits)
                places[num], olds[num], news[num] = place, words[offset + place], new[offset + place]
                num += 1
                bits &= bits - _ONE
            _copy(words, offset + at, new, offset + at)
    for place in range(whole, count):
        if words[offset + place] != new[offset + place]:
            places[num], olds[num], news[num] = place, words[offset + place], new[offset + place]
            words[offset + place] = new[offset + place]
            num += 1
    return num


@_jit
def _apply(words, order, jobs, direction, mask):  # type: ignore[no-untyped-def]
    """Take blocks over to the other version in the given order; columns of `jobs` as in `NumbaKernels.apply`."""
    places = np.empty(_FLUSH, np.uint32)
    olds, news = np.empty(_FLUSH, words.dtype), np.empty(_FLUSH, words.dtype)
    bytes_, signed = np.empty(0, np.uint8), np.empty(0, np.int8)
    total = _NONE
    for row in order:
        offset, first, key, count = jobs[0, row], np.uint64(jobs[1, row]), np.uint64(jobs[2, row]), jobs[3, row]
        gaps, values, wide, dense = jobs[4, row], jobs[5, row], jobs[6, row], jobs[7, row]
        num_gaps, num_wide, is_dense = jobs[8, row], jobs[9, row], jobs[10, row]
        if is_dense:
            for k in range(count):
                old = words[offset + k]
                words[offset + k] = old + direction * _load(dense, k, words)
                index = first + np.uint64(k)
                total += _term(key, index, np.uint64(words[offset + k]) & mask) - _term(key, index, np.uint64(old) & mask)
        place, num, value, escape = -1, 0, 0, 0
        for k in range(num_gaps):
            gap = np.int64(_load(gaps, k, bytes_))
            place += gap
            if gap == SKIP:
                continue
            place += 1
            delta = np.int64(_load(values, value, signed))
            value += 1
            if delta == WIDE and escape < num_wide:
                delta = np.int64(_load(wide, escape, words))
                escape += 1
            if place >= count:
                break
            places[num], olds[num] = place, words[offset + place]
            words[offset + place] += direction * delta
            news[num] = words[offset + place]
            num += 1
            if num == _FLUSH:
                total += _moved(key, first, places, olds, news, num, mask)
                num = 0
        total += _moved(key, first, places, olds, news, num, mask)
    return total


class NumbaKernels:
    """`Kernels` for tensors on the CPU; one thread, without the interpreter's lock."""

    def encode(self, words: Tensor, new: Tensor, grid: Grid) -> Encoded:
        """See `Kernels.encode`."""
        width, item = words.itemsize, words.numpy().dtype
        room = min(int(grid.counts.sum()), 1 << 22) + BLOCK_SIZE
        gaps, values = np.empty(room + room // 64 + BLOCK_SIZE // 128, np.uint8), np.empty(room, np.int8)
        wide, dense = np.empty(room, item), np.empty(room, item)
        table = np.zeros((len(grid), 4), np.int64)
        parts, row, change = [], 0, 0
        while row < len(grid):
            row, *ends, moved = _encode(
                words.numpy(), new.numpy(), row, grid.offsets, grid.firsts, grid.counts, grid.keys,
                table, gaps, values, wide, dense, _mask(width), width,
            )  # fmt: skip
            full = (gaps, values, wide, dense)
            kept = [torch.from_numpy(s[:end].view(np.uint8).copy()) for s, end in zip(full, ends, strict=True)]
            parts.append(Streams(gaps=kept[0], values=kept[1].view(torch.int8), wide=kept[2], dense=kept[3]))
            change += int(moved)
        blocks = np.zeros(len(grid), BLOCK)
        blocks["entry"], blocks["first"], blocks["count"] = grid.entries, grid.firsts, grid.counts
        blocks["is_dense"], blocks["gaps"], blocks["changes"], blocks["wide"] = table.T
        return Encoded(blocks=blocks[table[:, 2] > 0], streams=Streams.cat(parts), change=change & digest.MASK)

    def apply(self, words: Tensor, parts: Sequence[Part], direction: int) -> int:
        """See `Kernels.apply`. All parts go in one call, ordered by place: memory is passed over once."""
        if not parts:
            return 0
        streams = [part.streams.to("cpu") for part in parts]
        jobs = np.concatenate([_jobs(p, s, words.itemsize) for p, s in zip(parts, streams, strict=True)], axis=1)
        order = np.argsort(jobs[0], kind="stable")
        return int(_apply(words.numpy(), order, jobs, direction, _mask(words.itemsize))) & digest.MASK

    def digest(self, words: Tensor, offsets: Ints, starts: Ints, numels: Ints, keys: Ints) -> int:
        """See `Kernels.digest`."""
        columns = [np.ascontiguousarray(column) for column in (offsets, starts, numels, keys)]
        return int(_sum(words.numpy(), *columns, _mask(words.itemsize)))


def _mask(width: int) -> np.uint64:
    """The bits of a word."""
    return np.uint64((1 << 8 * width) - 1)


def _jobs(part: Part, streams: Streams, width: int) -> Ints:
    """int64 [11, block]: place, first element, key, elements; addresses in the four streams; bytes of gaps, wide words, kind."""
    blocks, lengths = part.blocks, stream_lengths(part.blocks, width)
    jobs = np.empty((11, len(blocks)), np.int64)
    jobs[0], jobs[1], jobs[2], jobs[3] = part.offsets, blocks["first"], part.keys, blocks["count"]
    starts = np.array([stream.data_ptr() for stream in streams.tensors()], np.int64)
    jobs[4:8] = starts[:, None] + lengths.cumsum(1) - lengths
    jobs[8], jobs[9], jobs[10] = blocks["gaps"], blocks["wide"], blocks["is_dense"]
    return jobs
