"""The checkpoints of a run: written beside training, one at a time, named when whole; older ones are removed by rule.

write:  the trainer copies its state -> its thread writes, fsyncs, takes checksums      (training goes on)
finish: SHA256SUMS -> the folder gets its name -> `CheckpointWritten` -> older ones go
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn

from oldlogits.config.schema import RecordConfig
from oldlogits.core.errors import RunWriteError
from oldlogits.core.weights import PolicyVersion
from oldlogits.loop.resume import LoopState
from oldlogits.models.checksums import files_of
from oldlogits.record.events import CheckpointFailed, CheckpointWritten
from oldlogits.record.recording import Recording
from oldlogits.rollout.journal.journal import Journal
from oldlogits.train.calls import TrainerCalls

POLL_S: Final = 0.2
"""Seconds between two questions whether a checkpoint is written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pending:
    version: PolicyVersion
    folder: Path
    started: float
    stall_s: float


class Checkpoints:
    """Writes the checkpoints of a run; where time is not real, each is there when `write` returns."""

    def __init__(
        self, config: RecordConfig, recording: Recording, trainer: TrainerCalls, journal: Journal, *, real_time: bool
    ) -> None:
        self._config, self._recording, self._trainer, self._real_time = config, recording, trainer, real_time
        self._journal = journal
        self._pending: _Pending | None = None
        self._finishing = asyncio.Lock()

    async def write(self, version: PolicyVersion, parts: Mapping[str, bytes]) -> None:
        """Begin to write a checkpoint, when the one before is finished; `parts` are files beside those of the trainer, by name.

        Raises:
            RunWriteError: It cannot be written.
        """
        assert self._pending is None, "the one before is finished"
        started = time.perf_counter()
        folder = self._recording.folder.begin_checkpoint(version)
        await self._trainer.begin_checkpoint(folder, parts)
        stall_s = time.perf_counter() - started
        self._pending = _Pending(version=version, folder=folder, started=started, stall_s=stall_s)
        if not self._real_time:
            await self.finish()

    async def finish(self, *, wait: bool = True) -> None:
        """Name the checkpoint that is being written, if there is one and it is whole; with `wait` it is, when this returns.

        Raises:
            RunWriteError: It cannot be written.
        """
        async with self._finishing:
            pending, folder = self._pending, self._recording.folder
            if pending is None:
                return
            try:
                if not await self._trainer.end_checkpoint(wait):
                    return
                self._name(pending)
            except RunWriteError as error:
                self._fail(pending, error)
            self._pending = None
            for checkpoint in self._outlived():
                if self._real_time:  # gigabytes take a while
                    await asyncio.to_thread(folder.remove_checkpoint, checkpoint)
                else:
                    folder.remove_checkpoint(checkpoint)
            self._journal.forget(min(LoopState.journal_of(path) for path in folder.all_checkpoints().values()))

    async def watch(self) -> NoReturn:
        """Finish every checkpoint soon after it is written, until this is cancelled.

        Raises:
            RunWriteError: One cannot be written.
        """
        while True:
            await asyncio.sleep(POLL_S)
            await self.finish(wait=False)

    def _name(self, pending: _Pending) -> None:
        folder, recording = self._recording.folder, self._recording
        recording.log.sync()
        num_bytes = sum(path.stat().st_size for path in files_of(pending.folder))
        path = str(folder.name_checkpoint(pending.folder).relative_to(folder.path))
        recording.events.emit(
            CheckpointWritten(
                version=pending.version,
                path=path,
                bytes=num_bytes,
                stall_s=pending.stall_s,
                seconds_s=time.perf_counter() - pending.started,
            )
        )

    def _fail(self, pending: _Pending, error: RunWriteError) -> NoReturn:
        """Make room, and say what came of it; the run ends."""
        self._pending = None
        shutil.rmtree(pending.folder, ignore_errors=True)
        with suppress(RunWriteError):  # the same disk
            self._recording.events.emit(CheckpointFailed(version=pending.version, error=str(error)))
        raise error

    def _outlived(self) -> list[Path]:
        found = self._recording.folder.all_checkpoints()
        success = {version: LoopState.success_of(path) for version, path in found.items()} if self._config.keep_best else {}
        kept = kept_versions(self._config, {version: success.get(version) for version in found})
        return [path for version, path in found.items() if version not in kept]


def kept_versions(config: RecordConfig, success: Mapping[PolicyVersion, float | None]) -> set[PolicyVersion]:
    """Say which checkpoints stay: the newest ones, the best by held-out success, and one in so many versions.

    That of the start, which has learned nothing, goes as soon as there is another one.

    Args:
        config: The rule.
        success: The success of each checkpoint in an evaluation of its version, by version, ascending; None: there was none.

    Example:
        >>> rule = RecordConfig(keep_checkpoints=2, keep_best=True, keep_every=40)
        >>> sorted(kept_versions(rule, {20: 0.5, 40: 0.2, 60: 0.4, 80: None, 100: None}))
        [20, 40, 80, 100]
    """
    kept = set([version for version in success if version or len(success) == 1][-config.keep_checkpoints :])
    played = {version: found for version, found in success.items() if found is not None}
    if config.keep_best and played:
        kept.add(max(played, key=lambda version: (played[version], version)))
    if config.keep_every:
        kept |= {version for version in success if version and version % config.keep_every == 0}
    return kept
