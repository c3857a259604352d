"""The one training loop, for every runtime.

    rollouts (tasks)                       this loop                                       trainer
    ----------------                       ---------                                       -------
    episodes -> engine  ... groups --->  take(v): waits for the groups due at v
                                         collate -> put_batch  -------------------------->  holds the batch
                                         source.acquire  <---- score(tokens, at=version) ->  store / live weights
                                         train  ----------------------------------------->  steps, version v + 1
                                         publish  <---------------------------------------  weights
    engine <--- pause, update_weights, resume (KV recomputed; running episodes go on)
                                         source.on_published: it may score what the last version sampled
                                         admit(v + 1) -> rollouts
                                         probe: engine against trainer at v + 1

The engine samples all the while, but between pause and resume; a source that needs the pause has it before `acquire`.
Nothing here runs a model or knows which runtime it is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch

from oldlogits.batch import TokenBatch, collate
from oldlogits.config import RunConfig, cautions
from oldlogits.core.environment import Environment
from oldlogits.core.errors import NonFiniteError
from oldlogits.core.scoring import BatchTokens, Scored
from oldlogits.core.trajectory import TrajectoryGroup
from oldlogits.loop.audit import ExactAudit
from oldlogits.loop.backend import Backend
from oldlogits.loop.calibration import calibrate, doubts
from oldlogits.loop.run_logger import RunLogger
from oldlogits.loop.totals import Totals
from oldlogits.loop.utilization import Utilization, busy_of
from oldlogits.loop.weight_sync import WeightSync
from oldlogits.objective import group_advantages
from oldlogits.record.episodes import Stage
from oldlogits.record.summary import wilson
from oldlogits.rollout.admission import pace_of
from oldlogits.rollout.buffer import Buffer, TrajectoryCounts
from oldlogits.rollout.groups import Rollouts, evaluate, is_success
from oldlogits.rollout.staleness import StalenessBound
from oldlogits.rollout.tasks import TaskDataset
from oldlogits.rollout.turns import Agent
from oldlogits.sources import check_scored, make_source
from oldlogits.train.reports import ConsistencyErrors, PublishedVersion
from oldlogits.train.step import UpdateResult


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What is learned: the environment, its rows, and the agent that plays it."""

    environment_class: type[Environment]
    rows: TaskDataset
    agent: Agent
    probe_ids: Sequence[int]


