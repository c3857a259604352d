"""Key-value segments: which version computed each entry of keys and values that a sampled token attended to.

A chain of segments is what the engine's cache held for one trajectory since it was filled: with entries of one version, those
of all tokens before the first that it samples (``kv = "fresh"``). It goes on where later tokens are sampled over these
entries (``kv = "mixed"``): entries are computed when the next sampled token needs them, by the version that samples it.

    tokens    p p p p a a a a b b r r b b c      p, r: read; a, b, c: sampled, by versions of these names
    entries   a a a a a a a b b b b b b c        three segments; nobody attends to the entry of the last token
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from oldlogits.batch.collate import TokenBatch
from oldlogits.batch.routing import RoutingChains
from oldlogits.batch.sequences import Ints, Sequences
from oldlogits.core.errors import TrajectoryError
from oldlogits.core.trajectory import Choices


@dataclass(frozen=True, slots=True, kw_only=True)
class KVSegment:
    """The entries of a chain that one version computed, and the tokens that this version sampled meanwhile.

    Args:
        version: The version that computed the entries.
        origin: Flat index of the first token of the sequence.
        begin: Flat index of the first token whose entry it computed; the last one is the one before ``tokens[-1]``.
        tokens: int64 [sampled token]; ascending flat indices.
    """

    version: int
    origin: int
    begin: int
    tokens: Ints

    @property
    def num_entries(self) -> int:
        """The number of entries that the version computed."""
        return int(self.tokens[-1]) - self.begin


KVChain = list[KVSegment]
"""Segments in the order of their entries, the first from the beginning of the sequence; versions ascend."""


def kv_chains(batch: TokenBatch) -> list[KVChain]:
    """Form the chains in which the batch's loss tokens were sampled; each token is in one segment.

    Fresh tokens of one version share a chain, whatever the number of their turns.

    Raises:
        TrajectoryError: A trajectory begins over keys and values of older versions, and nothing says of which.
    """
    tokens = np.flatnonzero(batch.loss_mask)
    sequence, version, mixed = batch.sequence[tokens], batch.version[tokens], batch.mixed_kv[tokens]
    begins = np.diff(sequence, prepend=-1) != 0
    if (begins & mixed).any():
        raise TrajectoryError(
            "a trajectory begins over keys and values of unknown versions",
            got=f'kv = "mixed" on the first sampled token of {batch.trajectory_ids[sequence[(begins & mixed).argmax()]]}',
            allowed='"mixed" after sampled tokens, over the entries that these attended to and added',
            fix='let the engine share no entries of older versions between trajectories, or set engine.kv = "recompute"',
        )
    is_other = np.diff(version, prepend=-1) != 0
    was_mixed = np.concatenate([[False], mixed[:-1]])
    is_first = begins | (~mixed & (is_other | was_mixed))
    edges = [*np.flatnonzero(is_first | is_other).tolist(), len(tokens)]
    chains: list[KVChain] = []
    for start, end in pairwise(edges):
        part, origin = tokens[start:end], int(batch.starts[sequence[start]])
        if is_first[start]:
            chains.append([])
        begin = origin if is_first[start] else int(tokens[start - 1])
        chains[-1].append(KVSegment(version=int(version[start]), origin=origin, begin=begin, tokens=part))
    return chains


def segment_sequences(batch: TokenBatch, segments: Sequence[KVSegment]) -> tuple[Sequences, Ints, Ints]:
    """Lay at least one segment of a batch out as sequences of their own.

    Returns:
        The sequences, the index in them of every token to score, and the flat index in `batch` of every token of the sequences.
    """
    lengths = np.array([segment.num_entries + 1 for segment in segments], np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    shifts = starts[:-1] - [segment.begin for segment in segments]
    flat = np.arange(starts[-1]) - np.repeat(shifts, lengths)
    tokens = np.concatenate([segment.tokens + shift for segment, shift in zip(segments, shifts, strict=True)])
    cut = Sequences(
        token_ids=batch.token_ids[flat],
        temperature=batch.temperature[flat],
        starts=starts,
        routing=None if batch.chains is None else _routing_of(batch.chains, segments),
    )
    return cut, tokens, flat


def _routing_of(chains: RoutingChains, segments: Sequence[KVSegment]) -> Choices:
    """Give the experts of the segments' tokens; the last of each is predicted, not read: any experts do."""
    found = []
    for segment in segments:
        begin = segment.begin - segment.origin
        read = chains.of_entries(int(segment.tokens[-1]), begin, begin + segment.num_entries)
        found += [read, read[-1:]]
    return np.concatenate(found)
