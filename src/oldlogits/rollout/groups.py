"""Rollouts: groups of episodes as tasks that feed the buffer, and held-out evaluation.

admit -> group task -> episode tasks -> engine.generate ...      (engine down: the error ends the run)
                   |<- trajectories, failures
                   -> buffer.close -> source.on_arrival
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

from oldlogits.core.environment import Environment, Row
from oldlogits.core.errors import EnvironmentShapeError
from oldlogits.core.source import LogprobSource
from oldlogits.core.trajectory import Segment, Trajectory, is_success
from oldlogits.record.bus import EventSink
from oldlogits.record.events import GroupAdmitted, GroupClosed, TrajectoryFailed, TrajectoryRestarted
from oldlogits.rollout.admission import Admission
from oldlogits.rollout.buffer import Buffer
from oldlogits.rollout.tasks import TaskDataset
from oldlogits.rollout.turn_latency import TurnLatency
from oldlogits.rollout.turns import Agent, Failure, run_episode

FAILURES_IN_A_ROW: Final = 256
"""Failed episodes without one that ended well, after which the run ends: the environment is broken."""


class Rollouts(Admission):
    """Starts groups of episodes within the staleness bound and puts what they yield into the buffer.

    Args:
        agent: Plays the episodes.
        environment_class: The class of which every episode has an instance.
        rows: The tasks.
        buffer: Admits groups and collects their trajectories.
        source: Is told of trajectories that grow, of groups that end, and of those that are not trained.
        events: Takes an event whenever a group starts or ends, or an episode fails.
        tasks: Supervises the episodes: an error of the engine in one of them ends the run.
        group_size: Episodes per group.
        max_running_groups: Groups sampled at the same time; 0: as many as are admitted.
        first_row: The first training row that was never started.
        restart_rows: Rows to start before it: those in flight when the run was last saved.
    """

    def __init__(
        self,
        *,
        agent: Agent,
        environment_class: type[Environment],
        rows: TaskDataset,
        buffer: Buffer,
        source: LogprobSource,
        events: EventSink,
        tasks: asyncio.TaskGroup,
        group_size: int,
        max_running_groups: int,
        first_row: int,
        restart_rows: Sequence[int] = (),
    ) -> None:
        super().__init__(buffer, tasks, max_running_groups=max_running_groups)
        self.latency = TurnLatency()
        self._agent = replace(agent, report=self._report)
        self._class, self._rows = environment_class, rows
        self._source, self._events = source, events
        self._group_size = group_size
        self._failures = _Failures()
        self.next_row = first_row
        self._restart_rows = list(restart_rows)

    def start_group(self) -> asyncio.Task[None]:
        """Start the episodes of the next row."""
        index = self._restart_rows[0] if self._restart_rows else self.next_row
        row = self._rows.train(index)
        group_id = f"g{index:06d}"
        self._buffer.admit(group_id, size=self._group_size, version=self.version)
        self._events.emit(GroupAdmitted(version=self.version, group=group_id))
        if self._restart_rows:
            self._restart_rows.pop(0)
        else:
            self.next_row += 1
        return self._tasks.create_task(self._play_group(group_id, row))

    @property
    def unfinished_rows(self) -> list[int]:
        """The rows of the groups in flight, and those still to restart: what a resumed run starts with."""
        return [*(int(group_id[1:]) for group_id in self._buffer.group_ids), *self._restart_rows]

    def _report(self, trajectory_id: str, segments: Sequence[Segment]) -> None:
        self.latency.grew(trajectory_id, segments)
        self._source.on_segment_closed(trajectory_id, segments)

    async def _play_group(self, group_id: str, row: Row) -> None:
        async with asyncio.TaskGroup() as members:
            for member in range(self._group_size):
                members.create_task(self._play_member(group_id, member, row))
        closed = self._buffer.close(group_id)
        self._events.emit(
            GroupClosed(
                version=self.version,
                group=group_id,
                rewards=[t.reward for t in closed.trajectories],
                oldest_version=min((t.versions[0] for t in closed.trajectories), default=self.version),
                num_failed=closed.num_failed,
                filtered=closed.group is None,
            )
        )
        self.group_ended()
        if closed.group is None:
            self._source.drop(t.id for t in closed.trajectories)
        else:
            await self._source.on_arrival(closed.trajectories)

    async def _play_member(self, group_id: str, member: int, row: Row) -> None:
        id = f"{group_id}.{member}"
        self.latency.started(id)
        try:
            play = partial(run_episode, self._agent, self._class, row, id=id, group_id=group_id)
            while isinstance(outcome := await play(), Failure) and outcome.begins_again:
                self._source.drop([id])
                self._events.emit(
                    TrajectoryRestarted(
                        version=self.version, trajectory=id, reason=outcome.reason, num_lost_tokens=outcome.num_tokens
                    )
                )
        except asyncio.CancelledError:
            self.latency.ended(id, well=False)
            self._source.drop([id])
            raise
        self.latency.ended(id, well=not isinstance(outcome, Failure))
        if isinstance(outcome, Failure):
            self._source.drop([id])
            self._buffer.fail(group_id)
            self._events.emit(TrajectoryFailed(version=self.version, trajectory=outcome.id, reason=outcome.reason))
        else:
            self._buffer.end(outcome)
        self._failures.count(outcome)


class _Failures:
    """Counts the failures in a row."""

    def __init__(self) -> None:
        self._num_in_a_row = 0

    def count(self, outcome: Trajectory | Failure) -> None:
        """Count an outcome.

        Raises:
            EnvironmentShapeError: The environment is broken.
        """
        self._num_in_a_row = self._num_in_a_row + 1 if isinstance(outcome, Failure) else 0
        if isinstance(outcome, Failure) and self._num_in_a_row >= FAILURES_IN_A_ROW:
            raise EnvironmentShapeError(
                f"{self._num_in_a_row} episodes in a row were ended by the environment",
                got=f"the last: {outcome.reason}",
                allowed="episodes that end by themselves",
                fix="try the environment with `oldlogits play` on its own rows, or raise env.timeout_s",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Rewards of held-out episodes, in the order of their rows; an episode that its environment ended has reward 0."""

    rewards: tuple[float, ...]
    trajectories: tuple[Trajectory, ...]

    @property
    def num_successes(self) -> int:
        """Episodes of reward >= 1."""
        return sum(map(is_success, self.rewards))


