"""Loops over values, compiled with numba, for `kernels.py`.

They are written for any CPU. Machine code is kept in numba's cache: beside this file or, where that cannot be written, in the
user's cache folder.

A function is compiled for an integer type when it is first called with it: about four seconds for each type of a model, once on
a machine; half a second to start numba in a process.

numba infers the types of the compiled functions, so they carry none here: `words`, `new`, `block`, `target`, `olds`, `deltas`,
`wide` and `dense` are arrays of one signed integer type; numbers are int64, what concerns the digest is uint64.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-any-return"

from __future__ import annotations

import numpy as np

from oldlogits.versions.patches import digest
from oldlogits.versions.patches.intrinsics import LANES, changed, jit, load, ones, prefetch, trailing_zeros, word
from oldlogits.versions.patches.streams import BLOCK_SIZE, SKIP, WIDE

_G, _W = np.uint64(digest.G), np.uint64(digest.W)
_M1, _M2 = np.uint64(digest.M1), np.uint64(digest.M2)
_S30, _S27, _S31 = np.uint64(30), np.uint64(27), np.uint64(31)
_NONE, _ONE = np.uint64(0), np.uint64(1)
_TURN = 1024
SLACK = 512
"""What the streams of a block may take beyond one byte or word for each of its elements."""
_at = np.uint64


@jit
def _term(key, index, word):
    z = index * _G + word * _W + key
    z = (z ^ (z >> _S30)) * _M1
    z = (z ^ (z >> _S27)) * _M2
    return z ^ (z >> _S31)


@jit
def _moved(key, first, places, olds, deltas, num, mask):
    """Sum up by how much `num` changed words move the digest."""
    total = _NONE
    for k in range(num):
        index = first + np.uint64(places[k])
        old = np.uint64(olds[k])
        new = (old + np.uint64(deltas[k])) & mask
        total += _term(key, index, new) - _term(key, index, old & mask)
    return total


@jit
def digest_of(words, offsets, starts, numels, keys, mask):
    """The sum of the digest's terms of some entries of a buffer."""
    total = _NONE
    for row in range(len(offsets)):
        key, start, offset = np.uint64(keys[row]), np.uint64(starts[row]), offsets[row]
        for k in range(numels[row]):
            total += _term(key, start + np.uint64(k), np.uint64(words[_at(offset + k)]) & mask)
    return total


@jit
def encode_blocks(words, new, rows, book, streams, buffers, scalars):
    """Encode blocks while every stream has room for one more. Numba takes the tuples apart when it compiles.

    Args:
        words: The buffer, which takes the new bits.
        new: The new values of a part of it.
        rows: The place of `new` in the buffer; the first row of the grid, and the one after the last.
        book: `grid`, with the rows of `NumbaEncoder`; `table`: kind, gaps, changes, wide words of each block; `ends`: bytes or
            words of the four streams, and by how much the digest moved.
        streams: Gaps, values, wide and dense words.
        buffers: What `block_buffers` makes.
        scalars: The NaN that is written, and the bits of a word.

    Returns:
        The next row.
    """
    (offset, row, stop), (grid, table, ends) = rows, book
    (gaps, values, wide, dense), (places, olds, deltas), (nan, mask) = streams, buffers, scalars
    width = words.itemsize
    num_gaps, num_values, num_wide, num_dense = ends[0], ends[1], ends[2], ends[3]
    total = np.uint64(ends[4])
    while row < stop:
        at, count, key, first = grid[0, row], grid[1, row], np.uint64(grid[2, row]), np.uint64(grid[3, row])
        room = min(len(gaps) - num_gaps - SLACK, len(values) - num_values, len(wide) - num_wide)
        if min(room, len(dense) - num_dense) < count:
            break
        block, target = words[at : at + count], new[at - offset : at - offset + count]
        changes, gap_bytes = _scan(block, target, nan, buffers, gaps[num_gaps:])
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


@jit
def block_buffers(words):
    """Make room for the places, words and deltas of what changes in a block; for some more, since places come in sixes."""
    room = BLOCK_SIZE + SLACK
    return np.empty(room, np.uint16), np.empty(room, words.dtype), np.empty(room, words.dtype)


