"""The trajectories in flight, for sources that score before a batch enters training.

A *scoring span* is the tokens of one trajectory that one version sampled. It is complete when no more of them can come: its
trajectory has ended, or the engine was paused to take a newer version. A complete span is scored once, in one forward
pass over the trajectory up to the span's end, and its values are kept until the trajectory is dropped.

    extend, pause, end -> next_spans -> put -> values -> drop
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from oldlogits.batch.routing import span_routing
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

    def num_of(self, version: PolicyVersion) -> int:
        """Count its known tokens of a version."""
        return sum(len(s.token_ids) for s in self.known if isinstance(s, Sampled) and s.version == version)

    @property
    def unscored(self) -> set[PolicyVersion]:
        """The versions of its known tokens that have no values yet."""
        return {s.version for s in self.known if isinstance(s, Sampled)} - self.values.keys()

    @property
    def complete(self) -> set[PolicyVersion]:
        """The versions whose spans are complete and not scored yet."""
        return {version for version in self.unscored if self.ended or version < self.sampled_from}


class InFlightTokens:
    """Which tokens of which trajectories are known and scored. It forgets a trajectory at `drop`."""

    def __init__(self) -> None:
        self._trajectories: dict[str, _InFlight] = {}
        self.version: PolicyVersion = 0  # that the engine samples with, or will after the pause
        self.num_repeated_tokens = 0  # read by a forward pass that an earlier one of the same trajectory had read

    def __len__(self) -> int:
        """Count the trajectories in flight."""
        return len(self._trajectories)

    def extend(self, trajectory_id: str, segments: Sequence[Segment]) -> None:
        """Take note of all segments that a running trajectory has now."""
        one = self._trajectories.setdefault(trajectory_id, _InFlight(segments=segments, sampled_from=self.version))
        one.segments, one.running = segments, ()
        newest = next((s.version for s in reversed(segments) if isinstance(s, Sampled)), 0)
        one.sampled_from = max(one.sampled_from, newest)

    def withdraw(self, trajectory_id: str, segments: Sequence[Segment]) -> None:
        """Take note of all segments of a trajectory whose running turn was given up: its tokens and their values are gone."""
        self.extend(trajectory_id, segments)
        one = self._trajectories[trajectory_id]
        one.values = {version: values[:num] for version, values in one.values.items() if (num := one.num_of(version))}

    def restore(
        self, trajectory_id: str, segments: Sequence[Segment], values: Mapping[PolicyVersion, Sequence[float]]
    ) -> set[PolicyVersion]:
        """Take note of a trajectory and of its values; returns the versions of its tokens that have none.

        The number of values is that of the version's tokens, or they say nothing; nor do those of the version that the engine
        samples with, since more tokens of it may come.
        """
        self.extend(trajectory_id, segments)
        one, counts = self._trajectories[trajectory_id], Counter[PolicyVersion]()
        for segment in segments:
            if isinstance(segment, Sampled):
                counts[segment.version] += len(segment.token_ids)
        old = [v for v in counts if v < self.version and len(values.get(v, ())) == counts[v]]
        one.values = {version: np.array(values[version], np.float32) for version in old}
        return one.unscored

    def end(self, trajectories: Sequence[Trajectory]) -> None:
        """Take note that trajectories are whole."""
        for trajectory in trajectories:
            self.extend(trajectory.id, trajectory.segments)
            self._trajectories[trajectory.id].ended = True

    def pause(self, running: Mapping[str, Sequence[Sampled]]) -> None:
        """Take note that the engine has sampled the last token of its version; `running` is what unfinished turns hold."""
        self.version += 1
        for trajectory_id, one in self._trajectories.items():
            one.running = running.get(trajectory_id, ())
            one.sampled_from = self.version

    def drop(self, trajectory_ids: Iterable[str]) -> None:
        """Forget trajectories, known or not."""
        for trajectory_id in trajectory_ids:
            self._trajectories.pop(trajectory_id, None)

    def oldest_needed(self) -> PolicyVersion:
        """Give the oldest version of a token that is not scored yet, or that may still become known."""
        flying = self._trajectories.values()
        unscored = [version for one in flying for version in one.unscored]
        to_come = [one.sampled_from for one in flying if not one.ended]
        return min([self.version, *unscored, *to_come])

    def next_spans(
        self,
        at_most: int,
        *,
        trajectory_ids: Iterable[str] | None = None,
        versions: Collection[PolicyVersion] | None = None,
    ) -> tuple[PolicyVersion, list[ScoringSpan]] | None:
        """Give the next complete spans that are not scored yet, in the order of admission: all of one version, the oldest.

        Args:
            at_most: The largest number of spans.
            trajectory_ids: The trajectories whose spans count; None: all.
            versions: The versions whose spans count; None: all.
        """
        found: dict[PolicyVersion, list[str]] = {}
        for trajectory_id in self._trajectories if trajectory_ids is None else trajectory_ids:
            one = self._trajectories.get(trajectory_id)
            for version in one.complete if one else ():
                if versions is None or version in versions:
                    found.setdefault(version, []).append(trajectory_id)
        if not found:
            return None
        version = min(found)
        return version, [self._span(trajectory_id, version) for trajectory_id in found[version][:at_most]]

    def put(
        self, spans: Sequence[ScoringSpan], version: PolicyVersion, values: NDArray[np.float32]
    ) -> list[tuple[str, NDArray[np.float32]]]:
        """Keep the values of spans, span after span, but for those of trajectories that were dropped meanwhile.

        Returns:
            The trajectories whose values are kept, with these.
        """
        kept: list[tuple[str, NDArray[np.float32]]] = []
        ends = np.cumsum([len(span.positions) for span in spans])
        for span, part in zip(spans, np.split(values, ends[:-1]), strict=True):
            one = self._trajectories.get(span.trajectory_id)
            if one is not None and (num := one.num_of(version)):
                part = part[:num]  # of a turn that was given up meanwhile
                one.values[version] = part
                self.num_repeated_tokens += min(one.num_read, span.num_read)
                one.num_read = max(one.num_read, span.num_read)
                kept.append((span.trajectory_id, part))
        return kept

    def values(self, trajectory_ids: Iterable[str]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Give the values of trajectories that have ended, and the version that each was computed at, in token order."""
        scored = [span for i in trajectory_ids for span in sorted(self._trajectories[i].values.items())]  # versions ascend
        values = np.concatenate([values for _, values in scored], dtype=np.float32)
        return values, np.repeat([version for version, _ in scored], [len(values) for _, values in scored]).astype(np.int64)

    def _span(self, trajectory_id: str, version: PolicyVersion) -> ScoringSpan:
        segments = list(self._trajectories[trajectory_id].known)
        ids = [np.asarray(segment.token_ids, np.int64) for segment in segments]
        starts = np.cumsum([0, *map(len, ids)])
        scored = [
            (np.arange(start, start + len(segment.token_ids)), np.full(len(segment.token_ids), segment.temperature, np.float32))
            for start, segment in zip(starts, segments, strict=False)
            if isinstance(segment, Sampled) and segment.version == version
        ]
        positions, temperature = (np.concatenate(parts) for parts in zip(*scored, strict=True))
        num_read = int(positions[-1]) + 1
        return ScoringSpan(
            trajectory_id=trajectory_id,
            token_ids=np.concatenate(ids)[:num_read],
            positions=positions,
            temperature=temperature,
            routing=span_routing(segments, trajectory_id, version, num_read),
        )
