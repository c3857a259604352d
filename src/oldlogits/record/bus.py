"""The bus: whoever measures something emits an event, and knows nothing of files, screens and trackers.

loop, rollouts -> EventBus.emit -> EventLog (events.jsonl), LiveView, TokenTables, EpisodeRecorder, TrackerFeed
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import ClassVar, Protocol

from oldlogits.record.jsonl import Json


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something happened while the trainer was at `version`; -1: before there was a version."""

    kind: ClassVar[str] = ""
    """The name of the kind in ``events.jsonl``; empty: it is shown, and never recorded."""

    version: int

    def recorded(self) -> Iterator[tuple[str, Json]]:
        """The fields that are written to the file, but for the version."""
        return ((name, getattr(self, name)) for name in recorded_names(type(self)))


def recorded_names(kind: type[Event]) -> tuple[str, ...]:
    """The names of an event's recorded fields, but for the version, in the order in which they are written."""
    return tuple(f.name for f in fields(kind) if f.name != "version" and f.metadata.get("recorded", True))


class EventSink(Protocol):
    """Takes events: all that the parts of a run know of its records."""

    def emit(self, event: Event) -> None:
        """Take one event."""
        ...


class EventBus:
    """Hands every event to all subscribers, in their order, before `emit` returns."""

    def __init__(self, *subscribers: EventSink) -> None:
        self._subscribers = subscribers

    def emit(self, event: Event) -> None:
        """Hand over one event."""
        for subscriber in self._subscribers:
            subscriber.emit(event)
