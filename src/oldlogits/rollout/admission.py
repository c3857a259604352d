"""When groups of episodes start: within the staleness bound, and at the trainer's pace.

The rule is apart from what it starts, so that a simulation starts groups by the very rule of a run.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from typing import Final

from oldlogits.rollout.buffer import Buffer

ENOUGH_BATCHES: Final = 1.5
"""Batches ready to train at which no further group is started, where starts are paced."""

PACE: Final = 1.25
"""Groups started in the time in which the trainer consumes one: what it gains on a trainer that got faster."""


def pace_of(update_s: float, prompts_per_update: int) -> float:
    """Seconds between two starts, given the seconds of the last update without its wait for a batch."""
    return update_s / (PACE * prompts_per_update)


class Admission(ABC):
    """Starts groups, at most `max_running_groups` at the same time (0: any number); what a group is, a subclass knows."""

    def __init__(self, buffer: Buffer, tasks: asyncio.TaskGroup, *, max_running_groups: int) -> None:
        self._buffer, self._tasks = buffer, tasks
        self._max_running = max_running_groups or 1 << 30
        self._running: set[asyncio.Task[None]] = set()
        self._open = True
        self.version = 0
        self._num_wanted = 0
        self._pace_s = 0.0
        self._pacing: asyncio.Task[None] | None = None

    @abstractmethod
    def start_group(self) -> asyncio.Task[None]:
        """Admit a group to the buffer and start it; its task calls `group_ended` as soon as the buffer has closed it."""

    def admit(self, version: int, *, num_wanted: int, pace_s: float) -> None:
        """Start what the bound admits now that the engine holds `version`.

        Args:
            version: The engine's version.
            num_wanted: Groups that the run still trains; no more are started.
            pace_s: Seconds between two starts unless the trainer waits; 0: always start at once.
        """
        self.version, self._num_wanted, self._pace_s = version, num_wanted, pace_s
        self.fill()

    def fill(self) -> None:
        """Start groups: all at once while the trainer waits, else at its pace, and none while enough is ready.

        What starts early only waits and grows stale. Started evenly, groups are fresher, the engine's load is even, and
        weight updates meet episodes in mid-flight.
        """
        while self._may_start():
            if self._pace_s and not self._buffer.is_waited_for:
                if self._pacing is None and self._buffer.num_batches_ready < ENOUGH_BATCHES:
                    self._pacing = self._tasks.create_task(self._start_next())
                return
            self._running.add(self.start_group())

    def group_ended(self) -> None:
        """Note that the group of the current task was closed, so that it holds back no other."""
        task = asyncio.current_task()
        assert task is not None
        self._running.discard(task)
        self.fill()

    async def stopped(self) -> None:
        """Stop, and wait until nothing runs."""
        self.stop()
        await asyncio.gather(*self._running, return_exceptions=True)

    def stop(self) -> None:
        """Start nothing more and cancel what runs."""
        self._open = False
        if self._pacing is not None:
            self._pacing.cancel()
        for task in self._running:
            task.cancel()

    async def _start_next(self) -> None:
        """Wait for the pace, start a group, and go on."""
        await asyncio.sleep(self._pace_s)
        self._pacing = None
        if self._may_start():
            self._running.add(self.start_group())
        self.fill()

    def _may_start(self) -> bool:
        return (
            self._open
            and self._buffer.num_admissible() > 0
            and self._buffer.num_outstanding < self._num_wanted
            and len(self._running) < self._max_running
        )
