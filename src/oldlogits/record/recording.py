"""Opens everything that a run records: the bus, and the subscribers that write the run folder, the screen and the trackers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from oldlogits.record.bus import EventBus, EventSink
from oldlogits.record.episodes import Decode, EpisodeRecorder
from oldlogits.record.event_log import EventLog
from oldlogits.record.events import Warned
from oldlogits.record.folder import RunFolder
from oldlogits.record.jsonl import LineFile
from oldlogits.record.live.view import LiveView
from oldlogits.record.trackers.feed import TrackerFeed


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """What the loop writes to: the bus, which takes every event, and the log, whose length a checkpoint remembers.

    Args:
        cut: Warnings of incomplete last lines that were cut when the files were opened.
    """

    folder: RunFolder
    events: EventBus
    log: EventLog
    cut: Sequence[Warned] = ()


@contextmanager
def record_run(
    folder: RunFolder,
    view: LiveView,
    decode: Decode,
    *,
    tokens_every: int,
    transcripts_every: int,
    trackers: Sequence[TrackerFeed] = (),
    others: Sequence[EventSink] = (),
) -> Iterator[Recording]:
    """Open the files of a run folder and close them in the end.

    Args:
        folder: The run folder.
        view: Shows the run in the terminal.
        decode: Turns token ids into text, for transcripts.
        tokens_every: Updates between two token tables; 0: none.
        transcripts_every: Updates between two transcripts; 0: none.
        trackers: The tracking tools that follow the run.
        others: Whoever else takes each event.
    """
    with ExitStack() as stack:
        log = stack.enter_context(EventLog(folder.events))
        episodes = stack.enter_context(LineFile(folder.episodes))
        bus = EventBus(
            log,
            *_token_tables(folder, every=tokens_every),
            EpisodeRecorder(episodes, decode, every=transcripts_every, others=[tracker.take for tracker in trackers]),
            view,
            *trackers,
            *others,
        )
        for tracker in trackers:
            tracker.warn_on(bus)
        cut = [_cut(path, file) for path, file in ((folder.events, log), (folder.episodes, episodes)) if file.num_cut_bytes]
        yield Recording(folder=folder, events=bus, log=log, cut=cut)


def _token_tables(folder: RunFolder, *, every: int) -> list[EventSink]:
    """The token tables, if there are to be any: what writes them is not imported for nothing."""
    if not every:
        return []
    from oldlogits.record.tables import TokenTables

    return [TokenTables(folder.tokens, every=every)]


def _cut(path: Path, file: LineFile) -> Warned:
    message = f"{path.name} ended in an incomplete line, which was cut: one record is lost"
    return Warned(version=-1, name="cut_line", message=message, figures={"num_bytes": file.num_cut_bytes})
