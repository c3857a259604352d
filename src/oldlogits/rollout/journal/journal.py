"""Writes the journal, and reads it back.

    Rollouts, source, loop --records--> queue --> writer thread --> rollouts/000007.jsonl
    engine --what running turns have sampled, once a second--^

    checkpoint    all groups in flight, and the number of the file that begins there
    resume        those, and all files from that number on, in their order; what comes is appended to the last

Before the first checkpoint nothing is written: there is none from which a run could go on. Nobody waits for the disk here.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import BinaryIO, Final, cast

from oldlogits.core.engine import GrowingEngine, RolloutEngine, trajectory_of
from oldlogits.core.errors import RunFolderError, writing
from oldlogits.core.trajectory import Sampled, Segment
from oldlogits.core.weights import PolicyVersion
from oldlogits.rollout.journal.progress import EpisodeProgress, Progress
from oldlogits.rollout.journal.records import Grew, Record, Running, Told, decode, encode
from oldlogits.rollout.turns import sampled_segments

FILE: Final = "state/rollouts.jsonl"
"""Where the groups in flight lie in a checkpoint."""

GROWTH_S: Final = 1.0
"""Seconds between two looks at what running turns have sampled: what a kill loses of them."""


class Journal:
    """Takes note of what happens to groups and episodes; one thread calls it, another one writes.

    Args:
        folder: The folder of its files, which is made when the first one is; None: it has none, and a run that goes on begins
            where its checkpoint was written.
        progress: What a run that goes on has read; None: it begins.
        number: The number of the file that begins at the checkpoint from which the run goes on, if it goes on.

    Raises:
        RunWriteError: The disk has refused an earlier record.
    """

    def __init__(self, folder: Path | None, progress: Progress | None = None, number: int = 0) -> None:
        self._folder, self.progress = folder, progress or Progress()
        self._number = max([number, *(_files(folder) if folder is not None else ())])
        self._queue: SimpleQueue[Record | Path | None] = SimpleQueue()
        self._failure: Exception | None = None
        self._is_written = folder is not None and progress is not None
        if folder is not None and self._is_written:
            self._queue.put(_file(folder, self._number))
        self._thread = threading.Thread(target=self._write, name="journal", daemon=True)
        self._thread.start()

    def note(self, record: Record) -> None:
        """Take note of something."""
        if self._failure is not None:
            raise self._failure
        if self.progress.apply(record) and self._is_written:
            self._queue.put(record)

    def grew(self, episode: str, segments: Sequence[Segment]) -> None:
        """Take note of all segments that an episode has now."""
        num_known = self.progress.num_segments(episode)
        if num_known < len(segments):
            self.note(Grew(episode=episode, start=num_known, segments=tuple(segments[num_known:])))

    def running(self, turns: Mapping[str, Sequence[Sampled]]) -> None:
        """Take note of all that the running turn of each episode has sampled; one of an agent program may be given up."""
        for id, sampled in turns.items():
            episode = self.progress.episode(id)
            if episode is not None and episode.segments and (new := _after(episode.num_running, sampled)):
                self._grow(id, episode, new)

    async def follow(self, engine: RolloutEngine, temperature: float) -> None:
        """Take note of what running turns have sampled since the last time, every `GROWTH_S` seconds, if the engine tells.

        Args:
            engine: Samples the turns.
            temperature: The temperature that it samples at.
        """
        while engine.capabilities.growth:
            await asyncio.sleep(GROWTH_S)
            asked = {id: (episode, len(episode.segments), episode.num_running) for id, episode in self.progress.unfinished()}
            grown = await cast(GrowingEngine, engine).grown({id: num_running for id, (_, _, num_running) in asked.items()})
            for request, generation in grown.items():
                id = trajectory_of(request)
                episode = asked[id][0]  # its turn may have ended, and it may have begun again, by the time of the answer
                still = self.progress.episode(id) is episode and asked[id][1:] == (len(episode.segments), episode.num_running)
                known_segments = (*episode.segments, *episode.running)
                if still and (sampled := sampled_segments(generation, temperature, known_segments)):
                    self._grow(id, episode, sampled)

    def _grow(self, id: str, episode: EpisodeProgress, sampled: Sequence[Sampled]) -> None:
        num_segments, start = len(episode.segments), episode.num_running
        self.note(Running(episode=id, num_segments=num_segments, start=start, sampled=tuple(sampled)))

    def begin(self, version: PolicyVersion) -> tuple[int, list[Record]]:
        """Begin a file for a checkpoint of `version`; returns its number, and what the checkpoint is to hold."""
        self.progress = self.progress.at(version)
        if self._folder is not None:
            self._number, self._is_written = self._number + 1, True
            self._queue.put(_file(self._folder, self._number))
        return self._number, list(self.progress.records())

    def forget(self, number: int) -> None:
        """Remove the files before a number: no checkpoint needs them any more."""
        if self._folder is None:
            return
        with writing(self._folder):
            for at, path in _files(self._folder).items():
                if at < number:
                    path.unlink(missing_ok=True)

    def close(self) -> None:
        """Write what is left."""
        self._queue.put(None)
        self._thread.join()

    def _write(self) -> None:
        """The writer thread. What it has written is the system's, and outlives a kill of this process."""
        file: BinaryIO | None = None
        try:
            with writing(self._folder or Path()):
                while (item := self._queue.get()) is not None:
                    if isinstance(item, Path):
                        if file is not None:
                            file.close()
                        item.parent.mkdir(exist_ok=True)
                        file = item.open("ab")
                    elif file is not None:
                        file.write(encode(item))
                        if self._queue.empty():
                            file.flush()
                if file is not None:
                    file.close()
        except Exception as error:  # supervision: whoever calls next hears of it
            self._failure = error
            if file is not None:
                with suppress(OSError):  # it tries to write again what was refused
                    file.close()


