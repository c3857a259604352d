"""Held-out evaluation: one episode for each row, and an outcome of each."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from oldlogits.core.environment import Row
from oldlogits.core.trajectory import Branches, is_success
from oldlogits.rollout.groups import is_lost
from oldlogits.rollout.player import Outcome, Player
from oldlogits.rollout.turns import Failure


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What came of held-out episodes, in the order of their rows: its trajectories, or its failure."""

    outcomes: tuple[Outcome, ...]
    success_at: float

    @property
    def rewards(self) -> tuple[float | None, ...]:
        """The reward of every row; None where its episode failed."""
        return tuple(None if isinstance(o, Failure) else o[0].reward for o in self.outcomes)

    @property
    def episodes(self) -> tuple[Branches, ...]:
        """Those that were played."""
        return tuple(o for o in self.outcomes if not isinstance(o, Failure))

    @property
    def num_successes(self) -> int:
        """Episodes of at least the reward of a success."""
        return sum(is_success(branches[0].reward, self.success_at) for branches in self.episodes)


async def evaluate(
    player: Player,
    rows: Sequence[Row],
    *,
    name: str,
    num_running: int,
    tell: Callable[[Outcome], None],
    success_at: float = 1.0,
) -> Evaluation:
    """Play one episode per row.

    Args:
        player: Plays the episodes, as `Player.evaluating` gives it.
        rows: The tasks.
        name: The prefix of trajectory ids.
        num_running: Episodes played at the same time.
        tell: Is given every outcome as it is there: one for each row, and those of episodes that begin again.
        success_at: The reward from which an episode counts as a success.
    """
    outcomes: dict[int, Outcome] = {}
    waiting = iter(range(len(rows)))

    async def work() -> None:
        for i in waiting:
            id = f"{name}.{i}"
            while is_lost(outcome := await player.play(rows[i], id=id, group_id=name)):
                tell(outcome)
            outcomes[i] = outcome
            tell(outcome)

    async with asyncio.TaskGroup() as workers:
        for _ in range(min(num_running, len(rows))):
            workers.create_task(work())
    for i in range(len(rows)):  # a task group takes a task that was cancelled from inside for one that is done
        if i not in outcomes:
            outcomes[i] = Failure(id=f"{name}.{i}", group_id=name, reason="not played: its task was cancelled")
            tell(outcomes[i])
    return Evaluation(outcomes=tuple(outcomes[i] for i in range(len(rows))), success_at=success_at)
