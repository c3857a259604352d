"""A log of events that a test reads back."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from oldlogits.record.bus import Event
from oldlogits.record.event_log import EventLog, RecordedEvent, read_events


class MemoryLog:
    """Keeps events as they are read back from a file."""

    def __init__(self) -> None:
        self.events: list[RecordedEvent] = []

    def emit(self, event: Event) -> None:
        """Append one event; raises what `EventLog.emit` raises."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "events.jsonl"
            with EventLog(path) as log:
                log.emit(event)
            self.events += [replace(found, seq=len(self.events)) for found in read_events(path)]
