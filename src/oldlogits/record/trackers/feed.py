"""What stands between the run and a tracker: the run never waits for one, and never ends because of one.

bus -> TrackerFeed.emit -> queue -> a thread of the tracker's own -> Tracker.log, log_episodes, finish
                                    an exception there -> one warning; the tracker is left alone from then on
"""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from oldlogits.core.errors import writing
from oldlogits.core.registry import require
from oldlogits.core.tracker import TRACKERS, Cell, TrackedRun, Tracker
from oldlogits.record.bus import Event, EventSink
from oldlogits.record.episodes import Episode
from oldlogits.record.evaluation import by_environment
from oldlogits.record.events import Evaluated, Updated, Warned
from oldlogits.record.folder import RunFolder

FINISH_S: Final = 60.0
"""Seconds that a tracker may take to end; then the run ends without it."""

Work = Callable[[Tracker], None]


def find_trackers(names: Sequence[str]) -> dict[str, type[Tracker]]:
    """The trackers of a recipe by their names.

    Raises:
        ConfigError: A name is unknown, or the package of a tracker is not installed.
    """
    for name in names:
        if name in TRACKERS.names:
            require(name, name, what=f"the tracker '{name}'")
    return {name: TRACKERS.find(name) for name in names}


def open_feeds(kinds: Mapping[str, type[Tracker]], folder: RunFolder, config: Mapping[str, object]) -> list[TrackerFeed]:
    """Open the trackers of a run; each has a folder of its own below ``trackers/``."""
    feeds = []
    for name, kind in kinds.items():
        own = folder.path / "trackers" / name.replace(":", ".")
        with writing(own):
            own.mkdir(parents=True, exist_ok=True)
        feeds.append(TrackerFeed(name, kind, TrackedRun(name=folder.path.resolve().name, folder=own, config=flat(config))))
    return feeds


def flat(table: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Nested tables as one, by dotted key.

    Example:
        >>> flat({"seed": 1, "trainer": {"lr": 0.1}})
        {'seed': 1, 'trainer.lr': 0.1}
    """
    found: dict[str, object] = {}
    for key, value in table.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


class TrackerFeed:
    """Follows a run for one tracker, which is named so in the recipe and opened with `run`."""

    def __init__(self, name: str, kind: type[Tracker], run: TrackedRun) -> None:
        self.name = name
        self._work: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._rows: list[Mapping[str, Cell]] = []
        self._error, self._is_told = "", False
        self._warn: EventSink | None = None
        self._thread = threading.Thread(target=self._serve, args=(kind, run), name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def warn_on(self, events: EventSink) -> None:
        """Say where to warn if the tracker fails."""
        self._warn = events

    def take(self, episode: Episode) -> None:
        """Keep an episode for the table of the event that it belongs to."""
        self._rows.append(_row(episode))

    def emit(self, event: Event) -> None:
        """Pass on what an event brings; warn once if the tracker has failed."""
        if isinstance(event, Updated):
            self._pass_on(event.metrics, step=event.version)
        elif isinstance(event, Evaluated):
            num_failed = len(event.rewards) - event.num_episodes
            rate = {"success": event.mean, "success_low": event.low, "success_high": event.high}
            rate |= {"reward": event.reward_mean, "reward_low": event.reward_low, "reward_high": event.reward_high}
            rate |= {"num_failed": num_failed, "seconds_s": event.seconds_s}
            for name, found in by_environment(event).items():
                if found.success is not None and found.reward is not None:
                    rate |= {f"success/{name}": found.success.mean, f"reward/{name}": found.reward.mean}
            self._pass_on({f"eval/{event.mode}_{key}": value for key, value in rate.items()}, step=event.version)
        if self._error and self._warn is not None and not self._is_told:
            self._is_told = True
            message = f"tracker '{self.name}' failed and is not told of this run any more: {self._error}"
            self._warn.emit(Warned(version=event.version, name="tracker", message=message, figures={}))

    def finish(self, folder: RunFolder) -> str:
        """End the tracking; returns what went wrong, if something did that was not warned of yet."""
        self._work.put(lambda tracker: tracker.finish(folder.report))
        self._work.put(None)
        self._thread.join(FINISH_S)
        if self._thread.is_alive():
            return f"tracker '{self.name}' did not end within {FINISH_S:.0f} s"
        return f"tracker '{self.name}' failed: {self._error}" if self._error and not self._is_told else ""

    def _pass_on(self, metrics: Mapping[str, float], *, step: int) -> None:
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        rows, self._rows = self._rows, []
        self._work.put(lambda tracker: tracker.log(finite, step=step))
        if rows:
            self._work.put(lambda tracker: tracker.log_episodes(rows, step=step))

    def _serve(self, kind: type[Tracker], run: TrackedRun) -> None:
        """Supervise the tracker: record what it raises, and leave it alone from then on."""
        try:
            tracker = kind(run)
            while (work := self._work.get()) is not None:
                work(tracker)
        except Exception as error:
            self._error = f"{type(error).__name__}: {error}"


def _row(episode: Episode) -> Mapping[str, Cell]:
    return {
        "version": episode.version,
        "stage": episode.stage,
        "id": episode.id,
        "group": episode.group,
        "reward": episode.reward,
        "stop_reason": episode.stop_reason,
        "num_turns": episode.num_turns,
        "versions": ", ".join(map(str, episode.versions)),
        "text": "".join(segment.text for segment in episode.segments),
    }
