"""Who plays an episode: the seam between groups of episodes and what an episode is made of.

An environment class is played turn by turn (`ClassPlayer`); an agent program talks to a gateway by itself (`gateway/`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol, Self

from oldlogits.core.environment import Environment, Row
from oldlogits.core.trajectory import Branches
from oldlogits.rollout.turns import Agent, Failure, Known, Report, Save, run_episode

Outcome = Branches | Failure
"""What comes of an episode: its trajectories, or why it failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """Who follows the episodes of a player as they grow.

    Args:
        report: Is told of a trajectory that grew.
        withdraw: Is told of a trajectory whose running turn was given up.
        save: Is told of the state of an environment that can be saved.
        drop: Is told of trajectories that come to nothing.
        rewritten: Is told of a conversation that goes on with other messages than were read: the trajectory, the number and
            the role of the first message that differs, and the tokens that were encoded anew.
    """

    report: Report = lambda trajectory_id, segments: None
    withdraw: Report = lambda trajectory_id, segments: None
    save: Save | None = None
    drop: Callable[[Iterable[str]], None] = lambda trajectory_ids: None
    rewritten: Callable[[str, int, str, int], None] = lambda trajectory_id, message, role, num_tokens: None


class Player(Protocol):
    """Plays episodes."""

    goes_on: bool
    """Whether an episode of a run that was ended goes on in its middle; otherwise it begins again."""

    async def play(self, row: Row, *, id: str, group_id: str, known: Known | None = None) -> Outcome:
        """Play one episode.

        Args:
            row: The task.
            id: The episode's id, which is that of its first trajectory.
            group_id: The id of its group.
            known: What the episode has so far, for a player that `goes_on`.
        """

    def watched(self, watch: Watch) -> Self:
        """Return this player with others who follow its episodes."""

    def evaluating(self, temperature: float) -> Self:
        """Return this player for held-out episodes, which are sampled at a temperature."""

    def metrics(self) -> Mapping[str, float]:
        """What it has done since the last call; docs/metrics.md."""
        return {}


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassPlayer(Player):
    """Plays the episodes of an environment class: each has an instance."""

    agent: Agent
    environment_class: type[Environment]
    goes_on: bool = True

    async def play(self, row: Row, *, id: str, group_id: str, known: Known | None = None) -> Outcome:
        """Play the turns between agent and environment."""
        outcome = await run_episode(self.agent, self.environment_class, row, id=id, group_id=group_id, known=known)
        return outcome if isinstance(outcome, Failure) else (outcome,)

    def watched(self, watch: Watch) -> Self:
        """Have the turns reported."""
        return replace(self, agent=replace(self.agent, report=watch.report, withdraw=watch.withdraw, save=watch.save))

    def evaluating(self, temperature: float) -> Self:
        """Sample at the temperature."""
        return replace(self, agent=replace(self.agent, sampling=replace(self.agent.sampling, temperature=temperature)))
