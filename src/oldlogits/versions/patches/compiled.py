"""Loops over values, compiled with numba, for `kernels.py`; the only file that imports numba.

They are written for any CPU: a comparison of 64 values at a time is LLVM's to translate into what the machine has. Machine code
is kept in numba's cache: beside this file or, where that cannot be written, in the user's cache folder.

A function is compiled for an integer type when it is first called with it: about four seconds for each type of a model, once on
a machine; half a second to start numba in a process.

numba infers the types of the compiled functions, so they carry none here: `words`, `new`, `block`, `target`, `olds`, `deltas`,
`wide` and `dense` are arrays of one signed integer type; numbers are int64, what concerns the digest is uint64.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-any-return"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import config, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from oldlogits.versions.patches import digest
from oldlogits.versions.patches.streams import BLOCK_SIZE, SKIP, WIDE

_G, _W = np.uint64(digest.G), np.uint64(digest.W)
_M1, _M2 = np.uint64(digest.M1), np.uint64(digest.M2)
_S30, _S27, _S31 = np.uint64(30), np.uint64(27), np.uint64(31)
_NONE, _ONE = np.uint64(0), np.uint64(1)
LANES = 64
_TURN = 1024
SLACK = 512
"""What the streams of a block may take beyond one byte or word for each of its elements."""
_at = np.uint64


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
def _changed(typing: Any, words: Any, i: Any, new: Any, j: Any, nan: Any) -> Any:
    """uint64: bit k is set where ``words[i + k]`` is not what `new` at ``j + k`` is as such a word, for 64 values."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        item = context.get_data_type(words.dtype)
        old = _loaded(context, builder, words, arguments[0], arguments[1], LANES)
        now = _loaded(context, builder, new, arguments[2], arguments[3], LANES)
        now = _rounded(builder, now, item, arguments[4], LANES) if new.dtype != words.dtype else now
        return builder.bitcast(builder.icmp_unsigned("!=", old, now), ir.IntType(LANES))

    return types.uint64(words, types.int64, new, types.int64, words.dtype), generate


@intrinsic
def _word(typing: Any, new: Any, at: Any, nan: Any) -> Any:
    """Item `at` of new values as a word of the type of `nan`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        now = _loaded(context, builder, new, arguments[0], arguments[1], 1)
        item = context.get_data_type(nan)
        now = _rounded(builder, now, item, arguments[2], 1) if new.dtype != nan else now
        return builder.extract_element(now, ir.IntType(32)(0))

    return nan(new, types.int64, nan), generate


def _loaded(context: Any, builder: Any, array_type: Any, array: Any, at: Any, lanes: int) -> Any:
    """Values of an array from `at` on, as a vector."""
    kind = ir.VectorType(context.get_data_type(array_type.dtype), lanes)
    pointer = builder.gep(context.make_array(array_type)(context, builder, array).data, [at])
    return builder.load(builder.bitcast(pointer, kind.as_pointer()), typ=kind, align=array_type.dtype.bitwidth // 8)


def _rounded(builder: Any, bits: Any, item: Any, nan: Any, lanes: int) -> Any:
    """The bits of float32 as those of bfloat16: to nearest, ties to even; every NaN becomes the one given."""
    wide, narrow = ir.VectorType(ir.IntType(32), lanes), ir.VectorType(item, lanes)

    def all_of(number: int) -> Any:
        return ir.Constant(wide, [number] * lanes)

    upper = builder.lshr(bits, all_of(16))
    half = builder.add(builder.and_(upper, all_of(1)), all_of(0x7FFF))
    result = builder.trunc(builder.lshr(builder.add(bits, half), all_of(16)), narrow)
    is_nan = builder.icmp_unsigned(">", builder.and_(bits, all_of(0x7FFFFFFF)), all_of(0x7F800000))
    empty, zeros = ir.Constant(narrow, ir.Undefined), ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
    nans = builder.shuffle_vector(builder.insert_element(empty, nan, ir.IntType(32)(0)), empty, zeros)
    return builder.select(is_nan, nans, result)


@intrinsic
def _trailing_zeros(typing: Any, bits: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], cgutils.true_bit)

    return types.int64(types.uint64), generate


@intrinsic
def _ones(typing: Any, bits: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.int64(types.uint64), generate


@intrinsic
def _prefetch(typing: Any, a: Any, i: Any) -> Any:
    """Ask for the cache line of ``a[i]``, to be written; anything but a fault if it does not exist."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.gep(context.make_array(signature.args[0])(context, builder, arguments[0]).data, [arguments[1]])
        number, byte = ir.IntType(32), ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        fetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(fetch, [builder.bitcast(pointer, byte), number(1), number(3), number(1)])
        return context.get_dummy_value()

    return types.void(a, types.int64), generate


