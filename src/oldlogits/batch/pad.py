"""Micro-batches: what a forward pass reads at once; and a flat batch to padded ones with little padding.

Padding is on the right, so that causal attention alone keeps it away from real tokens: no attention mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor

from oldlogits.batch.sequences import Ints, Sequences
from oldlogits.batch.trie import Trie


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Sequences side by side, padded on the right or in one packed row, and the tokens among them to score.

    Args:
        input_ids: int64 [row, column]; padding is token 0.
        row: int64 [action]; the row of each token to score.
        column: int64 [action]; the column *before* it, whose hidden state predicts it.
        targets: int64 [action]; the token itself.
        temperature: float32 [action].
        flat: int64 [action]; its index in the flat batch.
        routing: [row, column, layer, choice]; the experts that an engine chose for each token; None: they are not known.
        is_read: bool [row, column]; False for padding.
        trie: The places of tokens in a packed row, which say what each attends to; None: each row is one sequence.
    """

    input_ids: Tensor
    row: Tensor
    column: Tensor
    targets: Tensor
    temperature: Tensor
    flat: Tensor
    routing: Tensor | None = None
    is_read: Tensor | None = None
    trie: Trie | None = None

    @property
    def num_read(self) -> int:
        """The tokens in it that are no padding: each row ends before the last token that is scored in it."""
        if self.trie is not None:
            return len(self.trie.positions)
        ends = torch.zeros(len(self.input_ids), dtype=torch.int64)
        return int(ends.scatter_reduce(0, self.row, self.column + 1, "amax").sum())

    def to(self, device: torch.device) -> Self:
        """Copy what a forward pass reads to a device; `flat` stays on the CPU."""
        if device.type == "cpu":
            return self
        moved = ["input_ids", "row", "column", "targets", "temperature"]
        moved += [] if self.routing is None else ["routing", "is_read"]
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in moved})

    def named(self, tokens: Ints, flat: Ints) -> Self:
        """Replace the indices of its tokens, some of the ascending `tokens`, by those at the same places of `flat`."""
        if flat is tokens:
            return self
        return replace(self, flat=torch.from_numpy(flat[np.searchsorted(tokens, self.flat.numpy())]))


def plan(lengths: Ints, token_budget: int, kin: Ints | None = None) -> list[Ints]:
    """Assign sequences to micro-batches of at most `token_budget` padded tokens, longest first. No sequence is split.

    A sequence that is longer than the budget forms a micro-batch of its own. Sequences of length 0 are left out. Those of one
    number in `kin` stay together, and are then as one, as long as the longest.

    Example:
        >>> [list(map(int, rows)) for rows in plan(np.array([3, 9, 4]), 9)]
        [[1], [2, 0]]
    """
    if kin is not None:
        return _plan_families(lengths, token_budget, kin)
    order = np.argsort(-lengths, kind="stable")
    order = order[lengths[order] > 0]
    plans: list[Ints] = []
    start = 0
    while start < len(order):
        rows = max(1, token_budget // int(lengths[order[start]]))
        plans.append(order[start : start + rows])
        start += rows
    return plans


def _plan_families(lengths: Ints, token_budget: int, kin: Ints) -> list[Ints]:
    """See `plan`; a family is its members that have a length."""
    read = np.flatnonzero(lengths)
    families, family = np.unique(kin[read], return_inverse=True)
    longest, sizes = np.zeros(len(families), np.int64), np.bincount(family, minlength=len(families))
    np.maximum.at(longest, family, lengths[read])
    plans: list[list[int]] = []
    num_rows = width = 0
    for one in np.argsort(-longest, kind="stable").tolist():
        if not plans or (num_rows + sizes[one]) * width > token_budget:
            plans.append([])
            num_rows, width = 0, longest[one]
        plans[-1].append(one)
        num_rows += sizes[one]
    return [np.concatenate([read[family == one] for one in members]) for members in plans]


def read_lengths(batch: Sequences, tokens: Ints) -> Ints:
    """Count the tokens of each sequence, from its beginning, that a forward pass reads to score `tokens`: int64 [sequence].

    Example:
        Sequences [0, 5) and [5, 9), tokens 2 and 3: [3, 0]; the last token itself is predicted, not read.
    """
    sequence = np.searchsorted(batch.starts, tokens, side="right") - 1
    needed = np.zeros(batch.num_sequences, np.int64)
    np.maximum.at(needed, sequence, tokens - batch.starts[sequence])
    return needed


def micro_batches(batch: Sequences, tokens: Ints, token_budget: int) -> Iterator[MicroBatch]:
    """Yield the micro-batches that score the given tokens; each sequence is cut after the last of its tokens.

    Args:
        batch: The flat batch, or any sequences.
        tokens: int64 [action], ascending flat indices of the tokens to score; none begins a sequence.
        token_budget: The most padded tokens in one micro-batch.
    """
    sequence = np.searchsorted(batch.starts, tokens, side="right") - 1
    needed = read_lengths(batch, tokens)
    for rows in plan(needed, token_budget, batch.kin):
        yield _pad(batch, tokens, sequence, rows, needed)


def _pad(batch: Sequences, tokens: Ints, sequence: Ints, rows: Ints, needed: Ints) -> MicroBatch:
    width = int(needed[rows].max())
    columns = np.arange(width)
    source = np.minimum(batch.starts[rows, None] + columns, batch.num_tokens - 1)
    input_ids = np.where(columns < needed[rows, None], batch.token_ids[source], 0)
    row_of = np.full(batch.num_sequences, -1, np.int64)
    row_of[rows] = np.arange(len(rows))
    chosen = row_of[sequence] >= 0
    flat, owner = tokens[chosen], sequence[chosen]
    return MicroBatch(
        input_ids=torch.from_numpy(input_ids),
        row=torch.from_numpy(row_of[owner]),
        column=torch.from_numpy(flat - batch.starts[owner] - 1),
        targets=torch.from_numpy(batch.token_ids[flat]),
        temperature=torch.from_numpy(batch.temperature[flat]),
        flat=torch.from_numpy(flat),
        routing=None if batch.routing is None else torch.from_numpy(batch.routing[source]),
        is_read=None if batch.routing is None else torch.from_numpy(columns < needed[rows, None]),
    )
