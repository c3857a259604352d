"""Token sequences side by side: what a forward pass reads, whether they are whole trajectories or spans of running ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from oldlogits.core.scoring import ScoringSpan
from oldlogits.core.trajectory import Choices

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequences:
    """Sequences as flat arrays. NumPy, so that they cross process boundaries as plain bytes.

    Args:
        token_ids: int64 [token].
        temperature: float32 [token]; 1 where nothing was sampled.
        starts: int64 [sequence + 1]; sequence s is ``[starts[s], starts[s + 1])``.
        routing: [token, layer, choice]; the experts that an engine chose for each token, None: they are not known.
        kin: int64 [sequence], ascending; sequences of one number are scored in one micro-batch; None: each by itself.
    """

    token_ids: Ints
    temperature: Floats
    starts: Ints
    routing: Choices | None = None
    kin: Ints | None = None

    @property
    def num_tokens(self) -> int:
        """The number of all tokens."""
        return len(self.token_ids)

    @property
    def num_sequences(self) -> int:
        """The number of sequences."""
        return len(self.starts) - 1

    @property
    def lengths(self) -> Ints:
        """int64 [sequence]: the number of tokens."""
        return np.diff(self.starts)

    @property
    def sequence(self) -> Ints:
        """int64 [token]: the sequence of each token."""
        return np.repeat(np.arange(self.num_sequences), self.lengths)

    def lay_out(self, tokens: Ints) -> tuple[Sequences, Ints, Ints]:
        """Give the sequences that a forward pass reads to score tokens, which have ascending flat indices.

        Returns:
            The sequences, the index in them of every token, ascending, and its flat index here.
        """
        return self, tokens, tokens


def pack(spans: Sequence[ScoringSpan]) -> tuple[Sequences, Ints]:
    """Lay at least one span side by side, and give the flat index of every token to score, span after span."""
    starts = np.cumsum([0, *(len(span.token_ids) for span in spans)]).astype(np.int64)
    tokens = np.concatenate([span.positions + start for span, start in zip(spans, starts[:-1], strict=True)])
    temperature = np.ones(int(starts[-1]), np.float32)
    temperature[tokens] = np.concatenate([span.temperature for span in spans])
    token_ids = np.concatenate([span.token_ids for span in spans])
    routing = [span.routing for span in spans if span.routing is not None]
    return Sequences(
        token_ids=token_ids,
        temperature=temperature,
        starts=starts,
        routing=np.concatenate(routing) if len(routing) == len(spans) else None,
    ), tokens
