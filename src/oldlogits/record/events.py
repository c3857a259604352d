"""Events: what happens in a run, one frozen dataclass for each kind.

docs/run-folder.md says what each field means. A field that is not recorded (a table, trajectories) is for subscribers in this
process only. Wall-clock values stand only in keys that end in ``_s``, ``_share`` or ``_per_s``: without these, two equal
lockstep runs emit the same events.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from oldlogits.core.trajectory import Trajectory
from oldlogits.record.bus import Event

_UNRECORDED: Final = {"recorded": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStarted(Event):
    """The run begins, or goes on from a checkpoint: what it optimises, and how.

    `num_kept` is the number of earlier events that belong to the run that goes on; None for a run that begins.
    """

    kind = "run_started"
    variant: str
    r_d: str
    r_s: str
    corrects_mismatch: bool
    source: str
    runtime: str
    seed: int
    denominator: str
    band: float | None
    eps_low: float | None
    eps_high: float | None
    truncation: float | None
    max_staleness: int
    group_size: int
    prompts_per_update: int
    model: str
    num_parameters: int
    num_trained: int
    numerics: str
    num_kept: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmStarted(Event):
    """The model was trained on demonstrations, or taken from the cache."""

    kind = "warm_start"
    steps: int
    loss: float
    cached: bool
    seconds_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationProgressed(Event):
    """An evaluation goes on: so many of its episodes have ended, some of them failed."""

    num_ended: int
    num_failed: int
    num_episodes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated(Event):
    """Held-out episodes were played: success rate and mean reward with their 95% intervals, and the rewards by row.

    One that failed has the reward None, and is none of the `num_episodes`. A reward of at least `success_at` is a success.
    """

    kind = "evaluation"
    stage: str
    mode: str
    mean: float
    low: float
    high: float
    reward_mean: float
    reward_low: float
    reward_high: float
    success_at: float
    num_episodes: int
    rewards: Sequence[float | None]
    seconds_s: float
    environments: Sequence[str] = ()
    versions: Sequence[int] = ()
    trajectories: Sequence[Trajectory] = field(default=(), metadata=_UNRECORDED)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupAdmitted(Event):
    """A group of episodes was started."""

    kind = "group_admitted"
    group: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupClosed(Event):
    """All episodes of a group have ended."""

    kind = "group_closed"
    group: str
    rewards: Sequence[float]
    oldest_version: int
    num_failed: int
    filtered: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TrajectoryFailed(Event):
    """An exception or a time-out of its environment ended an episode, of training or of an evaluation (`stage`)."""

    kind = "trajectory_failed"
    trajectory: str
    stage: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TrajectoryRestarted(Event):
    """An episode begins again: what it had sampled cannot be gone on with, such as in an environment that answers otherwise."""

    kind = "trajectory_restarted"
    trajectory: str
    reason: str
    num_lost_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversationRewritten(Event):
    """An agent program went on with other messages than the model had read: a branch begins, encoded from its text.

    Args:
        message: The number of the first message that differs, counted from 0.
        role: Its role.
        num_tokens: Tokens of the branch's prompt.
    """

    kind = "conversation_rewritten"
    trajectory: str
    message: int
    role: str
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchTaken(Event):
    """A batch was formed, after the trainer waited for it."""

    kind = "batch"
    groups: Sequence[str]
    num_tokens: int
    staleness_max: int
    waited_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchScored(Event):
    """A source provided the proximal policy's log-probs of a batch."""

    kind = "scored"
    policy: str
    num_switches: int
    versions: Sequence[int]
    read_tokens: int
    num_checkouts: int
    switch_s: float
    check_s: float
    seconds_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Updated(Event):
    """All optimizer steps of one version were done: its metrics, its tokens and the trajectories that it trained."""

    kind = "update"
    metrics: Mapping[str, float]
    staleness_counts: Mapping[str, int]
    provenance: Mapping[str, int] = field(default_factory=dict)
    table: Mapping[str, NDArray[np.generic]] = field(default_factory=dict, metadata=_UNRECORDED)
    trajectories: Sequence[Trajectory] = field(default=(), metadata=_UNRECORDED)


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionPublished(Event):
    """A version was put into the version store, or only counted where the source needs no stored versions."""

    kind = "published"
    bytes: int
    version_bytes: int
    full_bytes: int
    changed: float | None
    store_s: float
    seconds_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsUpdated(Event):
    """The engine was paused, took the new weights, and went on."""

    kind = "weights_updated"
    sent: str
    bytes: int
    refused: str
    pause_s: float
    load_s: float
    stall_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerDown(Event):
    """A server that samples failed, or was asked to leave: what ran on it is sent again, with what it had sampled."""

    kind = "server_down"
    server: str
    reason: str
    num_requests: int
    num_kept_tokens: int
    num_lost_tokens: int | None
    is_failure: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerUp(Event):
    """A server that had failed samples again, with the current weights."""

    kind = "server_up"
    server: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Probed(Event):
    """Engine and trainer were compared on a fixed prompt; beside it the largest errors of the consistency checks so far."""

    kind = "probe"
    max_abs_error: float
    mean_abs_error: float
    num_tokens: int
    num_above: int
    consistency_publish_max_abs_error: float
    consistency_lag0_max_abs_error: float
    consistency_rescored_max_abs_error: float = math.nan
    packing_mean_abs_error: float = math.nan
    packing_max_abs_error: float = math.nan
    rounding_mean_abs_error: float = math.nan
    rounding_max_abs_error: float = math.nan
    num_digests: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibrated(Event):
    """The engine's own noise was measured at lag 0: the share of tokens that each band would mask."""

    kind = "calibration"
    num_trajectories: int
    num_tokens: int
    log_r_d_abs_mean: float
    log_r_d_abs_max: float
    r_d_mean: float
    r_d_mean_error: float
    bands: Sequence[float]
    masked: Sequence[float]
    kept: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Audited(Event):
    """A proximal policy's decisions were compared with those of OLD: sums over the tokens of staleness 0, 1, ..."""

    kind = "audit"
    policy: str
    num_tokens: Sequence[float]
    num_nonzero: Sequence[float]
    num_compared: Sequence[float]
    logp_error: Sequence[float]
    wrongly_kept: Sequence[float]
    wrongly_masked: Sequence[float]
    wrongly_kept_nonzero: Sequence[float]
    wrongly_masked_nonzero: Sequence[float]
    weight: Sequence[float]
    weight_wrongly_kept: Sequence[float]
    weight_wrongly_masked: Sequence[float]
    seconds_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AverageWasReset(Event):
    """The weight average was reset to the live weights; the errors are None where no audit tells them."""

    kind = "average_reset"
    rule: str
    rho: float
    tau: float
    kept_average: float
    kept_live: float
    age: float
    error_before: float | None = None
    error_after: float | None = None
    weight_error_before: float | None = None
    weight_error_after: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointWritten(Event):
    """A checkpoint was completed; `path` is relative to the run folder. Training waited for `stall_s` of the `seconds_s`."""

    kind = "checkpoint"
    path: str
    bytes: int
    stall_s: float
    seconds_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointFailed(Event):
    """A checkpoint could not be written; the run ends."""

    kind = "checkpoint_failed"
    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Warned(Event):
    """Something that a reader of the results should know."""

    kind = "warning"
    name: str
    message: str
    figures: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEnded(Event):
    """The run ended, and why; `accounting` is None where it was cut off and nobody could count any more."""

    kind = "run_ended"
    reason: str
    error: str
    accounting: Mapping[str, int] | None
