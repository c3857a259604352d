"""Trajectories: what an agent saw and said, token by token, each sampled token with its version.

A trajectory alternates `Context` (prompt, tool results, user turns: not sampled, no log-prob, no version) and
`Sampled` segments of exactly one version each. A weight update in mid-turn starts a new segment.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Literal

from oldlogits.core.errors import TrajectoryError

KV = Literal["fresh", "mixed"]
"""Whether every attended key and value was computed with the token's own version.

"mixed": over the entries that the trajectory's sampled tokens before it attended to and added, and those of the tokens read
since, which its own version computed (batch/kv_segments.py)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """Tokens that the agent read, at least one: prompt, tool result, user turn."""

    token_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        _check(bool(self.token_ids), "a context segment is empty", "0 tokens", "at least one token", "leave the segment out")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """Tokens that the engine sampled with one version of the weights.

    Args:
        logp_mu: Natural-log probability of each under the distribution it was sampled from (logits / temperature).
        kv: "mixed" when keys and values of older versions were attended to: those of the sampled segments before it.
        temperature: The sampling temperature, > 0.
    """

    token_ids: tuple[int, ...]
    logp_mu: tuple[float, ...]
    version: int
    kv: KV = "fresh"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        _check(bool(self.token_ids), "a sampled segment is empty", "0 tokens", "at least one token", "leave the segment out")
        _check(
            len(self.token_ids) == len(self.logp_mu),
            "every sampled token needs its log-prob",
            f"{len(self.token_ids)} tokens and {len(self.logp_mu)} log-probs",
            "as many log-probs as tokens",
            "ask the engine for the log-probs of the tokens that it samples",
        )
        _check(self.version >= 0, "a version counts from 0", str(self.version), ">= 0", "tag tokens with their version")
        _check(
            math.isfinite(self.temperature) and self.temperature > 0,
            "the temperature of a sampled segment must be positive",
            str(self.temperature),
            "> 0",
            "greedy decoding is for evaluation; it has no log-prob to train on",
        )
        above = [logp for logp in self.logp_mu if logp > 1e-4]
        _check(not above, "a log-prob is above 0", str(above), "<= 0 (or NaN, counted later)", "pass log-probs")


Segment = Context | Sampled


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """One sequence of tokens of an agent's episode; `group_id` names those of the same task, which are compared.

    Most episodes are one trajectory. An agent program may hold several conversations in one episode, its branches: they have
    the same reward, and their ids are ``g000012.3``, ``g000012.3#1``, ``g000012.3#2``, ...

    Args:
        segments: In the order of the tokens; versions never decrease.
        stop_reason: Why the episode ended: "done", "max_turns", "max_tokens", ...
        turn_rewards: What the environment gave for each turn, where it does; `reward` is the sum of all.
        messages: The messages after the first prompt, ``{"role": ..., "content": ...}`` each, where a group reward reads them.
    """

    id: str
    group_id: str
    segments: tuple[Segment, ...]
    reward: float
    stop_reason: str
    turn_rewards: tuple[float, ...] = ()
    messages: tuple[Mapping[str, str], ...] = ()

    def __post_init__(self) -> None:
        starts_with_context = bool(self.segments) and isinstance(self.segments[0], Context)
        _check(
            starts_with_context,
            f"trajectory {self.id} does not start with its prompt",
            "no leading context",
            "a Context",
            "put the prompt first",
        )
        versions = [segment.version for segment in self.sampled]
        _check(bool(versions), f"trajectory {self.id} has no sampled token", "only context", "one Sampled segment", "drop it")
        _check(
            versions == sorted(versions),
            f"versions of trajectory {self.id} decrease",
            str(versions),
            "non-decreasing versions",
            "an engine never goes back to an older version in a sequence",
        )
        _check(
            math.isfinite(self.reward),
            f"the reward of trajectory {self.id} is not finite",
            str(self.reward),
            "a finite number",
            "check get_reward()",
        )

    @property
    def episode_id(self) -> str:
        """The episode of which it is a branch."""
        return episode_of(self.id)

    @property
    def sampled(self) -> Iterator[Sampled]:
        """The sampled segments in order."""
        return (segment for segment in self.segments if isinstance(segment, Sampled))

    @property
    def num_tokens(self) -> int:
        """All tokens, context included."""
        return sum(len(segment.token_ids) for segment in self.segments)

    @property
    def num_sampled(self) -> int:
        """Sampled tokens: those that the loss sees."""
        return sum(len(segment.token_ids) for segment in self.sampled)

    @property
    def num_turns(self) -> int:
        """The agent's turns: a sampled segment after context begins one."""
        return sum(isinstance(b, Sampled) and isinstance(a, Context) for a, b in pairwise(self.segments))

    @property
    def versions(self) -> tuple[int, ...]:
        """The distinct versions that sampled it, ascending."""
        return tuple(sorted({segment.version for segment in self.sampled}))


Branches = tuple[Trajectory, ...]
"""All branches of one episode that ended well, at least one."""


def episode_of(trajectory_id: str) -> str:
    """The episode of a trajectory, such as ``g000012.3`` of its branch ``g000012.3#1``."""
    return trajectory_id.partition("#")[0]


def branch_id(episode_id: str, number: int) -> str:
    """The id of a branch of an episode, counted from 0."""
    return f"{episode_id}#{number}" if number else episode_id


def is_success(reward: float, success_at: float) -> bool:
    """Whether an episode of this reward succeeded, by `eval.success_at`."""
    return reward >= success_at


@dataclass(frozen=True, slots=True, kw_only=True)
class TrajectoryGroup:
    """Episodes of one task, whose rewards are compared with each other: all their trajectories, branch after branch."""

    id: str
    trajectories: tuple[Trajectory, ...]

    def __post_init__(self) -> None:
        _check(bool(self.trajectories), f"group {self.id} is empty", "0 trajectories", "at least one", "drop the group")
        strangers = [t.id for t in self.trajectories if t.group_id != self.id]
        _check(
            not strangers,
            f"group {self.id} has members of other groups",
            str(strangers),
            "its own members",
            "group by group_id",
        )

    @property
    def episodes(self) -> tuple[Branches, ...]:
        """Its trajectories by episode."""
        return tuple(tuple(branches) for _, branches in groupby(self.trajectories, key=lambda t: t.episode_id))

    @property
    def oldest_version(self) -> int:
        """The version of its oldest sampled token: what the staleness bound counts from."""
        return min(trajectory.versions[0] for trajectory in self.trajectories)


def _check(holds: bool, what: str, got: str, allowed: str, fix: str) -> None:
    if not holds:
        raise TrajectoryError(what, got=got, allowed=allowed, fix=fix)