class Loop:
    """One run: evaluation before, updates, evaluation after.

    Args:
        config: The run.
        task: What is learned.
        handles: Of the runtime.
        recorder: Where everything is written.
        totals: What the run adds up to; those of its checkpoint when it goes on.
    """

    def __init__(self, config: RunConfig, task: Task, handles: Backend, recorder: RunLogger, totals: Totals) -> None:
        self._config, self._task, self._handles = config, task, handles
        self._recorder, self.totals = recorder, totals
        bound = StalenessBound(max_staleness=config.window, prompts_per_update=config.rollout.prompts_per_update)
        self.buffer = Buffer(bound, filter_uniform=config.rollout.filter_uniform)
        self.buffer.account = TrajectoryCounts(**totals.account)
        self.source = make_source(config.proximal.source, handles.trainer, handles.scorer)
        self._synchroniser = WeightSync(config, task.probe_ids, handles, self.source, recorder, totals)
        self._referee = ExactAudit(config, handles.trainer, recorder.events, handles.clock)
        self._last_update_s = 0.0
        self._last_ended: float | None = None
        self._expected_noise = 0.0  # of the engine's numerics, on the probe tokens of the live version; nats
        self.version = 0

    @property
    def consistency(self) -> ConsistencyErrors:
        """The largest errors of the witnesses of exactness so far."""
        return self._synchroniser.consistency

    async def run(self) -> None:
        """Run to the end.

        Raises:
            OldLogitsError: What stopped it.
            asyncio.CancelledError: It was interrupted.
        """
        state = await self._handles.trainer.state()
        self.version = state.version
        self.totals.average_bytes = 4 * state.num_parameters
        self._recorder.started(version=self.version, num_parameters=state.num_parameters)
        for caution in cautions(self._config):
            self._recorder.warned(caution, version=self.version)
        try:
            await self._synchroniser.give(await self._publish(), None)
            if not self.totals.num_updates and "before/greedy" not in self.totals.rewards:
                await self._evaluate("before", self._config.eval.num_episodes)
            await self._train()
            await self._evaluate("after", self._config.eval.num_episodes)
        finally:
            await self.source.close()

    def cancel_all(self) -> None:
        """The run is over: count what is outstanding as cancelled."""
        self.source.drop(self.buffer.cancel_all())

    async def _train(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            rollouts = self._start_rollouts(tasks)
            try:
                while self.version < self._config.num_updates:
                    await self._update(rollouts)
                    await self._between_updates(rollouts)
            finally:
                self._remember_rows(rollouts)
                rollouts.stop()

    def _start_rollouts(self, tasks: asyncio.TaskGroup) -> Rollouts:
        rollouts = Rollouts(
            agent=self._task.agent,
            environment_class=self._task.environment_class,
            rows=self._task.rows,
            buffer=self.buffer,
            source=self.source,
            events=self._recorder.events,
            tasks=tasks,
            group_size=self._config.rollout.group_size,
            max_running_groups=self._config.rollout.running_limit,
            first_row=self.totals.next_row,
            restart_rows=self.totals.unfinished_rows,
        )
        self._admit(rollouts)
        return rollouts

    def _admit(self, rollouts: Rollouts) -> None:
        per_version = self._config.rollout.prompts_per_update
        rollouts.admit(
            self.version,
            num_wanted=(self._config.num_updates - self.version) * per_version,
            pace_s=pace_of(self._last_update_s, per_version) if self._handles.real_time else 0.0,
        )

    async def _update(self, rollouts: Rollouts) -> None:
        """From waiting for a batch to the engine's new weights: one version, made whole or not at all."""
        before, started = await self._busy(), self._handles.clock()
        groups = await self.buffer.take(self.version)
        rollouts.fill()
        update = asyncio.create_task(self._train_on(groups, rollouts, before, started))
        try:
            await asyncio.shield(update)
        except asyncio.CancelledError:
            rollouts.stop()
            await update
            raise

    async def _train_on(
        self, groups: Sequence[TrajectoryGroup], rollouts: Rollouts, before: Utilization, started: float
    ) -> None:
        clock, trainer = self._handles.clock, self._handles.trainer
        taken = clock()
        self._recorder.batch(groups, version=self.version, waited_s=taken - started)
        batch = collate(groups, self._advantages(groups), num_steps=self._config.trainer.minibatches_per_update)
        await trainer.put_batch(batch)
        paused = await self._synchroniser.pause() if self.source.needs_pause else None
        scored = await self._score(batch)
        scored_at = clock()
        refereed_scores = await self._referee.score(self._entering(batch))
        await self._calibrate(batch)
        refereed = clock()
        result = await self._step(scored)
        trained = clock()
        published = await self._publish()
        stall_s = await self._synchroniser.give(published, paused)
        if published.publication is not None:  # the first of a run is not counted: it is the resident copy
            self.totals.add_stored(published.publication)
        self.buffer.confirm_trained()
        self.source.drop(batch.trajectory_ids)
        self.buffer.check()
        self._last_update_s = clock() - taken
        self._admit(rollouts)
        await trainer.retain(min(self.version, self._oldest_needed()))
        ended = clock()
        times = {
            "time/between_s": started - (started if self._last_ended is None else self._last_ended),
            "time/update_s": ended - started,
            "time/wait_batch_s": taken - started,
            "time/score_s": scored_at - taken,
            "time/step_s": trained - refereed,
            "time/publish_s": ended - trained,
            "time/stall_s": stall_s,
        }
        self._last_ended = ended
        used = (await self._busy()) - before
        self._count(groups, result, used, ended - started)
        of_loop = self._loop_metrics(groups, result, used, times)
        metrics = {**result.metrics, **times, **self.source.metrics(), **rollouts.gaps.metrics(), **of_loop}
        self._count_copies(published.store_bytes + metrics.get("average/stored_bytes", 0.0))
        self._recorder.updated(result, metrics, groups, version=self.version)
        effect = self._referee.judge(refereed_scores, result, version=self.version)
        if result.average_reset is not None:
            self._recorder.average_reset(result.average_reset, effect, version=self.version)

    async def _calibrate(self, batch: TokenBatch) -> None:
        """Once in a run, before its first optimizer step: what the engine's own noise makes of the recipe's band."""
        if self.totals.num_updates or not self._config.eval.num_calibration:
            return
        found = await calibrate(self._config, self._handles.trainer, batch, expected_noise=self._expected_noise)
        self._recorder.calibrated(found, version=self.version)
        for caution in doubts(found, self._config):
            self._recorder.warned(caution, version=self.version)

    async def _busy(self) -> Utilization:
        return busy_of(await self._handles.engine_stats(), await self._handles.trainer.state())

    def _count(self, groups: Sequence[TrajectoryGroup], result: UpdateResult, used: Utilization, wall_s: float) -> None:
        """Book the update."""
        trajectories = [t for group in groups for t in group.trajectories]
        totals = self.totals
        totals.add_update(
            result,
            num_trajectories=len(trajectories),
            num_multi_version=sum(len(t.versions) > 1 for t in trajectories),
        )
        totals.train_wall_s += wall_s
        totals.engine_busy_s += used.engine_s
        totals.trainer_busy_s += used.trainer_s
        totals.account = asdict(self.buffer.account)

    def _count_copies(self, stored_bytes: float) -> None:
        """Book the copies of the weights, given what the trainer keeps beside the live ones."""
        can, live_bytes = self._handles.engine.capabilities, self.totals.average_bytes
        if self._config.model.forward_dtype == "bf16":
            live_bytes //= 2
        self.totals.add_copies(1 + stored_bytes / live_bytes, can.num_replicas + can.num_host_copies)

    def _loop_metrics(
        self, groups: Sequence[TrajectoryGroup], result: UpdateResult, used: Utilization, times: Mapping[str, float]
    ) -> dict[str, float]:
        """Metrics that the objective does not know; docs/metrics.md."""
        trajectories = [t for group in groups for t in group.trajectories]
        lags, wall_s = result.staleness_counts, times["time/update_s"]
        num_loss_tokens = sum(lags.values())
        account, buffer = self.buffer.account, self.buffer
        return {
            "reward/mean": sum(t.reward for t in trajectories) / len(trajectories),
            "reward/success": sum(is_success(t.reward) for t in trajectories) / len(trajectories),
            "reward/uniform_groups": sum(len({t.reward for t in group.trajectories}) == 1 for group in groups) / len(groups),
            "episode/turns": sum(t.num_turns for t in trajectories) / len(trajectories),
            "episode/sampled_tokens": num_loss_tokens / len(trajectories),
            "episode/multi_version": sum(len(t.versions) > 1 for t in trajectories) / len(trajectories),
            "staleness/mean": sum(lag * n for lag, n in lags.items()) / num_loss_tokens,
            "staleness/max": max(lags),
            "throughput/trainer_tokens_per_s": sum(t.num_tokens for t in trajectories) / wall_s,
            **used.metrics(wall_s),
            "queue/running": buffer.running,
            "queue/queued": buffer.queued,
            "queue/admission_open": float(buffer.num_admissible() > 0),
            "accounting/submitted": account.submitted,
            "accounting/trained": account.trained,
            "accounting/filtered": account.filtered,
            "accounting/failed": account.failed,
            "accounting/cancelled": account.cancelled,
        }

    def _oldest_needed(self) -> int:
        in_flight = self.buffer.oldest_needed
        in_flight = self.version if in_flight is None else in_flight
        return in_flight if self._config.audit.share else self.source.oldest_needed(in_flight)

    def _advantages(self, groups: Sequence[TrajectoryGroup]) -> list[float]:
        rewards = torch.tensor([t.reward for group in groups for t in group.trajectories])
        index = torch.tensor([i for i, group in enumerate(groups) for _ in group.trajectories])
        advantages: list[float] = group_advantages(rewards, index, self._config.objective.advantage).tolist()
        return advantages

    def _entering(self, batch: TokenBatch) -> BatchTokens:
        versions = batch.version[batch.loss_mask]
        return BatchTokens(
            versions=versions,
            trajectory_ids=batch.trajectory_ids,
            trainer_version=self.version,
            has_mixed_kv=bool(batch.mixed_kv.any()),
        )

    async def _score(self, batch: TokenBatch) -> Scored | None:
        before, started = (await self._handles.trainer.state()).work, self._handles.clock()
        tokens = self._entering(batch)
        scored = await self.source.acquire(tokens)
        if scored is None:
            return None
        check_scored(scored, tokens.versions)
        seconds_s = self._handles.clock() - started
        work = (await self._handles.trainer.state()).work - before
        self.totals.add_scoring(work)
        self._recorder.scored(scored, batch.versions, work, version=self.version, seconds_s=seconds_s)
        return scored

    async def _step(self, scored: Scored | None) -> UpdateResult:
        try:
            return await self._handles.trainer.train(scored)
        except NonFiniteError as error:
            saved = await self._handles.trainer.save_batch(self._recorder.folder.path / "failed_batch")
            raise NonFiniteError(
                error.what, got=f"{error.got}; the batch is in {saved}", allowed=error.allowed, fix=error.fix
            ) from error

    async def _publish(self) -> PublishedVersion:
        started = self._handles.clock()
        published = await self._handles.trainer.publish()
        self.version = published.version
        self._expected_noise = float(abs(published.engine_probe_logps - published.probe_logps).max())
        seconds_s = self._handles.clock() - started
        self._recorder.published(published, seconds_s=seconds_s)
        return published

    async def _between_updates(self, rollouts: Rollouts) -> None:
        """Evaluation points and checkpoints."""
        done = self.version >= self._config.num_updates
        every = self._config.eval.every
        if every and self.version % every == 0 and not (done and self._config.eval.num_episodes):
            await self._evaluate("during", self._config.eval.num_episodes_during)
        every = self._config.record.checkpoint_every
        if done or (every and self.version % every == 0):
            self._remember_rows(rollouts)
            saving = asyncio.create_task(self.checkpoint())
            try:
                await asyncio.shield(saving)
            except asyncio.CancelledError:  # the trainer goes on writing it: its folder must stay until it is whole
                await saving
                raise

    def _remember_rows(self, rollouts: Rollouts) -> None:
        self.totals.next_row, self.totals.unfinished_rows = rollouts.next_row, rollouts.unfinished_rows

    async def checkpoint(self) -> None:
        """Write a checkpoint of the trainer and of what the run adds up to.

        Trajectories in flight are not saved: they count as cancelled, and a resumed run starts their rows anew.
        """
        account = asdict(self.buffer.account)
        account["cancelled"] += self.buffer.queued + self.buffer.running
        with self._recorder.folder.checkpoint(self.version) as folder:
            await self._handles.trainer.save(folder)
            replace(self.totals, account=account).write(folder / "state" / "totals.json")
        latest = self._recorder.folder.latest_checkpoint()
        assert latest is not None, "it was just written"
        self._recorder.checkpoint(latest, version=self.version)

    async def _evaluate(self, stage: Stage, num_episodes: int) -> None:
        """Held-out episodes, sampled and (but during training) greedy."""
        if not num_episodes:
            return
        rows = self._task.rows.heldout(num_episodes)
        for mode, temperature in (("sampled", 1.0), ("greedy", 0.0))[: 1 if stage == "during" else 2]:
            started = self._handles.clock()
            outcome = await evaluate(
                self._task.agent,
                self._task.environment_class,
                rows,
                name=f"e{stage}-{mode}-{self.version}",
                temperature=temperature,
                num_running=self._config.eval.max_concurrent,
                on_progress=lambda ended: self._recorder.view.show({"eval/ended": ended, "eval/rows": len(rows)}),
            )
            rate = wilson(outcome.num_successes, len(outcome.rewards))
            seconds_s = self._handles.clock() - started
            self._recorder.evaluation(stage, mode, rate, version=self.version, seconds_s=seconds_s)
            if stage != "during":
                self.totals.rewards[f"{stage}/{mode}"] = list(outcome.rewards)
            for i, trajectory in enumerate(outcome.trajectories[:4]):
                self._recorder.episode(trajectory, version=self.version, split="heldout", stage=stage, with_text=i < 4)
