"""``events.jsonl``: events as lines, written as they happen and read back; and which of them count after a resume."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar, get_args, get_type_hints

from oldlogits.record.bus import Event
from oldlogits.record.events import RunStarted
from oldlogits.record.jsonl import Json, LineFile, RecordError, read_lines, revived

_RATIO_NAME: Final = re.compile(r"(^|[/_])r_s$")

E = TypeVar("E", bound=Event)


class EventLog(LineFile):
    """Writes events to a file, each on disk when `emit` returns; `seq` goes on where the file ends."""

    def emit(self, event: Event) -> None:
        """Append one event; those that have no kind are not recorded.

        Raises:
            RecordError: A key that is named like a wall-clock value holds no number.
        """
        if event.kind:
            fields = dict(event.recorded())
            _check_wall_clock(event.kind, fields)
            self.append({"seq": self.num_lines, "kind": event.kind, "version": event.version, **fields})


def read_events(path: Path) -> Iterator[Event]:
    """Read the events of a file in order, as they were emitted, without what is not recorded.

    An incomplete last line is left out.

    Raises:
        RecordError: A line is no event, or has other fields than its kind.
    """
    kinds = {kind.kind: kind for kind in Event.__subclasses__() if kind.kind}
    floats_of = {name: _float_fields(kind) for name, kind in kinds.items()}
    for number, line in enumerate(read_lines(path, _without_event), start=1):
        try:
            kind, floats = kinds[str(line["kind"])], floats_of[str(line["kind"])]
            fields: dict[str, Any] = {
                key: revived(value) if key in floats else value for key, value in line.items() if key not in ("seq", "kind")
            }
            if not isinstance(fields.get("version"), int):
                raise TypeError("no version")
            event = kind(**fields)
        except (KeyError, TypeError) as error:
            raise RecordError(
                f"line {number} of {path.name} is no event",
                got=f"{error} in {dict(line)!r}"[:200],
                allowed="one of " + ", ".join(kinds) + ", with the fields of its class in record/events.py",
                fix=f"read the folder with the version of oldlogits that wrote it, or {_without_event(path, number)}",
            ) from error
        yield event


def _without_event(path: Path, number: int) -> str:
    """Advise how to give up the event of a line: another one takes its place, because checkpoints count the lines."""
    warning = f'"version": -1, "name": "damaged_line", "message": "line {number} was damaged", "figures": {{}}'
    return f"""give the event up: sed -i '{number}c\\{{"seq": {number - 1}, "kind": "warning", {warning}}}' {path}"""


def _float_fields(kind: type[Event]) -> frozenset[str]:
    """The fields that hold floats: what is written as "nan" there is a number, and text anywhere else."""
    return frozenset(name for name, hint in get_type_hints(kind).items() if _has_float(hint))


def _has_float(hint: object) -> bool:
    return hint is float or any(map(_has_float, get_args(hint)))


def typed(events: Iterable[Event], kind: type[E]) -> list[E]:
    """The events of one kind."""
    return [event for event in events if isinstance(event, kind)]


def history(events: Iterable[Event]) -> list[Event]:
    """The events of a file that count: those after the checkpoint from which a run went on are of an abandoned line of history.

    A `RunStarted` says how many of the events before it are kept: those up to its checkpoint. Everything after them was done
    anew, so that no token is counted twice.
    """
    kept: list[tuple[int, Event]] = []
    for seq, event in enumerate(events):
        if isinstance(event, RunStarted) and event.num_kept is not None:
            kept = [earlier for earlier in kept if earlier[0] < event.num_kept]
        kept.append((seq, event))
    return [event for _, event in kept]


def is_wall_clock(key: str) -> bool:
    """Whether the values of a key may differ between two equal runs. The ratio's name ``r_s`` is not a duration.

    Example:
        >>> [key for key in ("time/step_s", "idle/engine_share", "ratio/log_r_s", "reward/mean") if is_wall_clock(key)]
        ['time/step_s', 'idle/engine_share']
    """
    return key.endswith(("_s", "_share", "_per_s")) and not _RATIO_NAME.search(key)


def _check_wall_clock(kind: str, fields: Mapping[str, Json]) -> None:
    for key, value in fields.items():
        if isinstance(value, Mapping):
            _check_wall_clock(kind, value)
        elif is_wall_clock(key) and type(value) not in (int, float, type(None)):
            raise RecordError(
                f"key '{key}' of event '{kind}' has the name of a wall-clock value",
                got=repr(value),
                allowed="a number, or None",
                fix="end other keys differently: equal runs are compared without keys in _s, _share and _per_s",
            )
