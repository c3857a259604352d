"""The source of the proximal policy's log-probs: one seam for every route to them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from oldlogits.core.policies import Policy
from oldlogits.core.scoring import BatchTokens, Scored
from oldlogits.core.trajectory import Sampled, Segment, Trajectory
from oldlogits.core.weights import PolicyVersion, WeightUpdate


class LogprobSource(Protocol):
    """A route to the log-probs of a proximal policy: one seam for every route. The runtime pauses, a source only scores.

    A route inherits from this class; hooks that it does not need do nothing. In the order of a run::

        on_segment_closed ... on_arrival -> acquire -> (steps) -> on_paused -> on_published -> ... -> drop
        on_segment_closed ... on_arrival -> on_paused -> acquire -> (steps) -> on_published -> ... -> drop    needs_pause
    """

    needs_pause: bool = False
    """Whether the engine is paused from before the first optimizer step until it holds the next version."""
    needs_partials: bool = False
    """Whether `on_paused` is to be called."""
    witness_max_abs_error: float = math.nan
    """Largest error in nats of witnesses of exactness that the trainer does not have; NaN: there is none."""

    @property
    def provides(self) -> Policy:
        """The policy whose log-probs `acquire` returns."""
        ...

    def on_segment_closed(self, trajectory_id: str, segments: Sequence[Segment]) -> None:
        """A running trajectory grew.

        Args:
            trajectory_id: Which.
            segments: All of it so far; goes on growing.
        """
        return

    async def on_arrival(self, trajectories: Sequence[Trajectory]) -> None:
        """The trajectories of a group have ended and wait for training."""
        return

    async def on_paused(self, running: Mapping[str, Sequence[Sampled]]) -> None:
        """The engine is paused and has sampled the last token of its version.

        Args:
            running: By trajectory, what unfinished turns have sampled so far.
        """
        return

    async def on_published(self, version: PolicyVersion, update: WeightUpdate, probe_logps: NDArray[np.float32]) -> None:
        """The engine holds `version` and samples again.

        Args:
            version: Its number.
            update: The trainer's weights, valid until its next optimizer step, or what leads to them.
            probe_logps: float32 [probe token]; what they give the fixed probe tokens.
        """
        return

    async def acquire(self, batch: BatchTokens) -> Scored | None:
        """The log-probs of the batch that enters training; None from a route for variants that need none."""
        ...

    def drop(self, trajectory_ids: Iterable[str]) -> None:
        """These were trained, filtered, failed or cancelled: forget them."""
        return

    def oldest_needed(self, in_flight: PolicyVersion) -> PolicyVersion:
        """The oldest version that this route may still ask the trainer's store for.

        Args:
            in_flight: The oldest version that a trajectory in flight may have tokens of.
        """
        return in_flight

    def metrics(self) -> Mapping[str, float]:
        """What this route has done since the last call; docs/metrics.md."""
        return {}

    async def close(self) -> None:
        """The run ends: leave nothing running."""
        return
