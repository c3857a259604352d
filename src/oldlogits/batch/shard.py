"""Micro-batches of each rank: it computes some of the sequences, and all ranks make the same number of forward passes.

The weights of a sharded model are gathered by all ranks together, layer by layer. A rank that has run out of micro-batches
therefore computes one again, as padding: its results are not used.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from oldlogits.batch.pad import MicroBatch, micro_batches, plan, read_lengths
from oldlogits.batch.sequences import Ints, Sequences


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMicroBatch:
    """A micro-batch of whole sequences; where `is_padding`, another rank computes it too, and only its results are used."""

    micro: MicroBatch
    is_padding: bool


def shard_micro_batches(
    batch: Sequences, tokens: Ints, token_budget: int, *, rank: int, num_ranks: int
) -> Iterator[RankMicroBatch]:
    """Yield the micro-batches of one rank, as many as every other rank has. None splits a sequence.

    Those that are no padding hold, over all ranks, every one of `tokens` once. The arguments are those of `micro_batches`, the
    same on all ranks, and which of them this one is.
    """
    parts = shares(batch, tokens, num_ranks)
    counts = [len(plan(read_lengths(batch, part), token_budget)) for part in parts]
    for micro in micro_batches(batch, parts[rank], token_budget):
        yield RankMicroBatch(micro=micro, is_padding=False)
    missing = max(counts) - counts[rank]
    if missing:
        again = next(micro_batches(batch, parts[int(np.argmax(counts))], token_budget))
        for _ in range(missing):
            yield RankMicroBatch(micro=again, is_padding=True)


def shares(batch: Sequences, tokens: Ints, num_ranks: int) -> list[Ints]:
    """Assign tokens to ranks: whole sequences, longest first, in snake order.

    Example:
        Sequences of which 9, 7, 4 and 3 tokens are read, 2 ranks: 9 and 3, 7 and 4.
    """
    if num_ranks == 1:
        return [tokens]
    needed = read_lengths(batch, tokens)
    order = np.argsort(-needed, kind="stable")
    turns = np.concatenate([np.arange(num_ranks), np.arange(num_ranks)[::-1]])
    owner = np.empty(batch.num_sequences, np.int64)
    owner[order] = np.resize(turns, len(order))
    owner_of = owner[np.searchsorted(batch.starts, tokens, side="right") - 1]
    return [tokens[owner_of == rank] for rank in range(num_ranks)]
