"""Held-out episodes: before, during and after training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

from oldlogits.core.weights import PolicyVersion
from oldlogits.loop.task import Task
from oldlogits.record.bus import EventSink
from oldlogits.record.episodes import Stage
from oldlogits.record.events import Evaluated, EvaluationProgressed
from oldlogits.record.intervals import wilson
from oldlogits.rollout.groups import evaluate


class Evaluator:
    """Plays held-out rows, `num_running` at the same time, and tells what came of them."""

    def __init__(self, task: Task, events: EventSink, clock: Callable[[], float], *, num_running: int) -> None:
        self._task, self._events, self._clock, self._num_running = task, events, clock, num_running

    async def play(self, stage: Stage, num_episodes: int, *, version: PolicyVersion) -> float | None:
        """Play episodes of this version, sampled and, but during training, greedy; with 0 episodes nothing is done.

        Returns:
            The success rate of those sampled; None: none was played.
        """
        success = None
        if not num_episodes:
            return success
        rows = self._task.rows.heldout(num_episodes)
        for mode, temperature in (("sampled", 1.0), ("greedy", 0.0))[: 1 if stage == "during" else 2]:
            started = self._clock()
            outcome = await evaluate(
                self._task.agent,
                self._task.environment_class,
                rows,
                name=f"e{stage}-{mode}-{version}",
                temperature=temperature,
                num_running=self._num_running,
                on_progress=lambda num: self._events.emit(
                    EvaluationProgressed(version=version, num_ended=num, num_episodes=len(rows))
                ),
            )
            rate = wilson(outcome.num_successes, len(outcome.rewards))
            success = rate.mean if mode == "sampled" else success
            self._events.emit(
                Evaluated(
                    version=version,
                    stage=stage,
                    mode=mode,
                    **asdict(rate),
                    rewards=outcome.rewards,
                    seconds_s=self._clock() - started,
                    trajectories=outcome.trajectories,
                )
            )
        return success
