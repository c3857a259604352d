"""Micro-batches of each rank: it computes some of the sequences, and all ranks make the same number of forward passes.

The weights of a sharded model are gathered by all ranks together, layer by layer. A rank that has run out of micro-batches
therefore computes one again, as padding: its results are not used.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from oldlogits.batch.pack import packed_micro_batches, packed_plan
from oldlogits.batch.pad import MicroBatch, micro_batches, plan, read_lengths
from oldlogits.batch.sequences import Ints, Sequences
from oldlogits.batch.trie import dealt, sort
from oldlogits.core.scoring import Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMicroBatch:
    """A micro-batch of whole sequences; where `is_padding`, another rank computes it too, and only its results are used."""

    micro: MicroBatch
    is_padding: bool


def shard_micro_batches(
    batch: Sequences, tokens: Ints, token_budget: int, *, rank: int, num_ranks: int, layout: Layout = "padded"
) -> Iterator[RankMicroBatch]:
    """Yield the micro-batches of one rank, as many as every other rank has. None splits a sequence.

    Those that are no padding hold, over all ranks, every one of `tokens` once. The arguments are those of `micro_batches`, the
    same on all ranks, how these are laid out, and which of the ranks this one is.
    """
    batch, tokens, flat = batch.lay_out(tokens)
    parts = shares(batch, tokens, num_ranks, layout)
    counts = [num_micro_batches(batch, part, token_budget, layout) for part in parts] if num_ranks > 1 else [0]
    for micro in _micro_batches(batch, parts[rank], token_budget, layout):
        yield RankMicroBatch(micro=micro.named(tokens, flat), is_padding=False)
    missing = max(counts) - counts[rank]
    if missing:
        again = next(_micro_batches(batch, parts[int(np.argmax(counts))], token_budget, layout)).named(tokens, flat)
        for _ in range(missing):
            yield RankMicroBatch(micro=again, is_padding=True)


def num_micro_batches(batch: Sequences, tokens: Ints, token_budget: int, layout: Layout) -> int:
    """Count the micro-batches that score tokens of sequences as they are laid out."""
    if layout == "padded":
        return len(plan(read_lengths(batch, tokens), token_budget, batch.kin))
    return len(packed_plan(batch, tokens, token_budget, shares=layout == "shared"))


def _micro_batches(batch: Sequences, tokens: Ints, token_budget: int, layout: Layout) -> Iterator[MicroBatch]:
    if layout == "padded":
        return micro_batches(batch, tokens, token_budget)
    return packed_micro_batches(batch, tokens, token_budget, shares=layout == "shared")


def shares(batch: Sequences, tokens: Ints, num_ranks: int, layout: Layout = "padded") -> list[Ints]:
    """Assign tokens to ranks: whole sequences, by what they cost; padded ones by their length, longest first, in snake order.

    Example:
        Sequences of which 9, 7, 4 and 3 tokens are read, 2 ranks: 9 and 3, 7 and 4.
    """
    if num_ranks == 1:
        return [tokens]
    sequence = np.searchsorted(batch.starts, tokens, side="right") - 1
    if layout != "padded":
        found = sort(batch, read_lengths(batch, tokens), shares=layout == "shared")
        return [tokens[np.isin(sequence, rows)] for rows in dealt(found, num_ranks)]
    family = np.arange(batch.num_sequences) if batch.kin is None else batch.kin
    needed = np.bincount(family, read_lengths(batch, tokens)).astype(np.int64)
    order = np.argsort(-needed, kind="stable")
    turns = np.concatenate([np.arange(num_ranks), np.arange(num_ranks)[::-1]])
    owner = np.empty(len(needed), np.int64)
    owner[order] = np.resize(turns, len(order))
    owner_of = owner[family[sequence]]
    return [tokens[owner_of == rank] for rank in range(num_ranks)]
