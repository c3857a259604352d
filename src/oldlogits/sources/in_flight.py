"""The trajectories in flight, for routes that score before a batch enters training.

A *piece* is the tokens of one trajectory that one version sampled. It is complete when no more of them can come: its
trajectory has ended, or the engine was paused to take a newer version. A complete piece is scored once, in one forward
pass over the trajectory up to the piece's end, and its values are kept until the trajectory is dropped.

    grew, paused, ended -> next_pieces -> put -> values_of -> drop
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from oldlogits.core.scoring import ScoringSpan
from oldlogits.core.trajectory import Sampled, Segment, Trajectory
from oldlogits.core.weights import PolicyVersion


@dataclass(slots=True, kw_only=True)
class _InFlight:
    """One trajectory: its closed segments, what its running turn had sampled when the engine was last paused, its values."""

    segments: Sequence[Segment]
    sampled_from: PolicyVersion  # tokens that it will still sample are of this version or a newer one
    running: Sequence[Sampled] = ()
    ended: bool = False
    values: dict[PolicyVersion, NDArray[np.float32]] = field(default_factory=dict)
    num_read: int = 0  # tokens, from its beginning, that a forward pass has read

    @property
    def known(self) -> Iterator[Segment]:
        """Its segments, those of the running turn included."""
        yield from self.segments
        yield from self.running

    @property
    def unscored(self) -> set[PolicyVersion]:
        """The versions of its known tokens that have no values yet."""
        return {s.version for s in self.known if isinstance(s, Sampled)} - self.values.keys()

    @property
    def complete(self) -> set[PolicyVersion]:
        """The versions whose pieces are complete and not scored yet."""
        return {version for version in self.unscored if self.ended or version < self.sampled_from}


class InFlightTokens:
    """Which tokens of which trajectories are known and scored; holds no trajectory longer than from growth to `drop`."""

    def __init__(self) -> None:
        self._trajectories: dict[str, _InFlight] = {}
        self.version: PolicyVersion = 0  # that the engine samples with, or will after the pause
        self.num_repeated_tokens = 0  # read by a forward pass that an earlier one of the same trajectory had read

    def __len__(self) -> int:
        """Trajectories in flight."""
        return len(self._trajectories)

    def grew(self, trajectory_id: str, segments: Sequence[Segment]) -> None:
        """A running trajectory has these segments now."""
        one = self._trajectories.setdefault(trajectory_id, _InFlight(segments=segments, sampled_from=self.version))
        one.segments, one.running = segments, ()
        newest = next((s.version for s in reversed(segments) if isinstance(s, Sampled)), 0)
        one.sampled_from = max(one.sampled_from, newest)

    def ended(self, trajectories: Sequence[Trajectory]) -> None:
        """These are whole."""
        for trajectory in trajectories:
            self.grew(trajectory.id, trajectory.segments)
            self._trajectories[trajectory.id].ended = True

    def paused(self, running: Mapping[str, Sequence[Sampled]]) -> None:
        """The engine has sampled the last token of its version; `running` is what unfinished turns hold."""
        self.version += 1
        for trajectory_id, one in self._trajectories.items():
            one.running = running.get(trajectory_id, ())
            one.sampled_from = self.version

    def drop(self, trajectory_ids: Iterable[str]) -> None:
        """Forget these, known or not."""
        for trajectory_id in trajectory_ids:
            self._trajectories.pop(trajectory_id, None)

    def oldest_needed(self) -> PolicyVersion:
        """The oldest version of a token that is not scored yet, or that may still become known."""
        flying = self._trajectories.values()
        unscored = [version for one in flying for version in one.unscored]
        to_come = [one.sampled_from for one in flying if not one.ended]
        return min([self.version, *unscored, *to_come])

    def next_pieces(
        self, at_most: int, *, of: Iterable[str] | None = None, versions: Collection[PolicyVersion] | None = None
    ) -> tuple[PolicyVersion, list[ScoringSpan]] | None:
        """Complete pieces that are not scored yet: all of one version, the oldest there is, in the order of admission.

        Args:
            at_most: How many.
            of: Only these trajectories; None: all.
            versions: Only these versions; None: all.

        Returns:
            The version and its pieces, or None when there is no such piece.
        """
        found: dict[PolicyVersion, list[str]] = {}
        for trajectory_id in self._trajectories if of is None else of:
            one = self._trajectories.get(trajectory_id)
            for version in one.complete if one else ():
                if versions is None or version in versions:
                    found.setdefault(version, []).append(trajectory_id)
        if not found:
            return None
        version = min(found)
        return version, [self._piece(trajectory_id, version) for trajectory_id in found[version][:at_most]]

    def put(self, pieces: Sequence[ScoringSpan], version: PolicyVersion, values: NDArray[np.float32]) -> None:
        """Keep the values of pieces; those of trajectories that were dropped meanwhile are let go.

        Args:
            pieces: All of `version`.
            version: Their version, and that of the weights that scored them.
            values: float32 [scored token], piece after piece.
        """
        ends = np.cumsum([len(piece.positions) for piece in pieces])
        for piece, part in zip(pieces, np.split(values, ends[:-1]), strict=True):
            one = self._trajectories.get(piece.trajectory_id)
            if one is not None:
                one.values[version] = part
                self.num_repeated_tokens += min(one.num_read, piece.num_read)
                one.num_read = max(one.num_read, piece.num_read)

    def values_of(self, trajectory_ids: Iterable[str]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The values of trajectories that have ended, and the version that each was computed at, in token order."""
        scored = [piece for i in trajectory_ids for piece in sorted(self._trajectories[i].values.items())]  # versions ascend
        values = np.concatenate([values for _, values in scored], dtype=np.float32)
        return values, np.repeat([version for version, _ in scored], [len(values) for _, values in scored]).astype(np.int64)

    def _piece(self, trajectory_id: str, version: PolicyVersion) -> ScoringSpan:
        token_ids: list[int] = []
        positions: list[int] = []
        temperature: list[float] = []
        for segment in self._trajectories[trajectory_id].known:
            if isinstance(segment, Sampled) and segment.version == version:
                positions += range(len(token_ids), len(token_ids) + len(segment.token_ids))
                temperature += [segment.temperature] * len(segment.token_ids)
            token_ids += segment.token_ids
        return ScoringSpan(
            trajectory_id=trajectory_id,
            token_ids=np.array(token_ids[: positions[-1] + 1], np.int64),
            positions=np.array(positions, np.int64),
            temperature=np.array(temperature, np.float32),
        )
