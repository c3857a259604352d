"""Held-out episodes: before, during and after training."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import asdict

from oldlogits.core.weights import PolicyVersion
from oldlogits.loop.task import Task
from oldlogits.record.bus import EventSink
from oldlogits.record.episodes import Stage
from oldlogits.record.events import Evaluated, EvaluationProgressed, TrajectoryFailed, Warned
from oldlogits.record.failures import in_words, tallied
from oldlogits.record.intervals import NOT_MEASURED, mean_interval, wilson
from oldlogits.rollout.groups import restarted
from oldlogits.rollout.heldout import Evaluation, evaluate
from oldlogits.rollout.player import Outcome
from oldlogits.rollout.turns import Failure
from oldlogits.rollout.watches import FailureWatch


class Evaluator:
    """Plays held-out rows, `num_running` at the same time, and tells what came of them.

    Args:
        task: What is played.
        events: Takes what comes of it.
        clock: Seconds.
        num_running: Episodes played at the same time.
        max_failed_share: `rollout.max_failed_share`.
        success_at: `eval.success_at`.
    """

    def __init__(
        self,
        task: Task,
        events: EventSink,
        clock: Callable[[], float],
        *,
        num_running: int,
        max_failed_share: float,
        success_at: float,
    ) -> None:
        self._task, self._events, self._clock, self._num_running = task, events, clock, num_running
        self._max_failed_share, self._success_at = max_failed_share, success_at
        self._beside: asyncio.Task[float | None] | None = None
        self._version: PolicyVersion = -1  # of that

    async def begin(self, num_episodes: int, *, version: PolicyVersion, tasks: asyncio.TaskGroup) -> None:
        """Begin to play beside training, once what was begun before has ended."""
        await self.ended(before=version)
        self._version = version
        self._beside = tasks.create_task(self._play_beside(num_episodes, version))

    async def _play_beside(self, num_episodes: int, version: PolicyVersion) -> float | None:
        """Play a point to its end; a run that is stopped meanwhile says so, since one that goes on later than it lacks it."""
        try:
            return await self.play("during", num_episodes, version=version)
        except asyncio.CancelledError:
            message = f"the evaluation of version {version} was cut short; a run that goes on from a later version lacks it"
            self._events.emit(Warned(version=version, name="cut-evaluation", message=message, figures={}))
            raise

    async def ended(self, *, before: PolicyVersion) -> None:
        """Wait for what was begun of an earlier version."""
        if self._beside is not None and self._version < before:
            await asyncio.wait({self._beside})  # an error of it ends its task group

    async def play(self, stage: Stage, num_episodes: int, *, version: PolicyVersion) -> float | None:
        """Play episodes of this version, sampled and, but during training, greedy; with 0 episodes nothing is done.

        Returns:
            The success rate of those sampled; None: none was played.

        Raises:
            RolloutError: Too many of them fail.
        """
        success = None
        if not num_episodes:
            return success
        rows = self._task.rows.heldout(num_episodes)
        for mode, temperature in (("sampled", 1.0), ("greedy", 0.0))[: 1 if stage == "during" else 2]:
            started = self._clock()
            outcome = await evaluate(
                self._task.player.evaluating(temperature),
                rows,
                name=f"e{stage}-{mode}-{version}",
                num_running=self._num_running,
                tell=self._teller(stage, mode, len(rows), version),
                success_at=self._success_at,
            )
            trajectories = [branch for branches in outcome.episodes for branch in branches]
            num_played, rewards = len(outcome.episodes), [branches[0].reward for branches in outcome.episodes]
            rate = wilson(outcome.num_successes, num_played) if num_played else NOT_MEASURED
            mean = mean_interval(rewards) if num_played else NOT_MEASURED
            success = rate.mean if mode == "sampled" and num_played else success
            if not num_played:
                self._warn(f"{mode} evaluation {stage} training", outcome, version)
            self._events.emit(
                Evaluated(
                    version=version,
                    stage=stage,
                    mode=mode,
                    **asdict(rate),
                    reward_mean=mean.mean,
                    reward_low=mean.low,
                    reward_high=mean.high,
                    success_at=self._success_at,
                    rewards=outcome.rewards,
                    environments=self._task.rows.environments_of(rows),
                    seconds_s=self._clock() - started,
                    versions=sorted({version for branch in trajectories for version in branch.versions}),
                    trajectories=trajectories,
                )
            )
        return success

    def _warn(self, what: str, outcome: Evaluation, version: PolicyVersion) -> None:
        """Say that an evaluation measured nothing, and why."""
        why = in_words(tallied(found.reason for found in outcome.outcomes if isinstance(found, Failure)))
        message = f"NOTHING WAS MEASURED: all {len(outcome.outcomes)} held-out episodes of the {what} failed: {why}"
        figures = {"failed": len(outcome.outcomes)}
        self._events.emit(Warned(version=version, name="failed-evaluation", message=message, figures=figures))

    def _teller(self, stage: Stage, mode: str, num_episodes: int, version: PolicyVersion) -> Callable[[Outcome], None]:
        """Makes events of the outcomes of an evaluation, and counts the failures among them."""
        what, remedy = f"{mode} episodes of the evaluation {stage} training", self._task.player.remedy
        watch = FailureWatch(self._events, what, self._max_failed_share, remedy)
        num_ended = num_failed = 0

        def tell(outcome: Outcome) -> None:
            nonlocal num_ended, num_failed
            failure = outcome if isinstance(outcome, Failure) else None
            if failure is not None and failure.begins_again:
                self._events.emit(restarted(failure, version))
                return
            num_ended, num_failed = num_ended + 1, num_failed + (failure is not None)
            if failure is not None:
                self._events.emit(TrajectoryFailed(version=version, trajectory=failure.id, stage=stage, reason=failure.reason))
            self._events.emit(
                EvaluationProgressed(version=version, num_ended=num_ended, num_failed=num_failed, num_episodes=num_episodes)
            )
            watch.count(failure, version)

        return tell
