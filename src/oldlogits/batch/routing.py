"""Routing of a batch: for every loss token, the experts that served the tokens before it when it was sampled.

Each version that reads a token again, to sample over keys and values of its own, may choose other experts for it. A *chain* is
what the tokens of one trajectory were sampled over without such a new beginning (the chains of batch/kv_segments.py): with
``engine.kv = "recompute"`` one for each version of a trajectory, with "stale" usually one for all of them.

    tokens    p p p p a a a a r r b b b      p, r: read; a, b: sampled, by versions of these names
    chain 0   a a a a a a a                  the experts as a chose them: those of a's tokens are replayed over these
    chain 1   b b b b b b b b b b b b        as b chose them when it read the trajectory anew
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from oldlogits.batch.sequences import Ints, Sequences
from oldlogits.core.errors import TrajectoryError
from oldlogits.core.trajectory import Choices, Routing, Sampled, Segment, Trajectory, goes_on

MISSING: Final = "set model.routing = 'off', or use an engine that returns the experts of every token it reads"


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingChains:
    """The routing of a batch.

    Args:
        choices: [entry, layer, choice]; chain after chain, of the tokens of its sequence from the first on.
        starts: int64 [chain + 1]; chain c is ``choices[starts[c] : starts[c + 1]]``.
        chain: int64 [token]; the chain that a loss token was sampled over, -1 for context. Chains ascend with sequences.
    """

    choices: Choices
    starts: Ints
    chain: Ints

    def lay_out(self, batch: Sequences, tokens: Ints) -> tuple[Sequences, Ints, Ints]:
        """Lay out one sequence for each chain that some of `tokens` were sampled over, up to the last of them.

        Args:
            batch: The sequences of the batch.
            tokens: int64 [scored token], loss tokens of it by flat index.

        Returns:
            The sequences with their routing, the index in them of every token, ascending, and its flat index in `batch`.
        """
        flat = tokens[np.lexsort((tokens, self.chain[tokens]))]
        chains, row = np.unique(self.chain[flat], return_inverse=True)
        begins = batch.starts[np.searchsorted(batch.starts, flat, side="right") - 1]
        lengths, origins = np.zeros(len(chains), np.int64), np.zeros(len(chains), np.int64)
        np.maximum.at(lengths, row, flat - begins + 1)
        origins[row] = begins
        starts = np.concatenate([[0], np.cumsum(lengths)])
        source = np.arange(starts[-1]) + np.repeat(origins - starts[:-1], lengths)
        entry = np.arange(starts[-1]) + np.repeat(self.starts[chains] - starts[:-1], lengths)
        entry[starts[1:] - 1] -= 1  # the last token of a sequence is predicted, not read: any experts do
        cut = Sequences(
            token_ids=batch.token_ids[source],
            temperature=batch.temperature[source],
            starts=starts,
            routing=self.choices[entry],
            kin=batch.sequence[origins],
        )
        return cut, flat - begins + starts[row], flat

    def of_entries(self, token: int, begin: int, end: int) -> Choices:
        """Give the experts of the entries ``[begin, end)`` of the sequence of a loss token, as they were for that token."""
        start = int(self.starts[self.chain[token]])
        return self.choices[start + begin : start + end]


def routing_chains(trajectories: Sequence[Trajectory]) -> RoutingChains | None:
    """Gather the routing of trajectories, laid out side by side; None: there is none.

    Raises:
        TrajectoryError: Some tokens have routing, and others have not.
    """
    if all(segment.routing is None for trajectory in trajectories for segment in trajectory.sampled):
        return None
    chains: list[Choices] = []
    labels: list[Ints] = []
    for trajectory in trajectories:
        found, of_segment = chains_of(trajectory.segments, trajectory.id)
        lengths = [len(segment.token_ids) for segment in trajectory.segments]
        labels.append(np.repeat(np.where(of_segment < 0, -1, of_segment + len(chains)), lengths))
        chains += found
    _check_alike(chains)
    starts = np.cumsum([0, *map(len, chains)]).astype(np.int64)
    return RoutingChains(choices=np.concatenate(chains), starts=starts, chain=np.concatenate(labels))


def chains_of(segments: Sequence[Segment], trajectory_id: str) -> tuple[list[Choices], Ints]:
    """Gather the chains of one trajectory.

    Returns:
        The experts of each chain, and int64 [segment]: the chain of each sampled segment, -1 for context.

    Raises:
        TrajectoryError: Experts of a token are missing.
    """
    pieces: list[list[Routing]] = []
    chain = np.full(len(segments), -1, np.int64)
    before: Sampled | None = None
    position = known = 0
    for i, segment in enumerate(segments):
        position += len(segment.token_ids)
        if not isinstance(segment, Sampled):
            continue
        if not goes_on(segment, before) or before is None:
            pieces.append([])
            known = 0
        found = segment.routing.last(position - 1 - known) if segment.routing is not None else None
        if found is None or len(found) != position - 1 - known:
            raise TrajectoryError(
                "the routing of tokens is missing",
                got=f"the experts of {0 if found is None else len(found)} of the {position - 1 - known} tokens that trajectory "
                f"{trajectory_id} had read when version {segment.version} sampled its token {position - 1}",
                allowed="the experts of all of them",
                fix=MISSING,
            )
        pieces[-1].append(found)
        chain[i], known, before = len(pieces) - 1, position - 1, segment
    _check_alike([piece.choices for parts in pieces for piece in parts])
    return [np.concatenate([piece.choices for piece in parts]) for parts in pieces], chain


def _check_alike(found: Sequence[Choices]) -> None:
    shapes = sorted({(*choices.shape[1:], choices.itemsize) for choices in found})
    if len(shapes) > 1:
        raise TrajectoryError(
            "the routing of a batch is that of several models",
            got=", ".join(f"{layers} layers, {num} experts of {size} bytes a token" for layers, num, size in shapes),
            allowed="one number of layers, and of experts that serve a token",
            fix="use servers of one model",
        )


def span_routing(segments: Sequence[Segment], trajectory_id: str, version: int, num_tokens: int) -> Choices | None:
    """Give the experts of the first `num_tokens` tokens, as they were when the last token of a version was sampled.

    None: they were not recorded. The last one is predicted, not read: any experts do.
    """
    last = max(i for i, one in enumerate(segments) if isinstance(one, Sampled) and one.version == version)
    newest = segments[last]
    if isinstance(newest, Sampled) and newest.routing is None:
        return None
    chains, chain = chains_of(segments[: last + 1], trajectory_id)
    found = chains[chain[last]]
    return np.concatenate([found, found[-1:]])[:num_tokens]
