"""Source "dedicated": OLD from a second model that only scores, while the trainer computes gradients.

trainer   steps .............. publish v+1 -> steps .............. publish v+2
scorer    score groups of v, v-1 ... | take v+1 | score what v sampled, groups of v+1, v ...
acquire   waits for what is left of its batch
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Sequence

import numpy as np
from numpy.typing import NDArray

from oldlogits.core.scoring import BatchTokens, Scored
from oldlogits.core.source import SourceHandles
from oldlogits.core.trajectory import Trajectory
from oldlogits.core.weights import PolicyVersion, WeightUpdate
from oldlogits.sources.incremental import IncrementalSource


class DedicatedSource(IncrementalSource):
    """The scorer receives every version and keeps a window of them; a token of an older one goes to the trainer's store.

    Paper: "dedicated old-logit model" (three exact ways to get pi_old).
    """

    cost = "a second model, and its window of versions"
    needs_scorer = True

    def __init__(self, handles: SourceHandles) -> None:
        super().__init__(handles)
        assert handles.scorer is not None, "a backend opens a scorer for a source with needs_scorer"
        self._scorer = self._dedicated = handles.scorer
        self._handover: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def on_arrival(self, trajectories: Sequence[Trajectory]) -> None:
        """Score the trajectories now."""
        self.in_flight.end(trajectories)
        await self._score([trajectory.id for trajectory in trajectories], held_only=True)

    async def on_published(self, version: PolicyVersion, update: WeightUpdate, probe_logps: NDArray[np.float32]) -> None:
        """Hand over the version, then score what the outgoing one sampled; neither is waited for."""
        await super().on_published(version, update, probe_logps)
        self._handover = self._start(self._hand_over(version, update, probe_logps))
        self._start(self._score(held_only=True))

    async def acquire(self, batch: BatchTokens) -> Scored:
        """Wait for what is left; the trainer's weights may change after that, so the hand-over is waited for as well."""
        started = time.perf_counter()
        if self._handover is not None:
            await asyncio.shield(self._handover)
        self._counted["source/wait_s"] += time.perf_counter() - started
        for task in self._tasks:
            if task.done():
                task.result()
        return await super().acquire(batch)

    async def close(self) -> None:
        """Cancel scores that are under way; let a hand-over finish, since its file is being read."""
        for task in self._tasks - {self._handover}:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _hand_over(self, version: PolicyVersion, update: WeightUpdate, probe_logps: NDArray[np.float32]) -> None:
        """Give the scorer a version. It carries out calls in order, so it is asked for the new window only from now on."""
        self.hold((*self._held, version)[-self._dedicated.window :])
        error = await self._dedicated.publish(version, update, probe_logps)
        self.consistency_max_abs_error = float(np.fmax(self.consistency_max_abs_error, error))

    def _start(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        """Start a task whose error the next `acquire` raises."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        return task

    def _forget(self, task: asyncio.Task[None]) -> None:
        if task.cancelled() or task.exception() is None:
            self._tasks.discard(task)
