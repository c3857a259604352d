"""A flat batch to micro-batches of one packed row each, in which what sequences begin with alike stands once."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from oldlogits.batch.pad import MicroBatch, read_lengths
from oldlogits.batch.sequences import Ints, Sequences
from oldlogits.batch.trie import Sorted, balanced, grow, sort


def packed_plan(batch: Sequences, tokens: Ints, token_budget: int, *, shares: bool) -> list[Sorted]:
    """Assign the sequences that score `tokens` to micro-batches of at most `token_budget` tokens and of about equal costs.

    A sequence that is longer than the budget forms a micro-batch of its own. Which prefixes are read once is said at `sort`.
    """
    found = sort(batch, read_lengths(batch, tokens), shares=shares)
    return [found.part(*run) for run in balanced(found, tokens=token_budget)]


def packed_micro_batches(batch: Sequences, tokens: Ints, token_budget: int, *, shares: bool) -> Iterator[MicroBatch]:
    """Yield packed micro-batches that score the given tokens; the arguments are those of `pad.micro_batches`."""
    sequence = np.searchsorted(batch.starts, tokens, side="right") - 1
    for part in packed_plan(batch, tokens, token_budget, shares=shares):
        yield _pack(batch, tokens, sequence, part)


def _pack(batch: Sequences, tokens: Ints, sequence: Ints, part: Sorted) -> MicroBatch:
    trie, place, offsets = grow(part)
    row_of = np.full(batch.num_sequences, -1, np.int64)
    row_of[part.rows] = np.arange(len(part.rows))
    chosen = row_of[sequence] >= 0
    flat, owner = tokens[chosen], sequence[chosen]
    source = np.empty(len(trie.positions), np.int64)
    source[place] = np.arange(len(place)) + np.repeat(batch.starts[part.rows] - offsets, part.lengths)
    column = place[offsets[row_of[owner]] + flat - batch.starts[owner] - 1]
    return MicroBatch(
        input_ids=torch.from_numpy(batch.token_ids[source][None]),
        row=torch.zeros(len(flat), dtype=torch.int64),
        column=torch.from_numpy(column),
        targets=torch.from_numpy(batch.token_ids[flat]),
        temperature=torch.from_numpy(batch.temperature[flat]),
        flat=torch.from_numpy(flat),
        routing=None if batch.routing is None else torch.from_numpy(batch.routing[source][None]),
        is_read=None if batch.routing is None else torch.ones(1, len(source), dtype=torch.bool),
        trie=trie,
    )