@intrinsic
def _load(typing: Any, address: Any, at: Any, like: Any) -> Any:
    """Item `at` of the values of the type of the array `like` that begin at `address`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        item = context.get_data_type(signature.args[2].dtype)
        pointer = builder.gep(builder.inttoptr(arguments[0], item.as_pointer()), [arguments[1]])
        return builder.load(pointer, typ=item, align=1)

    return like.dtype(types.int64, types.int64, like), generate


@_jit
def _term(key, index, word):
    z = index * _G + word * _W + key
    z = (z ^ (z >> _S30)) * _M1
    z = (z ^ (z >> _S27)) * _M2
    return z ^ (z >> _S31)


@_jit
def _moved(key, first, places, olds, deltas, num, mask):
    """By how much `num` changed words move the digest."""
    total = _NONE
    for k in range(num):
        index = first + np.uint64(places[k])
        old = np.uint64(olds[k])
        new = (old + np.uint64(deltas[k])) & mask
        total += _term(key, index, new) - _term(key, index, old & mask)
    return total


@_jit
def digest_of(words, offsets, starts, numels, keys, mask):
    """The sum of the digest's terms of some entries of a buffer."""
    total = _NONE
    for row in range(len(offsets)):
        key, start, offset = np.uint64(keys[row]), np.uint64(starts[row]), offsets[row]
        for k in range(numels[row]):
            total += _term(key, start + np.uint64(k), np.uint64(words[_at(offset + k)]) & mask)
    return total


@_jit
def encode_blocks(words, new, nan, offset, row, stop, grid, table, gaps, values, wide, dense, places, olds, deltas, ends, mask):
    """Encode blocks from `row` on, while every stream has room for one more.

    Rows of `grid` as in `NumbaEncoder`; `table`: kind, gaps, changes, wide words; `ends`: of the four streams, and by how much
    the digest moved. Returns the next row.
    """
    width = words.itemsize
    num_gaps, num_values, num_wide, num_dense = ends[0], ends[1], ends[2], ends[3]
    total = np.uint64(ends[4])
    while row < stop:
        at, count, key, first = grid[0, row], grid[1, row], np.uint64(grid[2, row]), np.uint64(grid[3, row])
        room = min(len(gaps) - num_gaps - SLACK, len(values) - num_values, len(wide) - num_wide)
        if min(room, len(dense) - num_dense) < count:
            break
        block, target = words[at : at + count], new[at - offset : at - offset + count]
        changes, gap_bytes = _scan(block, target, nan, places, olds, deltas, gaps[num_gaps:])
        if changes > 0:
            total += _moved(key, first, places, olds, deltas, changes, mask)
            wide_words = _write_values(deltas, changes, values[num_values:], wide[num_wide:])
            table[row, 2] = changes
            if 2 * (gap_bytes + changes + wide_words * width) > count * width:
                table[row, 0] = 1
                _write_all(places, deltas, changes, dense[num_dense : num_dense + count])
                num_dense += count
            else:
                table[row, 1], table[row, 3] = gap_bytes, wide_words
                num_gaps, num_values, num_wide = num_gaps + gap_bytes, num_values + changes, num_wide + wide_words
        row += 1
    ends[0], ends[1], ends[2], ends[3], ends[4] = num_gaps, num_values, num_wide, num_dense, np.int64(total)
    return row


@_jit
def block_buffers(words):
    """Of one block: places, words and deltas of what changes; more than a block can have, since places come in sixes."""
    room = BLOCK_SIZE + SLACK
    return np.empty(room, np.uint16), np.empty(room, words.dtype), np.empty(room, words.dtype)


@_jit
def _scan(block, target, nan, places, olds, deltas, gaps):
    """Write the target over a block, and keep places, words before, deltas and gaps of what changes.

    The search and the writing take turns, so that memory is being read while what was found is written.

    Returns:
        How many words changed, and how many bytes of gaps that makes.
    """
    num, gap_bytes, before = 0, 0, np.int64(-1)
    for start in range(0, len(block), _TURN):
        end = _find(block, target, nan, start, min(start + _TURN, len(block)), places, num)
        gap_bytes, before = _take(block, target, nan, places, num, end, olds, deltas, gaps, gap_bytes, before)
        num = end
    return num, gap_bytes


@_jit
def _find(block, target, nan, start, stop, places, num):
    """Add the places where a block differs from its target to the `num` that are there. Returns how many there are then.

    Of 64 words at a time: six places are written whether or not there are so many, since that needs no decision.
    """
    whole = stop - (stop - start) % LANES
    for at in range(start, whole, LANES):
        bits = _changed(block, at, target, at, nan)
        end = num + _ones(bits)
        for k in range(6):
            places[_at(num + k)] = at + _trailing_zeros(bits)
            bits &= bits - _ONE
        num += 6
        while bits:
            places[_at(num)] = at + _trailing_zeros(bits)
            bits &= bits - _ONE
            num += 1
        num = end
    for place in range(whole, stop):
        if block[place] != _word(target, place, nan):
            places[_at(num)] = place
            num += 1
    return num


