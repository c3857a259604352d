"""A log of events that a test reads back, and what equal runs agree on."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from oldlogits.record.bus import Event
from oldlogits.record.event_log import EventLog, is_wall_clock, read_events
from oldlogits.record.jsonl import Json


class MemoryLog:
    """Keeps events as they are read back from a file."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def emit(self, event: Event) -> None:
        """Append one event; raises what `EventLog.emit` raises."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "events.jsonl"
            with EventLog(path) as log:
                log.emit(event)
            self.events += read_events(path)


def without_wall_clock(value: Json) -> Json:
    """A copy without wall-clock keys, at any depth: what equal lockstep runs agree on."""
    if isinstance(value, Mapping):
        return {key: without_wall_clock(item) for key, item in value.items() if not is_wall_clock(key)}
    if isinstance(value, list | tuple):
        return [without_wall_clock(item) for item in value]
    return value
