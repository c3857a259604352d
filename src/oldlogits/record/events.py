"""Events: what happened in a run, one JSON line each, in one order.

Every event has `seq` (0, 1, 2, ... without gaps), `kind`, `version` (the trainer's version, after the step for
`update`) and the fields of its kind. Wall-clock values stand only in keys that end in ``_s``, ``_share`` or
``_per_s``; without these, two equal lockstep runs write the same events.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Final, Protocol, Self

from oldlogits.record.jsonl import Json, LineFile, RecordError, encode, number, read_lines


class EventKind(StrEnum):
    """What can happen."""

    RUN_STARTED = "run_started"
    """The run begins, or goes on from a checkpoint: what it optimises, and how."""
    WARM_START = "warm_start"
    """The model was trained on demonstrations, or taken from the cache."""
    EVALUATION = "evaluation"
    """Held-out episodes were played: mean reward with its 95% interval."""
    GROUP_ADMITTED = "group_admitted"
    """A group of episodes was started."""
    GROUP_CLOSED = "group_closed"
    """All episodes of a group have ended."""
    TRAJECTORY_FAILED = "trajectory_failed"
    """An episode ended by an exception or a time-out of its environment."""
    TRAJECTORY_RESTARTED = "trajectory_restarted"
    """An episode begins again: its environment was lost with its worker and did not answer as before."""
    BATCH = "batch"
    """A batch was formed, after the trainer waited for it."""
    SCORED = "scored"
    """A source provided the stand-in's log-probs of a batch."""
    UPDATE = "update"
    """All optimizer steps of one version were done: its metrics."""
    PUBLISHED = "published"
    """A version was put into the version store."""
    WEIGHTS_UPDATED = "weights_updated"
    """The engine was paused, took the new weights, and went on."""
    SERVER_DOWN = "server_down"
    """A server that samples failed: what ran on it is sent again, with what it had sampled."""
    SERVER_UP = "server_up"
    """A server that had failed samples again, with the current weights."""
    PROBE = "probe"
    """Engine and trainer were compared on a fixed prompt."""
    CALIBRATION = "calibration"
    """The engine's own noise was measured at lag 0: the share of tokens that each band would mask."""
    REFEREE = "referee"
    """A stand-in's decisions were compared with those of OLD: sums over the tokens of each staleness."""
    AVERAGE_RESET = "average_reset"
    """The weight average was reset to the live weights."""
    CHECKPOINT = "checkpoint"
    """A checkpoint was completed."""
    WARNING = "warning"
    """Something that a reader of the results should know."""
    RUN_ENDED = "run_ended"
    """The run ended, and why."""


FIELDS: Final[Mapping[EventKind, frozenset[str]]] = MappingProxyType(
    {
        EventKind.RUN_STARTED: frozenset(
            {"variant", "r_d", "r_s", "corrects_mismatch", "source", "runtime", "seed", "denominator"}
            | {"band", "eps_low", "eps_high", "truncation", "max_staleness", "group_size", "prompts_per_update"}
            | {"model", "num_parameters", "numerics"}
        ),
        EventKind.WARM_START: frozenset({"steps", "loss", "cached", "seconds_s"}),
        EventKind.EVALUATION: frozenset({"stage", "mode", "mean", "low", "high", "num_episodes", "seconds_s"}),
        EventKind.GROUP_ADMITTED: frozenset({"group"}),
        EventKind.GROUP_CLOSED: frozenset({"group", "rewards", "oldest_version", "num_failed"}),
        EventKind.TRAJECTORY_FAILED: frozenset({"trajectory", "reason"}),
        EventKind.TRAJECTORY_RESTARTED: frozenset({"trajectory", "reason", "num_lost_tokens"}),
        EventKind.BATCH: frozenset({"groups", "num_tokens", "staleness_max", "waited_s"}),
        EventKind.SCORED: frozenset(
            {"policy", "num_switches", "versions", "read_tokens", "num_checkouts", "switch_s", "witness_s", "seconds_s"}
        ),
        EventKind.UPDATE: frozenset({"metrics", "staleness_counts"}),
        EventKind.PUBLISHED: frozenset({"bytes", "version_bytes", "changed", "store_s", "seconds_s"}),
        EventKind.WEIGHTS_UPDATED: frozenset({"sent", "bytes", "refused", "pause_s", "load_s", "stall_s"}),
        EventKind.SERVER_DOWN: frozenset({"server", "reason", "num_requests", "num_kept_tokens", "num_lost_tokens"}),
        EventKind.SERVER_UP: frozenset({"server", "reason"}),
        EventKind.PROBE: frozenset({"max_abs_error", "mean_abs_error", "num_tokens", "num_above"}),
        EventKind.CALIBRATION: frozenset(
            {"num_trajectories", "num_tokens", "log_r_d_abs_mean", "log_r_d_abs_max", "r_d_mean", "r_d_mean_error"}
            | {"bands", "masked", "kept"}
        ),
        EventKind.REFEREE: frozenset(
            {"policy", "num_tokens", "num_nonzero", "num_compared", "logp_error"}
            | {"wrongly_kept", "wrongly_masked", "wrongly_kept_nonzero", "wrongly_masked_nonzero"}
            | {"weight", "weight_wrongly_kept", "weight_wrongly_masked", "seconds_s"}
        ),
        EventKind.AVERAGE_RESET: frozenset(
            {"rule", "rho", "tau", "kept_average", "kept_live", "age"}
            | {"error_before", "error_after", "weight_error_before", "weight_error_after"}
        ),
        EventKind.CHECKPOINT: frozenset({"path"}),
        EventKind.WARNING: frozenset({"name", "message", "figures"}),
        EventKind.RUN_ENDED: frozenset({"reason", "error"}),
    }
)
"""The fields that each kind must have; an event may have more."""