@_jit
def _take(block, target, nan, places, start, stop, olds, deltas, gaps, end, before):
    """Write the changes from `start` to `stop`, and their gaps from byte `end` on; `before`: the place of the one before."""
    for k in range(start, stop):
        at = _at(places[_at(k)])
        new = _word(target, np.int64(at), nan)
        olds[_at(k)] = block[at]
        deltas[_at(k)] = new - block[at]
        block[at] = new
        gap = np.int64(at) - before - 1
        before = np.int64(at)
        while gap >= SKIP:
            gaps[_at(end)] = SKIP
            end += 1
            gap -= SKIP
        gaps[_at(end)] = gap
        end += 1
    return end, before


@_jit
def _write_values(deltas, num, values, wide):
    num_wide = 0
    for k in range(num):
        fits = (deltas[k] >= -127) & (deltas[k] <= 127)
        values[k] = deltas[k] if fits else WIDE
        num_wide += 0 if fits else 1
    if num_wide:
        end = 0
        for k in range(num):
            if values[_at(k)] == WIDE:
                wide[_at(end)] = deltas[_at(k)]
                end += 1
    return num_wide


@_jit
def _write_all(places, deltas, num, dense):
    dense[:] = 0
    for k in range(num):
        dense[_at(places[_at(k)])] = deltas[_at(k)]


@_jit
def apply_blocks(words, order, jobs, direction, mask):
    """Take blocks over to the other version in the given order; columns of `jobs` as in `_jobs`.

    While one block is changed, the gaps of the next are read, and both loops fetch lines that come up: that of the gaps those
    of the second half of the block at hand, that of the changes those of the first half of the next.
    """
    places, olds, deltas = block_buffers(words)
    next_places, total = np.empty_like(places), _NONE
    block, num, row = words[:0], 0, 0
    for turn in range(len(order) + 1):
        next_block, next_num, next_row = words[:0], 0, 0
        if turn < len(order):
            next_row = order[turn]
            next_block = words[jobs[0, next_row] : jobs[0, next_row] + jobs[3, next_row]]
            next_num = _read_gaps(jobs[:, next_row], next_places, block, places, num)
        if turn > 0:
            first, key, _, _, values, wide, dense = jobs[1:8, row]
            first, key, num_wide, is_dense = np.uint64(first), np.uint64(key), jobs[10, row], jobs[11, row]
            if is_dense:
                total += _add_all(block, dense, direction, key, first, mask)
            else:
                _read_values(values, num, wide, num_wide, direction, deltas)
                _add(block, places, num, olds, deltas, next_block, next_places)
                total += _moved(key, first, places, olds, deltas, num, mask)
        places, next_places = next_places, places
        block, num, row = next_block, next_num, next_row
    return total


@_jit
def _read_gaps(job, places, block, fetched, num_fetched):
    """The places of a block's changes; returns how many, 0 if they cannot be right. Fetches the second half of `fetched`."""
    count, gaps, num_gaps, changes, like = job[3], job[4], job[8], job[9], np.empty(0, np.uint8)
    place, num, half = np.int64(-1), 0, num_fetched >> 1
    for k in range(num_gaps):
        gap = np.int64(_load(gaps, k, like))
        is_change = 1 if gap != SKIP else 0
        place += gap + is_change
        places[_at(num)] = place
        num += is_change
        _prefetch(block, np.int64(fetched[_at(half + (k >> 1))]))
    return num if place < count and num == changes else 0


@_jit
def _add(block, places, num, olds, deltas, next_block, next_places):
    """Add deltas; keep the words before. Fetches the first half of the next block's places."""
    for k in range(num):
        at = _at(places[_at(k)])
        _prefetch(next_block, np.int64(next_places[_at(k >> 1)]))
        olds[_at(k)] = block[at]
        block[at] += deltas[_at(k)]


@_jit
def _read_values(values, num, wide, num_wide, direction, deltas):
    """What to add to each word that changes."""
    signed, escape = np.empty(0, np.int8), 0
    for k in range(num):
        deltas[k] = direction * np.int64(_load(values, k, signed))
    for k in range(num if num_wide else 0):
        if _load(values, k, signed) == WIDE and escape < num_wide:
            deltas[k] = direction * np.int64(_load(wide, escape, deltas))
            escape += 1


@_jit
def _add_all(block, dense, direction, key, first, mask):
    """Add the deltas of a dense block, or subtract them; returns by how much the digest moves."""
    total = _NONE
    for k in range(len(block)):
        old = block[k]
        new = old + direction * np.int64(_load(dense, k, block))
        block[k] = new
        index = first + np.uint64(k)
        total += _term(key, index, np.uint64(new) & mask) - _term(key, index, np.uint64(old) & mask)
    return total
