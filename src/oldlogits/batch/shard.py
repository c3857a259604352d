"""Dealing a batch over ranks: each computes some of the sequences, and all make the same number of forward passes.

The weights of a sharded model are gathered by all ranks together, layer by layer, so a rank that has run out of micro-batches
computes one again whose results do not count.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from oldlogits.batch.pad import MicroBatch, micro_batches, plan, read_lengths
from oldlogits.batch.sequences import Ints, Sequences


@dataclass(frozen=True, slots=True, kw_only=True)
class Dealt:
    """A micro-batch of one rank.

    Args:
        micro: To compute.
        counts: False: another rank has it too, and its results are those that count.
    """

    micro: MicroBatch
    counts: bool


def deal(batch: Sequences, tokens: Ints, token_budget: int, *, rank: int, num_ranks: int) -> Iterator[Dealt]:
    """One rank's micro-batches, as many as every other rank's.

    Args:
        batch: The flat batch, or any sequences; the same on all ranks.
        tokens: int64 [action], ascending flat indices of the tokens to score; none begins a sequence.
        token_budget: The most padded tokens in one micro-batch.
        rank: Whose.
        num_ranks: Among how many.

    Yields:
        Micro-batches; those that count hold, over all ranks, every one of `tokens` once.
    """
    parts = shares(batch, tokens, num_ranks)
    counts = [len(plan(read_lengths(batch, part), token_budget)) for part in parts]
    for micro in micro_batches(batch, parts[rank], token_budget):
        yield Dealt(micro=micro, counts=True)
    missing = max(counts) - counts[rank]
    if missing:
        again = next(micro_batches(batch, parts[int(np.argmax(counts))], token_budget))
        for _ in range(missing):
            yield Dealt(micro=again, counts=False)


def shares(batch: Sequences, tokens: Ints, num_ranks: int) -> list[Ints]:
    """The tokens of each rank: whole sequences, dealt out longest first, forth and back.

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
