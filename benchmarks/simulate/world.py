"""One simulated run: the loop of `loop/loop.py`, with its own buffer, admission and routes, in virtual time.

SimulatedRollouts (Admission) -> Engine ... -> Buffer.take -> source.acquire -> steps -> publish -> engines -> admit
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.simulate.clock import run_virtually
from benchmarks.simulate.engine import Cached, Engine
from benchmarks.simulate.scenario import Episode, Scenario
from benchmarks.simulate.scoring import Flight, SimulatedScorer, SimulatedTrainer, placeholder
from oldlogits.core.scoring import BatchTokens
from oldlogits.core.source import LogprobSource
from oldlogits.core.trajectory import Sampled, TrajectoryGroup
from oldlogits.core.weights import FullWeights
from oldlogits.rollout.admission import Admission, pace_of
from oldlogits.rollout.buffer import Buffer
from oldlogits.rollout.staleness import StalenessBound
from oldlogits.sources import make_source

NO_WEIGHTS, NO_PROBE = FullWeights(tensors={}), np.zeros(0, np.float32)
"""What a version is, where only its time passes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What was done since the start.

    Args:
        engine_busy_s: Engines worked, all together.
        trainer_busy_s: The trainer worked.
        scorer_busy_s: The dedicated scorer worked.
        num_read: Tokens that scoring read, on the trainer and on the dedicated scorer.
        num_decoded: Tokens that the engines sampled.
        num_prefilled: Prompt tokens that they computed.
        num_steps: Their steps.
    """

    engine_busy_s: float
    trainer_busy_s: float
    scorer_busy_s: float
    num_read: int
    num_decoded: int
    num_prefilled: int
    num_steps: int

    def __sub__(self, other: Work) -> Work:
        """What was done in between."""
        return Work(
            engine_busy_s=self.engine_busy_s - other.engine_busy_s,
            trainer_busy_s=self.trainer_busy_s - other.trainer_busy_s,
            scorer_busy_s=self.scorer_busy_s - other.scorer_busy_s,
            num_read=self.num_read - other.num_read,
            num_decoded=self.num_decoded - other.num_decoded,
            num_prefilled=self.num_prefilled - other.num_prefilled,
            num_steps=self.num_steps - other.num_steps,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """What one simulated update took and did.

    Args:
        version: That it made.
        wall_s: From the wait for its batch to its end.
        between_s: Until the next began.
        wait_s: It waited for its batch.
        score_s: It waited for the route, before the steps and after the publish.
        stall_s: The engines stood still.
        work: Of engines, trainer and scorer meanwhile.
        num_trajectories: Trained.
        num_tokens: Trained, context included.
        num_sampled: Of these, sampled.
        staleness: Trained tokens by staleness.
        num_versions: Versions that had to be kept for tokens in flight, the live one included.
    """

    version: int
    wall_s: float
    between_s: float
    wait_s: float
    score_s: float
    stall_s: float
    work: Work
    num_trajectories: int
    num_tokens: int
    num_sampled: int
    staleness: Mapping[int, int]
    num_versions: int


def simulate(scenario: Scenario) -> list[Update]:
    """Run a scenario to its end; the same scenario gives the same updates.

    Raises:
        AccountingError: The staleness bound was broken, or nothing goes on: a defect.
    """

    async def main() -> list[Update]:
        return await _World(scenario).run()

    return run_virtually(main())


class _Rollouts(Admission):
    """Groups whose episodes pass time on the engines and between turns."""

    def __init__(self, world: _World, tasks: asyncio.TaskGroup) -> None:
        super().__init__(world.buffer, tasks, max_running_groups=world.scenario.max_running_groups)
        self._world, self._num_started = world, 0

    def start_group(self) -> asyncio.Task[None]:
        """Start the episodes of a group that is drawn."""
        group_id = f"g{self._num_started:06d}"
        self._num_started += 1
        self._buffer.admit(group_id, size=self._world.scenario.group_size, version=self.version)
        return self._tasks.create_task(self._play_group(group_id))

    async def _play_group(self, group_id: str) -> None:
        world, scenario = self._world, self._world.scenario
        rng = random.Random(f"{scenario.seed}/{group_id}")  # a group is the same whatever becomes of others: routes compare
        is_uniform = rng.random() < scenario.filtered_share
        episodes = scenario.workload.draw_group(scenario.group_size, rng)
        async with asyncio.TaskGroup() as members:
            for i, episode in enumerate(episodes):
                reward = 0.0 if is_uniform else float(i % 2)
                members.create_task(world.play(f"{group_id}.{i}", group_id, episode, reward))
        closed = self._buffer.close(group_id)
        self.group_ended()
        if closed.group is None:
            world.forget([t.id for t in closed.trajectories])
        else:
            await world.source.on_arrival(closed.trajectories)


class _World:
    """The state of one simulated run."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        bound = StalenessBound(max_staleness=scenario.max_staleness, prompts_per_update=scenario.prompts_per_update)
        self.buffer = Buffer(bound, filter_uniform=scenario.filtered_share > 0)
        self.flights: dict[str, Flight] = {}
        self.engines = [
            Engine(
                scenario.engine,
                max_num_seqs=scenario.max_num_seqs,
                recompute=scenario.recompute,
                common_tokens=scenario.workload.common_tokens,
                found_share=scenario.found_share,
            )
            for _ in range(scenario.num_engines)
        ]
        self.trainer = SimulatedTrainer(scenario.trainer, self.flights)
        self.scorer = None if scenario.scorer is None else SimulatedScorer(scenario.scorer, self.flights)
        self.source: LogprobSource = make_source(scenario.route, self.trainer, self.scorer)
        self._clock = asyncio.get_running_loop().time
        self.version = 0
        self._last_update_s = 0.0
        self._controller_free_at = 0.0
        self._first_condition = random.Random(f"{scenario.seed}/conditions").randrange(len(scenario.conditions))

    async def run(self) -> list[Update]:
        """All updates."""
        await self.source.on_published(0, NO_WEIGHTS, NO_PROBE)
        updates: list[Update] = []
        async with asyncio.TaskGroup() as tasks:
            rollouts = _Rollouts(self, tasks)
            self._admit(rollouts)
            while self.version < self.scenario.num_updates:
                updates.append(await self._update(rollouts))
                between_s = self.scenario.trainer.between_s
                self._controller_free_at = self._clock() + between_s
                await asyncio.sleep(between_s)
            rollouts.stop()
        await self.source.close()
        return updates

    async def play(self, id: str, group_id: str, episode: Episode, reward: float) -> None:
        """One episode."""
        engine = min(self.engines, key=lambda e: e.num_assigned)
        engine.num_assigned += 1
        flight = self.flights[id] = Flight(id=id, cached=Cached(group_id=group_id, num_prompt=episode[0].num_read))
        rng = random.Random(f"{self.scenario.seed}/{id}")
        for i, turn in enumerate(episode):
            await asyncio.sleep(self.scenario.workload.draw_gap_s("gap" if i else "first", rng))
            flight.read(turn.num_read)
            self.source.on_segment_closed(id, flight.segments)
            spans = await engine.generate(id, flight.cached, turn.num_sampled)
            if self._clock() < self._controller_free_at:
                await asyncio.sleep(self._controller_free_at - self._clock())
            flight.sampled(spans)
            self.source.on_segment_closed(id, flight.segments)
        engine.num_assigned -= 1
        await asyncio.sleep(self.scenario.workload.draw_gap_s("last", rng))
        self.buffer.end((flight.trajectory(group_id, reward),))

    def forget(self, ids: Sequence[str]) -> None:
        """These are needed no more."""
        self.source.drop(ids)
        for id in ids:
            del self.flights[id]

    def _admit(self, rollouts: _Rollouts) -> None:
        per_version = self.scenario.prompts_per_update
        num_wanted = (self.scenario.num_updates - self.version) * per_version if self.scenario.stops else 1 << 30
        rollouts.admit(self.version, num_wanted=num_wanted, pace_s=pace_of(self._last_update_s, per_version))

    async def _update(self, rollouts: _Rollouts) -> Update:
        clock, trainer, times = self._clock, self.trainer, self.scenario.trainer
        before, started = self._work(), clock()
        groups = await self.buffer.take(self.version)
        rollouts.fill()
        taken = clock()
        self._change_conditions()
        batch = self._entering(groups)
        trainer.put_batch(batch)
        flights = [self.flights[i] for i in batch.trajectory_ids]
        num_tokens = sum(flight.ends[-1] for flight in flights)
        await trainer.work(times.rest_s + (times.first_s if self.version == 0 else 0.0))
        score_from = clock()
        paused_at = await self._pause() if self.source.needs_pause else None
        await self.source.acquire(batch)
        score_s = clock() - score_from
        await trainer.work(num_tokens * times.token_s)
        await trainer.work(times.publish_s)
        entered_at, self.version = self.version, self.version + 1
        paused_at = await self._pause() if paused_at is None else paused_at
        await asyncio.sleep(self.scenario.load_s)
        for engine in self.engines:
            engine.update(self.version)
            engine.resume()
        stall_s = clock() - paused_at
        score_from = clock()
        await self.source.on_published(self.version, NO_WEIGHTS, NO_PROBE)
        score_s += clock() - score_from
        self.buffer.confirm_trained()
        self.forget(batch.trajectory_ids)
        self.buffer.check()
        self._last_update_s = clock() - taken
        self._admit(rollouts)
        await trainer.work(times.after_s)
        in_flight = self.buffer.oldest_needed
        oldest = self.source.oldest_needed(self.version if in_flight is None else in_flight)
        return Update(
            version=self.version,
            wall_s=clock() - started,
            between_s=times.between_s,
            wait_s=taken - started,
            score_s=score_s,
            stall_s=stall_s,
            num_trajectories=len(flights),
            num_tokens=num_tokens,
            num_sampled=sum(num for flight in flights for _, num in flight.counts),
            staleness=_staleness(flights, entered_at),
            num_versions=self.version - oldest + 1,
            work=self._work() - before,
        )

    def _change_conditions(self) -> None:
        conditions = self.scenario.conditions
        condition = conditions[(self._first_condition + self.version) % len(conditions)]
        self.trainer.factor = condition.trainer
        if self.scorer is not None:
            self.scorer.factor = condition.trainer
        for engine in self.engines:
            engine.factor = condition.engine

    async def _pause(self) -> float:
        """Bring the engines to rest, and tell the route what unfinished turns have sampled; returns when they rested."""
        await asyncio.sleep(self.scenario.pause_s)
        for engine in self.engines:
            engine.pause()
        paused_at = self._clock()
        if self.source.needs_partials:
            spans_of = {id: spans for engine in self.engines for id, spans in engine.partials()}
            for id, spans in spans_of.items():
                self.flights[id].paused(spans)
            running = {id: [placeholder(version) for version, _ in spans] for id, spans in spans_of.items()}
            await self.source.on_paused(running)
        return paused_at

    def _entering(self, groups: Sequence[TrajectoryGroup]) -> BatchTokens:
        trajectories = [t for group in groups for t in group.trajectories]
        versions = np.array([s.version for t in trajectories for s in t.segments if isinstance(s, Sampled)], np.int64)
        return BatchTokens(
            versions=versions,
            trajectory_ids=tuple(t.id for t in trajectories),
            trainer_version=self.version,
            has_mixed_kv=not self.scenario.recompute and any(len(t.versions) > 1 for t in trajectories),
            logp_mu=np.zeros(len(versions), np.float32),
        )

    def _work(self) -> Work:
        engines, scorer = self.engines, self.scorer
        return Work(
            engine_busy_s=sum(e.busy_s for e in engines),
            trainer_busy_s=self.trainer.busy_s,
            scorer_busy_s=scorer.busy_s if scorer else 0.0,
            num_read=self.trainer.num_read + (scorer.num_read if scorer else 0),
            num_decoded=sum(e.num_decoded for e in engines),
            num_prefilled=sum(e.num_prefilled for e in engines),
            num_steps=sum(e.num_steps for e in engines),
        )


def _staleness(flights: Sequence[Flight], version: int) -> dict[int, int]:
    """Tokens by staleness when they enter training at `version`."""
    found: dict[int, int] = {}
    for flight in flights:
        for sampled_by, num in flight.counts:
            found[version - sampled_by] = found.get(version - sampled_by, 0) + num
    return found
