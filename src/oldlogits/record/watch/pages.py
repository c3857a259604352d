"""What the pages of ``oldlogits watch`` show, read from the files of run folders."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from oldlogits.core.errors import OldLogitsError
from oldlogits.record.episodes import Episode, read_episodes
from oldlogits.record.event_log import history, read_events, typed
from oldlogits.record.events import Evaluated, RunEnded, RunStarted, Updated
from oldlogits.record.folder import RunFolder
from oldlogits.record.intervals import success_of
from oldlogits.record.owner import is_owned
from oldlogits.record.report.frame import page_template
from oldlogits.record.report.transcripts import Transcript

NUM_EPISODES: Final = 30
"""Episodes on the page of the newest ones."""
REFRESH_S: Final = 10
"""Seconds after which a page of runs that go on reads itself again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunLine:
    """One run in the list.

    Args:
        name: The folder's name.
        state: running, done, error, interrupted, or killed.
        what: Environment, variant and source.
        updates: Updates so far, and of how many where that is known.
        reward: Mean reward of the last update.
        success: The last evaluation in words.
        began: When it began.
    """

    name: str
    state: str
    what: str
    updates: str
    reward: str
    success: str
    began: str


def run_folders(parent: Path) -> dict[str, Path]:
    """Return the run folders in a folder by name, the newest first."""
    found = [path for path in parent.iterdir() if RunFolder(path=path).events.is_file()]
    return {path.name: path for path in sorted(found, key=lambda path: -path.stat().st_mtime)}


def run_line(path: Path) -> RunLine:
    """Read what the list says of a run; what cannot be read is said in its place."""
    try:
        events = history(list(read_events(RunFolder(path=path).events)))
    except OldLogitsError as error:
        return RunLine(name=path.name, state="unreadable", what=error.what, updates="", reward="", success="", began="")
    started, updates = next(reversed(typed(events, RunStarted)), None), typed(events, Updated)
    sampled = [found for found in typed(events, Evaluated) if found.mode == "sampled" and found.num_episodes]
    ended = next(reversed(typed(events, RunEnded)), None)
    reward = updates[-1].metrics.get("reward/mean") if updates else None
    return RunLine(
        name=path.name,
        state="running" if is_owned(path) else ended.reason if ended else "killed",
        what=" · ".join(filter(None, (getattr(started, name, "") for name in ("variant", "source", "runtime")))),
        updates=f"{len(updates)}" + (f" of {total}" if (total := _total(path)) else ""),
        reward="" if reward is None else f"{reward:.3f}",
        success=str(success_of(sampled[-1])) if sampled else "",
        began=_began(path),
    )


def _total(path: Path) -> str:
    """The updates that the recipe asks for."""
    with suppress(OSError):
        for line in RunFolder(path=path).config.read_text(encoding="utf-8").splitlines():
            if line.startswith("num_updates = "):
                return line.removeprefix("num_updates = ")
    return ""


def _began(path: Path) -> str:
    with suppress(OSError):
        return time.strftime("%Y-%m-%d %H:%M", time.localtime((path / "environment.json").stat().st_mtime))
    return ""


def list_page(parent: Path) -> str:
    """Return the list of the runs in a folder."""
    lines = [run_line(path) for path in run_folders(parent).values()]
    refresh_s = REFRESH_S if any(line.state == "running" for line in lines) else 0
    return page_template("runs.html", __package__).render(parent=parent, lines=lines, refresh_s=refresh_s)


def episodes_page(path: Path) -> str:
    """Return the newest episodes of a run that were recorded with their text, the newest first."""
    refresh_s = REFRESH_S if is_owned(path) else 0
    newest = _newest(path)
    transcripts = [Transcript(title=f"{episode.stage}, update {episode.version}", episode=episode) for episode in newest]
    return page_template("episodes.html", __package__).render(name=path.name, transcripts=transcripts, refresh_s=refresh_s)


def _newest(path: Path) -> Sequence[Episode]:
    def shown() -> Iterator[Episode]:
        yield from (episode for episode in read_episodes(RunFolder(path=path).episodes) if episode.segments)

    with_text = {episode.id: episode for episode in shown()}
    return list(with_text.values())[-NUM_EPISODES:][::-1]
