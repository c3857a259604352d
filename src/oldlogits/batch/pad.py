"""A flat batch to padded micro-batches with little padding.

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


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Sequences side by side, padded on the right, and the tokens among them to score.

    Args:
        input_ids: int64 [row, column]; padding is token 0.
        row: int64 [action]; the row of each token to score.
        column: int64 [action]; the column *before* it, whose hidden state predicts it.
        targets: int64 [action]; the token itself.
        temperature: float32 [action].
        flat: int64 [action]; its index in the flat batch.
    """

    input_ids: Tensor
    row: Tensor
    column: Tensor
    targets: Tensor
    temperature: Tensor
    flat: Tensor

    def to(self, device: torch.device) -> Self:
        """Copy what a forward pass reads to a device; `flat` stays on the CPU."""
        if device.type == "cpu":
            return self
        moved = ("input_ids", "row", "column", "targets", "temperature")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in moved})


def plan(lengths: Ints, token_budget: int) -> list[Ints]:
    """Assign sequences to micro-batches of at most `token_budget` padded tokens, longest first. No sequence is split.

    A sequence that is longer than the budget forms a micro-batch of its own. Sequences of length 0 are left out.

    Example:
        >>> [list(map(int, rows)) for rows in plan(np.array([3, 9, 4]), 9)]
        [[1], [2, 0]]
    """
    order = np.argsort(-lengths, kind="stable")
    order = order[lengths[order] > 0]
    plans: list[Ints] = []
    start = 0
    while start < len(order):
        rows = max(1, token_budget // int(lengths[order[start]]))
        plans.append(order[start : start + rows])
        start += rows
    return plans


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
    for rows in plan(needed, token_budget):
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
    )
