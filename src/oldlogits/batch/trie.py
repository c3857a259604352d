"""Sequences that begin alike, laid out so that what they share is there once.

    sequences   p p p a a       sorted, with what each shares     0 p p p a a      nodes   p p p | a | a | b b
                p p p a             with the one before it:       4 p p p a        packed  0 1 2   3   4   5 6
                p p p b b                                         3 p p p b b

A *node* is a run of tokens that the same sequences read. Nodes stand in the order of a depth-first walk, so that the tokens
that follow a node, in any sequence, stand side by side behind it: they attend to all of it, and to nothing of their siblings.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np

from oldlogits.batch.sequences import Bools, Ints, Sequences

MIN_SAVED: Final = 16
"""A run of tokens becomes a node if sharing it saves as many; else each sequence has it for itself."""
PAIRS_PER_TOKEN: Final = 6144
"""Pairs of a query and a key that take as long as the rest of a layer for one token: 6 a number of its width, here 1,024."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sorted:
    """Sequences in an order in which those that begin alike stand side by side.

    Args:
        rows: int64 [row]; the sequences.
        lengths: int64 [row]; the tokens that are read of each.
        shared: int64 [row]; how many of them, from the beginning, are those of the row before; 0 for the first.
        follows: bool [row]; whether a row must be in the micro-batch of the one before.
    """

    rows: Ints
    lengths: Ints
    shared: Ints
    follows: Bools

    @property
    def costs(self) -> Ints:
        """int64 [row]: what a row costs behind the one before, in pairs of a query and a key."""
        return _pairs(self.lengths) - _pairs(self.shared)

    def part(self, start: int, end: int) -> Sorted:
        """Take the rows ``[start, end)``."""
        shared = self.shared[start:end].copy()
        shared[:1] = 0
        rows = slice(start, end)
        return Sorted(rows=self.rows[rows], lengths=self.lengths[rows], shared=shared, follows=self.follows[rows])


@dataclass(frozen=True, slots=True, kw_only=True)
class Trie:
    """Where tokens stand in a packed row.

    Args:
        nodes: int64 [node, 3]; start, end and last: a node is ``[start, end)``, and what follows it ``[end, last)``.
        positions: int64 [packed]; the place of each token in its sequences.
    """

    nodes: Ints
    positions: Ints

    @property
    def sizes(self) -> Ints:
        """int64 [node]: the number of tokens of each."""
        sizes: Ints = self.nodes[:, 1] - self.nodes[:, 0]
        return sizes


def sort(batch: Sequences, lengths: Ints, *, shares: bool) -> Sorted:
    """Sort the sequences of which tokens are read, by these tokens; or where nothing is shared, the longest first.

    Sequences of one number in `batch.kin` follow each other. Where the experts of tokens are given, nothing is shared: each
    sequence may have been served by others.

    Args:
        batch: The sequences.
        lengths: int64 [sequence]; how many tokens are read of each, from its beginning.
        shares: Whether what they have in common is read once.
    """
    read = np.flatnonzero(lengths)
    if not shares or batch.routing is not None:
        kin = read if batch.kin is None else batch.kin[read]
        longest = np.zeros(int(kin.max(initial=-1)) + 1, np.int64)
        np.maximum.at(longest, kin, lengths[read])
        order = np.lexsort((kin, -longest[kin]))
        rows, kin = read[order], kin[order]
        follows = np.concatenate([[False], kin[1:] == kin[:-1]])[: len(rows)]
        return Sorted(rows=rows, lengths=lengths[rows], shared=np.zeros(len(rows), np.int64), follows=follows)
    tokens = {s: batch.token_ids[batch.starts[s] : batch.starts[s] + lengths[s]] for s in read.tolist()}
    in_order = sorted(tokens, key=lambda s: tokens[s].astype(">u4").tobytes())
    shared = [0, *(_common(tokens[a], tokens[b]) for a, b in pairwise(in_order))][: len(in_order)]
    rows = np.array(in_order, np.int64)
    found = Sorted(
        rows=rows,
        lengths=lengths[rows],
        shared=np.array(shared, np.int64),
        follows=np.zeros(len(rows), np.bool_),
    )
    worth = np.zeros(len(rows), np.int64)
    for _, end, first, beyond in _nodes(found, MIN_SAVED):
        worth[first + 1 : beyond] = end
    return Sorted(rows=found.rows, lengths=found.lengths, shared=worth, follows=found.follows)


