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
from collections.abc import Sequence
from dataclasses import asdict, replace

from oldlogits.config.guard import Caution
from oldlogits.core.engine_stats import EngineStats
from oldlogits.core.errors import NonFiniteError
from oldlogits.core.scoring import BatchTokens, Scored
from oldlogits.core.source import LogprobSource
from oldlogits.core.trajectory import TrajectoryGroup
from oldlogits.core.weights import PolicyVersion
from oldlogits.loop.audit import ExactAudit
from oldlogits.loop.backend import Backend
from oldlogits.loop.calibration import Calibrator
from oldlogits.loop.checkpoints import Checkpoints
from oldlogits.loop.evaluation import Evaluator
from oldlogits.loop.metrics import (
    UpdateTimer,
    batch_metrics,
    batch_scored,
    batch_taken,
    copies,
    counters,
    queue_metrics,
    updated,
    usage_metrics,
    version_published,
)
from oldlogits.loop.reference import batch_of, score_reference
from oldlogits.loop.resume import FILE, LoopState, sampler_seed
from oldlogits.loop.task import LoopConfig, Task
from oldlogits.loop.weight_sync import WeightSync
from oldlogits.record.events import Warned
from oldlogits.record.recording import Recording
from oldlogits.rollout.admission import pace_of
from oldlogits.rollout.buffer import Buffer, TrajectoryCounts
from oldlogits.rollout.groups import Rollouts, event_of, restore
from oldlogits.rollout.journal.journal import FILE as IN_FLIGHT
from oldlogits.rollout.journal.journal import Journal, to_bytes
from oldlogits.rollout.journal.records import Published, Taken
from oldlogits.rollout.staleness import StalenessBound
from oldlogits.rollout.watches import FailureWatch, FilterWatch
from oldlogits.sources import check_scored
from oldlogits.train.reports import PublishedVersion
from oldlogits.train.step import UpdateResult