async def evaluate(
    agent: Agent,
    environment_class: type[Environment],
    rows: Sequence[Row],
    *,
    name: str,
    temperature: float,
    num_running: int,
    on_progress: Callable[[int], None],
) -> Evaluation:
    """Play one episode per row.

    Args:
        agent: Plays the episodes; its sampling temperature is replaced.
        environment_class: The class of which every episode has an instance.
        rows: The tasks.
        name: The prefix of trajectory ids.
        temperature: The sampling temperature; 0 for greedy decoding.
        num_running: Episodes played at the same time.
        on_progress: Called with the number of episodes that ended.

    Raises:
        EnvironmentShapeError: The environment is broken.
    """
    player = replace(agent, sampling=replace(agent.sampling, temperature=temperature))
    outcomes: list[Trajectory | Failure | None] = [None] * len(rows)
    waiting = iter(range(len(rows)))
    num_ended, failures = 0, _Failures()

    async def work() -> None:
        nonlocal num_ended
        for i in waiting:
            play = partial(run_episode, player, environment_class, rows[i], id=f"{name}.{i}", group_id=name)
            while isinstance(outcome := await play(), Failure) and outcome.begins_again:
                pass
            outcomes[i] = outcome
            failures.count(outcome)
            num_ended += 1
            on_progress(num_ended)

    async with asyncio.TaskGroup() as workers:
        for _ in range(min(num_running, len(rows))):
            workers.create_task(work())
    trajectories = tuple(o for o in outcomes if isinstance(o, Trajectory))
    rewards = tuple(o.reward if isinstance(o, Trajectory) else 0.0 for o in outcomes)
    return Evaluation(rewards=rewards, trajectories=trajectories)
