"""``events.jsonl``: events as lines, written as they happen and read back; and which of them count after a resume."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar, cast

from oldlogits.record.bus import Event, EventKind
from oldlogits.record.jsonl import Json, LineFile, RecordError, number, read_lines, revived

_HEAD: Final = frozenset({"seq", "kind", "version"})
_RATIO_NAME: Final = re.compile(r"(^|[/_])r_s$")

E = TypeVar("E", bound=Event)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedEvent:
    """An event as it was read back, its fields by their names; `typed` makes it what was emitted."""

    seq: int
    kind: EventKind
    version: int
    fields: Mapping[str, Json]


class EventLog(LineFile):
    """Writes events to a file, each on disk when `emit` returns; `seq` goes on where the file ends."""

    def emit(self, event: Event) -> None:
        """Append one event; those that have no kind are not recorded.

        Raises:
            RecordError: A key that is named like a wall-clock value holds no number.
        """
        if event.kind is not None:
            self.append(_line(self.num_lines, event.kind, event))


def read_events(path: Path) -> Iterator[RecordedEvent]:
    """Read the events of a file in order; an incomplete last line is left out.

    Raises:
        RecordError: A line is no event.
    """
    return (_event(line) for line in read_lines(path))


def typed(events: Iterable[RecordedEvent], kind: type[E]) -> list[E]:
    """The events of one kind as they were emitted, without what is not recorded.

    Raises:
        RecordError: One has other fields than its kind.
    """
    try:
        return [kind(version=e.version, **cast("dict[str, Any]", e.fields)) for e in events if e.kind is kind.kind]
    except TypeError as error:
        raise RecordError(
            f"an event '{kind.kind}' has other fields than its kind",
            got=str(error),
            allowed=f"the fields of {kind.__name__}",
            fix="read the folder with the version of oldlogits that wrote it",
        ) from error


def history(events: Iterable[RecordedEvent]) -> list[RecordedEvent]:
    """The events that count: those after the checkpoint from which a run went on are of an abandoned line of history.

    A `run_started` event says how many of the events before it are kept: those up to its checkpoint. Everything after them was
    done anew, so that no token is counted twice.
    """
    kept: list[RecordedEvent] = []
    for event in events:
        num_kept = event.fields.get("num_kept") if event.kind is EventKind.RUN_STARTED else None
        if isinstance(num_kept, int):
            kept = [earlier for earlier in kept if earlier.seq < num_kept]
        kept.append(event)
    return kept


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


def _line(seq: int, kind: EventKind, event: Event) -> Mapping[str, Json]:
    found = dict(event.recorded())
    _check_wall_clock(kind, found)
    return {"seq": seq, "kind": kind.value, "version": event.version, **found}


def _check_wall_clock(kind: EventKind, found: Mapping[str, Json]) -> None:
    for key, value in found.items():
        if isinstance(value, Mapping):
            _check_wall_clock(kind, value)
        elif is_wall_clock(key) and value is not None and number(value) is None:
            raise RecordError(
                f"key '{key}' of event '{kind}' has the name of a wall-clock value",
                got=repr(value),
                allowed="a number, or None",
                fix="end other keys differently: equal runs are compared without keys in _s, _share and _per_s",
            )


def _event(line: Mapping[str, Json]) -> RecordedEvent:
    seq, kind, version = line.get("seq"), line.get("kind"), line.get("version")
    if not isinstance(seq, int) or not isinstance(version, int) or kind not in list(EventKind):
        raise RecordError(
            "a line of the event log is no event",
            got=repr(dict(line))[:200],
            allowed="seq and version as integers, kind one of " + ", ".join(EventKind),
            fix="read the folder with the version of oldlogits that wrote it",
        )
    fields = {key: revived(value) for key, value in line.items() if key not in _HEAD}
    return RecordedEvent(seq=seq, kind=EventKind(str(kind)), version=version, fields=fields)