@jit
def _scan(block, target, nan, buffers, gaps):
    """Write the target over a block, and keep places, words before, deltas and gaps of what changes.

    The search and the writing take turns, so that memory is being read while what was found is written. Returns how many words
    changed, and how many bytes of gaps that makes.
    """
    num, gap_bytes, before = 0, 0, np.int64(-1)
    places = buffers[0]
    for start in range(0, len(block), _TURN):
        end = _find(block, target, nan, start, min(start + _TURN, len(block)), places, num)
        gap_bytes, before = _take(block, target, nan, buffers, (num, end), gaps, gap_bytes, before)
        num = end
    return num, gap_bytes


@jit
def _find(block, target, nan, start, stop, places, num):
    """Add the places where a block differs from its target to the `num` that are there. Returns how many there are then.

    Six places of each 64 words are written whether or not there are so many, since that needs no decision.
    """
    whole = stop - (stop - start) % LANES
    for at in range(start, whole, LANES):
        bits = changed(block, at, target, at, nan)
        end = num + ones(bits)
        for k in range(6):
            places[_at(num + k)] = at + trailing_zeros(bits)
            bits &= bits - _ONE
        num += 6
        while bits:
            places[_at(num)] = at + trailing_zeros(bits)
            bits &= bits - _ONE
            num += 1
        num = end
    for place in range(whole, stop):
        if block[place] != word(target, place, nan):
            places[_at(num)] = place
            num += 1
    return num


@jit
def _take(block, target, nan, buffers, changes, gaps, end, before):
    """Write some changes, the first to one after the last, and their gaps from byte `end` on; `before`: the place before."""
    places, olds, deltas = buffers
    for k in range(changes[0], changes[1]):
        at = _at(places[_at(k)])
        new = word(target, np.int64(at), nan)
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


@jit
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


@jit
def _write_all(places, deltas, num, dense):
    dense[:] = 0
    for k in range(num):
        dense[_at(places[_at(k)])] = deltas[_at(k)]


@jit
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


@jit
def _read_gaps(job, places, block, fetched, num_fetched):
    """The places of a block's changes; returns how many, 0 if they cannot be right. Fetches the second half of `fetched`."""
    count, gaps, num_gaps, changes, like = job[3], job[4], job[8], job[9], np.empty(0, np.uint8)
    place, num, half = np.int64(-1), 0, num_fetched >> 1
    for k in range(num_gaps):
        gap = np.int64(load(gaps, k, like))
        is_change = 1 if gap != SKIP else 0
        place += gap + is_change
        places[_at(num)] = place
        num += is_change
        prefetch(block, np.int64(fetched[_at(half + (k >> 1))]))
    return num if place < count and num == changes else 0


@jit
def _add(block, places, num, olds, deltas, next_block, next_places):
    """Add deltas; keep the words before. Fetches the first half of the next block's places."""
    for k in range(num):
        at = _at(places[_at(k)])
        prefetch(next_block, np.int64(next_places[_at(k >> 1)]))
        olds[_at(k)] = block[at]
        block[at] += deltas[_at(k)]


@jit
def _read_values(values, num, wide, num_wide, direction, deltas):
    """Read what to add to each word that changes."""
    signed, escape = np.empty(0, np.int8), 0
    for k in range(num):
        deltas[k] = direction * np.int64(load(values, k, signed))
    for k in range(num if num_wide else 0):
        if load(values, k, signed) == WIDE and escape < num_wide:
            deltas[k] = direction * np.int64(load(wide, escape, deltas))
            escape += 1


@jit
def _add_all(block, dense, direction, key, first, mask):
    """Add the deltas of a dense block, or subtract them; returns by how much the digest moves."""
    total = _NONE
    for k in range(len(block)):
        old = block[k]
        new = old + direction * np.int64(load(dense, k, block))
        block[k] = new
        index = first + np.uint64(k)
        total += _term(key, index, np.uint64(new) & mask) - _term(key, index, np.uint64(old) & mask)
    return total
