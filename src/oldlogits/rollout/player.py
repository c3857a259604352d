"""Who plays an episode: the seam between groups of episodes and what an episode is made of.

An environment class is played turn by turn (`ClassPlayer`); an agent program talks to a gateway by itself (`gateway/`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Protocol, Self

from oldlogits.core.environment import Environment, Row
from oldlogits.core.trajectory import Branches
from oldlogits.core.weights import PolicyVersion
from oldlogits.envs.rewards import GroupReward
from oldlogits.record.bus import Event
from oldlogits.rollout.answers import rewards_of_group
from oldlogits.rollout.asked import named
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
        tell: Is given what makes an event, once it knows the trainer's version.
    """

    report: Report = lambda trajectory_id, segments: None
    withdraw: Report = lambda trajectory_id, segments: None
    save: Save | None = None
    drop: Callable[[Iterable[str]], None] = lambda trajectory_ids: None
    tell: Callable[[Callable[[PolicyVersion], Event]], None] = lambda told: None


class Player(Protocol):
    """Plays episodes."""

    goes_on: bool
    """Whether an episode of a run that was ended goes on in its middle; otherwise it begins again."""
    remedy: ClassVar[str] = "try the environment with `oldlogits play` on its own rows, raise env.timeout_s if it is slow"
    """What to do where its episodes fail."""

    async def play(self, row: Row, *, id: str, group_id: str, known: Known | None = None) -> Outcome:
        """Play one episode.

        Args:
            row: The task.
            id: The episode's id, which is that of its first conversation.
            group_id: The id of its group.
            known: What the episode has so far, for a player that `goes_on`.
        """

    async def grade(self, row: Row, episodes: Sequence[Branches]) -> Sequence[float]:
        """Return the rewards of all episodes of a group: by default their own.

        Raises:
            EnvironmentFailed: The group reward raised, or gave something else than a number for each.
        """
        return [branches[0].reward for branches in episodes]

    def watched(self, watch: Watch) -> Self:
        """Return this player with others who follow its episodes."""

    def evaluating(self, temperature: float) -> Self:
        """Return this player for held-out episodes, which are sampled at a temperature."""

    def metrics(self) -> Mapping[str, float]:
        """What it has done since the last call; docs/metrics.md."""
        return {}


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassPlayer(Player):
    """Plays the episodes of an environment class: each has an instance.

    Args:
        agent: Plays the turns.
        environment_class: The class.
        group_reward: Makes the rewards of a group of those that its episodes have; None: these are the rewards.
    """

    agent: Agent
    environment_class: type[Environment]
    group_reward: GroupReward | None = None
    goes_on: bool = True

    async def play(self, row: Row, *, id: str, group_id: str, known: Known | None = None) -> Outcome:
        """Play the turns between agent and environment."""
        outcome = await run_episode(self.agent, self.environment_class, row, id=id, group_id=group_id, known=known)
        return outcome if isinstance(outcome, Failure) else (outcome,)

    async def grade(self, row: Row, episodes: Sequence[Branches]) -> Sequence[float]:
        """Ask the group reward, where there is one."""
        own = [branches[0].reward for branches in episodes]
        if self.group_reward is None or not own:
            return own
        messages = [branches[0].messages for branches in episodes]
        ask = partial(self.group_reward, row=copy.deepcopy(row), messages=messages, rewards=own)
        return rewards_of_group(await named(self.agent.run_environment, "the group reward", ask), len(own))

    def watched(self, watch: Watch) -> Self:
        """Have the turns reported, and their messages kept for the group reward."""
        agent = replace(self.agent, report=watch.report, withdraw=watch.withdraw, save=watch.save)
        return replace(self, agent=replace(agent, keeps_messages=self.group_reward is not None))

    def evaluating(self, temperature: float) -> Self:
        """Sample at the temperature."""
        return replace(self, agent=replace(self.agent, sampling=replace(self.agent.sampling, temperature=temperature)))
