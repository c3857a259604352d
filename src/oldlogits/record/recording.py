"""Opens everything that a run records: the bus, and the subscribers that write the run folder, the screen and the trackers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from oldlogits.record.bus import EventBus
from oldlogits.record.episodes import Decode, EpisodeRecorder
from oldlogits.record.event_log import EventLog
from oldlogits.record.folder import RunFolder
from oldlogits.record.jsonl import LineFile
from oldlogits.record.live import LiveView
from oldlogits.record.tables import TokenTables
from oldlogits.record.trackers.feed import TrackerFeed


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """What the loop writes to: the bus, which takes every event, and the log, whose length a checkpoint remembers."""

    folder: RunFolder
    events: EventBus
    log: EventLog


@contextmanager
def record_run(
    folder: RunFolder,
    view: LiveView,
    decode: Decode,
    *,
    tokens_every: int,
    transcripts_every: int,
    trackers: Sequence[TrackerFeed] = (),
) -> Iterator[Recording]:
    """Open the files of a run folder and close them in the end.

    Args:
        folder: The run folder.
        view: Shows the run in the terminal.
        decode: Turns token ids into text, for transcripts.
        tokens_every: Updates between two token tables; 0: none.
        transcripts_every: Updates between two transcripts; 0: none.
        trackers: The tracking tools that follow the run.
    """
    with ExitStack() as stack:
        log = stack.enter_context(EventLog(folder.events))
        episodes = stack.enter_context(LineFile(folder.episodes))
        bus = EventBus(
            log,
            TokenTables(folder.tokens, every=tokens_every),
            EpisodeRecorder(episodes, decode, every=transcripts_every, others=[tracker.take for tracker in trackers]),
            view,
            *trackers,
        )
        for tracker in trackers:
            tracker.warn_on(bus)
        yield Recording(folder=folder, events=bus, log=log)