def _after(start: int, sampled: Iterable[Sampled]) -> list[Sampled]:
    """Leave out the first `start` tokens."""
    found = []
    for piece in sampled:
        if start < (num := len(piece.token_ids)):
            first = max(start, 0)
            routing = piece.routing.last(num - first) if piece.routing is not None and first else piece.routing
            found.append(replace(piece, token_ids=piece.token_ids[first:], logp_mu=piece.logp_mu[first:], routing=routing))
        start -= num
    return found


def to_bytes(records: Iterable[Record]) -> bytes:
    """Write records as the content of a file."""
    return b"".join(map(encode, records))


def read(checkpoint: Path, folder: Path | None, number: int) -> Progress:
    """Read how far groups had come when a run ended that goes on from a checkpoint.

    The incomplete last line of a file, which a kill leaves, is cut off.

    Args:
        checkpoint: The checkpoint.
        folder: The folder of the journal; None: what happened after the checkpoint does not count.
        number: The number of the first file that counts.

    Raises:
        RunFolderError: A file is missing, or a line is not what was written, or does not follow from those before it.
    """
    progress = Progress()
    _add(checkpoint / FILE, progress, "resume from another checkpoint")
    progress = Progress(groups=progress.groups, taken=progress.taken, probes=progress.probes)  # nothing since
    for path in (path for at, path in sorted(_files(folder).items()) if at >= number) if folder is not None else ():
        with writing(path), path.open("r+b") as file:
            content = file.read()
            file.truncate(content.rfind(b"\n") + 1)
        _add(path, progress, f"or remove it and the later files of {folder}: what happened since begins again")
    return progress


def _add(path: Path, progress: Progress, otherwise: str) -> None:
    """Add the records of a file up; an error advises a copy of it, or `otherwise`."""
    fix = f"restore it from a copy; {otherwise}"
    try:
        with path.open("rb") as file:
            for index, line in enumerate(file, start=1):
                try:
                    if progress.apply(record := decode(line)) and isinstance(record, Told):
                        progress.told.append(record)
                except ValueError as error:
                    got = str(error).splitlines()[0]
                    allowed = "the bytes that were written"
                    raise RunFolderError(f"line {index} of {path} is damaged", got=got, allowed=allowed, fix=fix) from error
    except OSError as error:
        got, allowed = error.strerror or str(error), "the file of groups in flight"
        raise RunFolderError(f"{path} cannot be read", got=got, allowed=allowed, fix=fix) from error


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.jsonl"


def _files(folder: Path) -> dict[int, Path]:
    return {int(path.stem): path for path in folder.glob("*.jsonl") if path.stem.isdecimal()}