def cut(found: Sorted, *, tokens: int, cost: float = np.inf) -> list[tuple[int, int]]:
    """Cut rows into runs of at most so many tokens and such a cost.

    What the first row of a run shares with the row before is read again: it is least for each token that the run before reads.
    A run of rows that cannot be cut may be larger.
    """
    new, costs = (found.lengths - found.shared).tolist(), found.costs.tolist()
    lengths, whole, shared = found.lengths.tolist(), _pairs(found.lengths).tolist(), found.shared.tolist()
    runs, start, at = [], 0, 0
    while start < len(new):
        read, spent, best, least, at = lengths[start], whole[start], 0, np.inf, start + 1
        while at < len(new):
            if not found.follows[at] and shared[at] <= least * read:
                best, least = at, shared[at] / read
            read, spent = read + new[at], spent + costs[at]
            if best and (read > tokens or spent + PAIRS_PER_TOKEN * read > cost):
                at = best
                break
            at += 1
        runs.append((start, at))
        start = at
    return runs


def balanced(found: Sorted, *, tokens: int) -> list[tuple[int, int]]:
    """Cut rows into as few runs of at most so many tokens as `cut` does, such that the costliest is as cheap as can be."""
    best = cut(found, tokens=tokens)
    low, high = 0.0, max((_cost(found, run) for run in best), default=0.0)
    for _ in range(10 if len(best) > 1 else 0):
        middle = (low + high) / 2
        runs = cut(found, tokens=tokens, cost=middle)
        if len(runs) <= len(best):
            best, high = runs, middle
        else:
            low = middle
    return best


def dealt(found: Sorted, num_parts: int) -> list[Ints]:
    """Deal rows out to parts of about equal cost, costliest runs first; those that share much stay together."""
    runs = cut(found, tokens=int(found.lengths.sum()), cost=_cost(found, (0, len(found.rows))) / (4 * num_parts))
    parts: list[list[Ints]] = [[] for _ in range(num_parts)]
    spent = np.zeros(num_parts)
    for cost, (start, end) in sorted(((_cost(found, run), run) for run in runs), reverse=True):
        cheapest = int(spent.argmin())
        parts[cheapest].append(found.rows[start:end])
        spent[cheapest] += cost
    return [np.concatenate(part) if part else np.zeros(0, np.int64) for part in parts]


def grow(found: Sorted) -> tuple[Trie, Ints, Ints]:
    """Lay rows out as a trie.

    Returns:
        The trie, and int64 [token], row after row: the packed index of each token that is read, and where each row begins.
    """
    nodes = np.array(_nodes(found, 1), np.int64).reshape(-1, 4)
    nodes = nodes[nodes[:, 1] > nodes[:, 0]]
    begins, stops, first, beyond = nodes.T
    ends = np.cumsum(stops - begins)
    starts = ends - (stops - begins)
    following = np.searchsorted(first, beyond)
    lasts = np.concatenate([starts, ends[-1:]])[following]
    positions = np.arange(ends[-1]) - np.repeat(starts - begins, stops - begins)
    offsets = np.concatenate([[0], np.cumsum(found.lengths)])
    place = np.empty(offsets[-1], np.int64)
    for begin, stop, one, other, start in np.column_stack([nodes, starts]).tolist():
        for row in range(one, other):
            place[offsets[row] + begin : offsets[row] + stop] = np.arange(start, start + stop - begin)
    return Trie(nodes=np.column_stack([starts, ends, lasts]), positions=positions), place, offsets[:-1]


def _nodes(found: Sorted, min_saved: int) -> list[tuple[int, int, int, int]]:
    """Walk the trie depth first: the positions ``[begin, end)`` that the rows ``[first, beyond)`` share.

    What the rows of one node share with fewer than all of them stands in nodes of its own. Nodes that save too little are not
    there: each of their rows has these tokens for itself. A node without tokens ends a row, or is such a one.
    """
    nodes: list[tuple[int, int, int, int]] = []
    stack = [(0, len(found.rows), 0)] if len(found.rows) else []
    while stack:
        first, beyond, begin = stack.pop()
        inner = found.shared[first + 1 : beyond]
        end = int(inner.min()) if len(inner) else int(found.lengths[first])
        if end > begin and (not len(inner) or (end - begin) * len(inner) >= min_saved):
            nodes.append((begin, end, first, beyond))
            begin = end
        if len(inner):
            edges = [first, *(first + 1 + np.flatnonzero(inner == end)).tolist(), beyond]
            stack += [(one, other, begin) for one, other in reversed(list(pairwise(edges)))]
    return nodes


def _common(one: Ints, other: Ints) -> int:
    n = min(len(one), len(other))
    differs = one[:n] != other[:n]
    return int(differs.argmax()) if differs.any() else n


def _pairs(lengths: Ints) -> Ints:
    pairs: Ints = lengths * (lengths + 1) // 2
    return pairs


def _cost(found: Sorted, run: tuple[int, int]) -> float:
    part = found.part(*run)
    return float(part.costs.sum() + PAIRS_PER_TOKEN * (part.lengths - part.shared).sum())