class Loop:
    """One run: evaluation before, updates, evaluation after."""

    def __init__(
        self,
        config: LoopConfig,
        task: Task,
        backend: Backend,
        source: LogprobSource,
        *,
        sync: WeightSync,
        audit: ExactAudit,
        calibrator: Calibrator,
        recording: Recording,
        journal: Journal,
    ) -> None:
        self._config, self._task, self._backend, self.source = config, task, backend, source
        self._sync, self._audit, self._calibrator = sync, audit, calibrator
        self._recording, self._events, self._journal = recording, recording.events, journal
        rollout, num_running = config.rollout, config.eval.max_concurrent
        rule = {"max_failed_share": rollout.max_failed_share, "success_at": config.eval.success_at}
        self._evaluator = Evaluator(task, self._events, backend.clock, num_running=num_running, **rule)
        bound = StalenessBound(max_staleness=config.max_lag, prompts_per_update=rollout.prompts_per_update)
        self.checkpoints = Checkpoints(config.record, recording, backend.trainer, journal, real_time=backend.real_time)
        self.buffer = Buffer(bound, filter_uniform=rollout.filter_uniform, min_size=rollout.min_group_size)
        self.state = LoopState()
        self.version = self._num_trained = 0
        self._last_update_s = 0.0
        self._last_ended: float | None = None
        self._counted: dict[str, float] | None = None  # at the end of the update before
        self._rollouts: Rollouts | None = None

    def go_on(self, state: LoopState) -> None:
        """Start from the state of a checkpoint instead of from nothing."""
        self.state = state
        state.catch_up(self._journal.progress)
        self.buffer.account = TrajectoryCounts(**state.account)

    async def run(self, cautions: Sequence[Caution] = ()) -> None:
        """Run to the end; `cautions` are what a reader of the results should know of the recipe.

        Raises:
            OldLogitsError: What stopped it.
            asyncio.CancelledError: It was interrupted.
        """
        trainer = await self._backend.trainer.state()
        self.version, self._num_trained = trainer.version, trainer.num_trained
        for caution in cautions:
            self._events.emit(Warned(version=self.version, **asdict(caution)))
        for record in self._journal.progress.told:
            self._events.emit(event_of(record))
        try:
            await self._sync.give(await self._publish())
            await self._sync.checked()
            if not self.state.num_updates and not self.state.is_evaluated:
                await self._evaluator.play("before", self._config.eval.num_episodes, version=self.version)
                self.state.is_evaluated = True
            is_new, checkpoints = self.state.num_events is None, bool(self._config.record.checkpoint_every)
            if is_new and checkpoints and self._backend.begin_again is None:
                await self._begin_checkpoint()  # what is sampled from here on can be gone on with
            await self._train()
            await self._evaluator.play("after", self._config.eval.num_episodes, version=self.version)
            await self.checkpoints.finish()
        finally:
            await self.source.close()

    def cancel_all(self) -> None:
        """Count what is outstanding as cancelled, now that the run is over."""
        if self._rollouts is None:  # it ended before it went on with what it had in flight
            restore(self.buffer, self._journal.progress)
        self.source.drop(self.buffer.cancel_all())

    async def _train(self) -> None:
        oldest_held = (await self._backend.trainer.state()).oldest_version
        async with asyncio.TaskGroup() as tasks:
            rollouts = self._start_rollouts(tasks, oldest_held)
            following = tasks.create_task(self._journal.follow(self._backend.engine, self._config.temperature))
            try:
                if self._config.eval.overlap and self.version:  # the point of the checkpoint is played again
                    await self._evaluate(tasks)
                while self.version < self._config.num_updates:
                    await self._update(rollouts)
                    if await self._between_updates(tasks) and self._backend.begin_again is not None:
                        rollouts = await self._begin_again(rollouts, tasks)
            finally:
                rollouts.stop()
                following.cancel()

    async def _begin_again(self, rollouts: Rollouts, tasks: asyncio.TaskGroup) -> Rollouts:
        """Go on from the checkpoint that was just written as another process would, which then is the same bit for bit."""
        await rollouts.stopped()
        self.source.drop([id for group in self._journal.progress.groups.values() for id in group.episodes])
        self.buffer.clear()
        return self._start_rollouts(tasks, (await self._backend.trainer.state()).oldest_version)

    def _start_rollouts(self, tasks: asyncio.TaskGroup, oldest_held: PolicyVersion) -> Rollouts:
        config = self._config.rollout
        rollouts = Rollouts(
            player=self._task.player,
            rows=self._task.rows,
            buffer=self.buffer,
            source=self.source,
            events=self._events,
            tasks=tasks,
            group_size=config.group_size,
            max_replays=config.max_replays,
            failures=FailureWatch(self._events, "training episodes", config.max_failed_share, self._task.player.remedy),
            left_out=FilterWatch(self._events, config.prompts_per_update, config.max_filtered_batches),
            max_running_groups=config.running_limit,
            journal=self._journal,
            next_row=self.state.next_row,
            next_group=self.state.next_group,
        )
        if self.state.num_updates and self._backend.begin_again is not None:
            self._backend.begin_again(sampler_seed(self._config.seed, self.state.num_updates))
        rollouts.go_on(self.version, oldest_held)
        self._admit(rollouts)
        self._rollouts = rollouts
        return rollouts

    def _admit(self, rollouts: Rollouts) -> None:
        per_version = self._config.rollout.prompts_per_update
        rollouts.admit(
            self.version,
            num_wanted=(self._config.num_updates - self.version) * per_version,
            pace_s=pace_of(self._last_update_s, per_version) if self._backend.real_time else 0.0,
        )

    async def _update(self, rollouts: Rollouts) -> None:
        """Make one version, from waiting for a batch to the engine's new weights; whole or not at all."""
        before, self._counted = self._counted or await self._counters(), None
        timer = UpdateTimer(self._backend.clock, self._last_ended)
        with timer.part("wait_batch"):
            groups = await self.buffer.take(self.version, self._journal.progress.taken.get(self.version, ()))
            rollouts.batch_taken()
        update = asyncio.create_task(self._train_on(groups, rollouts, timer, before))
        try:
            await asyncio.shield(update)
        except asyncio.CancelledError:
            rollouts.stop()
            await update
            raise

    async def _train_on(
        self, groups: Sequence[TrajectoryGroup], rollouts: Rollouts, timer: UpdateTimer, before: dict[str, float]
    ) -> None:
        trainer = self._backend.trainer
        self._journal.note(Taken(version=self.version, groups=tuple(group.id for group in groups)))
        self._events.emit(batch_taken(groups, self.version, timer.seconds("wait_batch")))
        with timer.part("score"):
            o = self._config.objective
            batch = batch_of(groups, o, num_steps=self._config.minibatches)
            tokens = batch.entering(self.version, checked_every=self._config.checked_every)
            await trainer.put_batch(batch)
            if self.source.needs_pause:
                await self._sync.pause()
            scored = await self._score(tokens, batch.versions)
            of_reference = await score_reference(trainer, groups, batch, o, version=self.version)
        audited = await self._audit.score(tokens)
        if not self.state.num_updates:
            errors = (await trainer.state()).consistency
            noise = {"packing_noise": errors.packing_max_abs_error, "rounding_noise": errors.rounding_max_abs_error}
            await self._calibrator.measure(batch, version=self.version, **noise)
        await self._sync.checked()  # nothing is trained after a version that the engine does not hold
        with timer.part("step"):
            result = await self._step(scored)
        with timer.part("publish"):
            published = await self._publish()
            self._compare_with_before(published, rollouts)
            stall_s = await self._sync.give(published)
            self.buffer.confirm_trained()
            self._journal.progress.forget(group.id for group in groups)
            self.source.drop(batch.trajectory_ids)
            self.buffer.check()
            self._last_update_s = timer.since_part("wait_batch")
            self._admit(rollouts)
            await trainer.retain(min(self.version, self._oldest_needed()))
            self._counted = await self._counters(self._sync.stats)
        self.state.num_updates += 1
        times, self._last_ended = timer.end() | {"time/stall_s": stall_s}, timer.ended
        used = usage_metrics(before, self._counted, times["time/update_s"])
        lags, success_at = result.staleness_counts, self._config.eval.success_at
        of_loop = batch_metrics(groups, lags, times["time/update_s"], success_at=success_at) | queue_metrics(self.buffer)
        metrics = {**result.metrics, **of_reference, **times, **self.source.metrics(), **rollouts.metrics(), **of_loop, **used}
        kept_bytes = published.store_bytes + metrics.get("average/stored_bytes", 0.0)
        of_copies = copies(self._backend.engine.capabilities, kept_bytes, self._config.bytes_per_parameter * self._num_trained)
        self._events.emit(updated(self.version, result, metrics | of_copies, groups))
        self._audit.conclude(audited, result, version=self.version)

    def _compare_with_before(self, published: PublishedVersion, rollouts: Rollouts) -> None:
        """Take note of a version; where a run that goes on has made another one than before, its tokens are not of this one."""
        progress, probe = self._journal.progress, tuple(published.probe_logps.tolist())
        if progress.probes.get(published.version, probe) != probe:
            rollouts.begin_again_from(published.version)
        self._journal.note(Published(version=published.version, probe=probe))

    async def _counters(self, engine: EngineStats | None = None) -> dict[str, float]:
        return counters(engine or await self._backend.engine.stats(), await self._backend.trainer.state())

    def _oldest_needed(self) -> int:
        stores = self.source.stores_versions or self._config.keeps_all_versions
        if self._config.objective.has_reference and not stores:
            return self.version  # the store is there for the reference alone
        in_flight = self.version if (oldest := self.buffer.oldest_needed) is None else oldest
        untaken = self._rollouts.oldest_untaken if self._rollouts is not None else None
        needed = in_flight if self._config.keeps_all_versions else self.source.oldest_needed(in_flight)
        return needed if untaken is None or not self.source.stores_versions else min(needed, untaken)

    async def _score(self, tokens: BatchTokens, versions: Sequence[int]) -> Scored | None:
        before, started = (await self._backend.trainer.state()).work, self._backend.clock()
        scored = await self.source.acquire(tokens)
        if scored is not None:
            check_scored(scored, tokens.versions)
            seconds_s, state = self._backend.clock() - started, await self._backend.trainer.state()
            self._events.emit(batch_scored(self.version, scored, versions, state.work - before, seconds_s))
        return scored

    async def _step(self, scored: Scored | None) -> UpdateResult:
        try:
            return await self._backend.trainer.train(scored)
        except NonFiniteError as error:
            saved = await self._backend.trainer.save_batch(self._recording.folder.path / "failed_batch")
            raise NonFiniteError(
                error.what, got=f"{error.got}; the batch is in {saved}", allowed=error.allowed, fix=error.fix
            ) from error

    async def _publish(self) -> PublishedVersion:
        started = self._backend.clock()
        published = await self._backend.trainer.publish()
        self.version = published.version
        self._calibrator.expect(published)
        self._events.emit(version_published(published, self._backend.clock() - started))
        return published

    async def _between_updates(self, tasks: asyncio.TaskGroup) -> bool:
        """Evaluate and begin a checkpoint, where they are due; returns whether one was begun that is not the last."""
        done = self.version >= self._config.num_updates
        await self._evaluate(tasks)
        every = self._config.record.checkpoint_every
        if done or (every and self.version % every == 0):
            await self._evaluator.ended(before=self.version)  # a run that goes on would not play it again
            await self._begin_checkpoint()
            self._counted = None
            return not done
        return False

    async def _evaluate(self, tasks: asyncio.TaskGroup) -> None:
        """Play the point that is due at this version, to its end unless it is to overlap training."""
        held_out, version, done = self._config.eval, self.version, self.version >= self._config.num_updates
        self.state.success = None
        if not held_out.every or version % held_out.every or (done and held_out.num_episodes):
            return
        await self._sync.checked()
        if held_out.overlap:
            await self._evaluator.begin(held_out.num_episodes_during, version=version, tasks=tasks)
        else:
            self.state.success = await self._evaluator.play("during", held_out.num_episodes_during, version=version)
        self._counted = None

    async def _begin_checkpoint(self) -> None:
        beginning = asyncio.create_task(self.checkpoint())
        try:
            await asyncio.shield(beginning)
        except asyncio.CancelledError:  # a trainer that begins to write is not to find its folder in use
            await beginning
            raise

    async def checkpoint(self) -> None:
        """Begin to write a checkpoint: the trainer, what the loop needs to go on, and all that is in flight.

        The engine has shown by then that it holds the version. What happens from here on is in the journal. A run that goes on
        does the updates after the checkpoint again, with their batches; later events do not count for it.
        """
        await self._sync.checked()
        await self.checkpoints.finish()
        if self._rollouts is not None:
            self.state.next_row, self.state.next_group = self._rollouts.next_row, self._rollouts.next_group
        number, records = self._journal.begin(self.version)
        account, num_events = asdict(self.buffer.account), self._recording.log.num_lines
        state = replace(self.state, account=account, num_events=num_events, journal=number)
        in_flight = await asyncio.to_thread(to_bytes, records) if self._backend.real_time else to_bytes(records)
        await self.checkpoints.write(self.version, {FILE: state.to_bytes(), IN_FLIGHT: in_flight})