_HEAD: Final = frozenset({"seq", "kind", "version"})
_RATIO_NAME: Final = re.compile(r"(^|[/_])r_s$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One recorded event.

    Args:
        seq: Its number in the log, from 0.
        kind: What happened.
        version: The trainer's version; -1 before there is one.
        fields: The values of this kind.
    """

    seq: int
    kind: EventKind
    version: int
    fields: Mapping[str, Json]


class EventSink(Protocol):
    """Takes events. What the layers below the runtime ask for."""

    def emit(self, kind: EventKind, *, version: int, **fields: Json) -> None:
        """Record one event."""
        ...


class EventLog:
    """Events as lines of a file, each on disk when `emit` returns; `seq` goes on where the file ends.

    Args:
        path: ``events.jsonl`` of a run folder.
    """

    def __init__(self, path: Path) -> None:
        self._file = LineFile(path)

    def emit(self, kind: EventKind, *, version: int, **fields: Json) -> None:
        """Append one event.

        Raises:
            RecordError: A field of this kind is missing, or a wall-clock key holds no number.
        """
        self._file.append(_line(self._file.num_lines, kind, version, fields))

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._file.close()

    def __enter__(self) -> Self:
        """The log itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Close the file."""
        self.close()


class MemoryLog:
    """Events in a list, as they would be read back from a file: for tests."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def emit(self, kind: EventKind, *, version: int, **fields: Json) -> None:
        """Append one event; raises what `EventLog.emit` raises."""
        self.events.append(_event(json.loads(encode(_line(len(self.events), kind, version, fields)))))


def read_events(path: Path) -> Iterator[Event]:
    """The events of a file in order; an incomplete last line is left out.

    Raises:
        RecordError: A line is no event.
    """
    return (_event(line) for line in read_lines(path))


def is_wall_clock(key: str) -> bool:
    """Whether the values of a key may differ between two equal runs. The ratio's name ``r_s`` is not a duration.

    Example:
        >>> [key for key in ("time/step_s", "idle/engine_share", "ratio/log_r_s", "reward/mean") if is_wall_clock(key)]
        ['time/step_s', 'idle/engine_share']
    """
    return key.endswith(("_s", "_share", "_per_s")) and not _RATIO_NAME.search(key)


def without_wall_clock(value: Json) -> Json:
    """A copy without wall-clock keys, at any depth: what equal lockstep runs agree on."""
    if isinstance(value, Mapping):
        return {key: without_wall_clock(item) for key, item in value.items() if not is_wall_clock(key)}
    if isinstance(value, list | tuple):
        return [without_wall_clock(item) for item in value]
    return value


def _line(seq: int, kind: EventKind, version: int, fields: Mapping[str, Json]) -> Mapping[str, Json]:
    missing = FIELDS[kind] - fields.keys()
    if missing or _HEAD & fields.keys():
        raise RecordError(
            f"event '{kind}' does not have its fields",
            got=", ".join(sorted(fields)) or "no fields",
            allowed=", ".join(sorted(FIELDS[kind])) + f", and others except {', '.join(sorted(_HEAD))}",
            fix=f"pass {', '.join(sorted(missing))}" if missing else "rename the field",
        )
    _check_wall_clock(kind, fields)
    return {"seq": seq, "kind": kind.value, "version": version, **fields}


def _check_wall_clock(kind: EventKind, fields: Mapping[str, Json]) -> None:
    for key, value in fields.items():
        if isinstance(value, Mapping):
            _check_wall_clock(kind, value)
        elif is_wall_clock(key) and value is not None and number(value) is None:
            raise RecordError(
                f"key '{key}' of event '{kind}' has the name of a wall-clock value",
                got=repr(value),
                allowed="a number, or None",
                fix="end other keys differently: equal runs are compared without keys in _s, _share and _per_s",
            )


def _event(line: Mapping[str, Json]) -> Event:
    seq, kind, version = line.get("seq"), line.get("kind"), line.get("version")
    if not isinstance(seq, int) or not isinstance(version, int) or kind not in list(EventKind):
        raise RecordError(
            "a line of the event log is no event",
            got=repr(dict(line))[:200],
            allowed="seq and version as integers, kind one of " + ", ".join(EventKind),
            fix="read the folder with the version of oldlogits that wrote it",
        )
    return Event(seq=seq, kind=EventKind(str(kind)), version=version, fields={k: v for k, v in line.items() if k not in _HEAD})
