"""Advantages from the rewards of a group: trajectories of one task, compared with each other, or with the whole batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Final, Literal

import torch
from torch import Tensor

from oldlogits.core.errors import ConfigError
from oldlogits.core.objective.shapes import Float, Int
from oldlogits.core.trajectory import Context, Trajectory, TrajectoryGroup

AdvantageMode = Literal[
    "group-normalised", "mean-only", "leave-one-out", "batch-normalised", "token-normalised", "batch-baseline", "turn-to-go"
]
"""How a reward is compared with those of its group, or of the batch."""

OVER_BATCH: Final = ("batch-normalised", "token-normalised", "batch-baseline")
"""The modes that read rewards of all groups, in float64."""

BranchWeight = Literal["each", "shared"]
"""each: every branch has its episode's advantage. shared: they divide it, so that an episode counts once."""


def group_advantages(
    rewards: Float[Tensor, " trajectory"],
    group_index: Int[Tensor, " trajectory"],
    mode: AdvantageMode,
    epsilon: float = 1e-6,
    num_tokens: Int[Tensor, " trajectory"] | None = None,
) -> Float[Tensor, " trajectory"]:
    """Give one advantage per trajectory; exactly 0 throughout a batch of equal rewards.

    In the first three modes it is exactly 0 throughout a group of equal rewards, and in a group of one.

    - "group-normalised": ``(r - mean) / (std + epsilon)``, std with Bessel's correction (n - 1), as in verl and TRL
      (GRPO, arXiv 2402.03300, does not say which).
    - "mean-only": ``r - mean`` (Dr. GRPO, arXiv 2503.20783).
    - "leave-one-out": ``r - mean of the others = n / (n - 1) * (r - mean)`` (RLOO, arXiv 2402.14740).
    - "batch-normalised": ``(r - mean of the group) / (std + epsilon)``, std that of the numerators over the batch, with
      Bessel's correction (arXiv 2508.08221; REINFORCE++-baseline, arXiv 2501.03262). A group of one has 0.
    - "token-normalised": ``(x - m) / (s + epsilon)`` of the same numerators x, m and s over the *tokens* of the batch,
      each of which has its episode's x: the measure of a token-mean of the loss, under which they then have mean 0 and
      variance 1. So verl whitens for REINFORCE++, and SPO++ argues (arXiv 2608.24870).
    - "batch-baseline": ``(r - mean of the batch) / (std of the batch + epsilon)``, with Bessel's correction: REINFORCE++
      without groups (arXiv 2501.03262), for tasks that are played once.
    - "turn-to-go": as "mean-only"; the advantages of turns are those of `turn_advantages_of`.

    Args:
        rewards: Finite rewards.
        group_index: The group of each trajectory: any integers, in any order.
        mode: How a reward is compared with those of its group.
        epsilon: What is added to the standard deviation, in units of reward.
        num_tokens: The loss tokens of each trajectory, which "token-normalised" needs.

    Raises:
        ConfigError: The mode is unknown, or it needs numbers of tokens and has none.

    Example:
        Rewards 0, 0, 1 of one group: mean 1/3, std 0.577: normalised -0.577, -0.577, 1.155; mean-only -1/3, -1/3,
        2/3; leave-one-out -1/2, -1/2, 1.
    """
    mode = "mean-only" if mode == "turn-to-go" else mode
    if mode == "batch-baseline":
        group_index = torch.zeros_like(group_index)
    groups, group = torch.unique(group_index, return_inverse=True)
    zeros = torch.zeros(groups.numel(), dtype=rewards.dtype, device=rewards.device)
    size = zeros.index_add(0, group, torch.ones_like(rewards))
    # Measured from the group's smallest reward, equal rewards are exact zeros and stay so.
    above_least = rewards - zeros.scatter_reduce(0, group, rewards, "amin", include_self=False)[group]
    centred = above_least - (zeros.index_add(0, group, above_least) / size)[group]
    others = (size - 1).clamp(min=1)
    if mode == "mean-only":
        return centred
    if mode == "leave-one-out":
        return centred * (size / others)[group]
    if mode in ("batch-normalised", "batch-baseline"):
        return centred / (_std(centred, torch.ones_like(centred)) + epsilon)
    if mode == "token-normalised" and num_tokens is not None:
        weight = num_tokens.to(centred.dtype)
        away = centred - (centred * weight).sum() / weight.sum().clamp(min=1)
        away = torch.where((centred == 0).all(), 0.0, away)
        return away / (_std(away, weight) + epsilon)
    if mode == "group-normalised":
        std = (zeros.index_add(0, group, centred.square()) / others).sqrt()
        return centred / (std[group] + epsilon)
    raise ConfigError(
        "unknown advantage mode, or one that needs num_tokens",
        got=repr(mode),
        allowed="group-normalised, mean-only, leave-one-out, batch-normalised, token-normalised, batch-baseline",
        fix="choose one of these; pass num_tokens with token-normalised",
    )


def _std(values: Tensor, weight: Tensor) -> Tensor:
    """Give the standard deviation of centred values that count `weight` times each, with Bessel's correction; 0 of one."""
    return ((values.square() * weight).sum() / (weight.sum() - 1).clamp(min=1)).sqrt()


def advantages_of(
    groups: Sequence[TrajectoryGroup],
    mode: AdvantageMode,
    branch_weight: BranchWeight = "each",
    penalties: Sequence[float] | None = None,
) -> list[float]:
    """Give the advantage of every trajectory, in order: that of its episode, as its branches share it.

    Only differences count: they are taken in float64, in which large rewards that differ stay different.

    Args:
        groups: The groups of a batch.
        mode: How a reward is compared with those of its group.
        branch_weight: What a branch gets of its episode's advantage.
        penalties: What each trajectory takes off its episode's reward; None: nothing.

    Example:
        A group of rewards 1e8 and 1e8 + 1, "leave-one-out": -1 and 1. Where the second episode has two branches: -1, 1, 1
        with "each", and -1, 0.5, 0.5 with "shared".
    """
    episodes = [(index, branches) for index, group in enumerate(groups) for branches in group.episodes]
    rewards = [branches[0].reward for _, branches in episodes]
    if penalties is not None:
        rest = iter(penalties)
        rewards = [r - sum(next(rest) for _ in branches) for r, (_, branches) in zip(rewards, episodes, strict=True)]
    index = [index for index, _ in episodes]
    dtype = torch.float64 if mode in OVER_BATCH else torch.float32
    least = [min(r for r, of in zip(rewards, index, strict=True) if of == group) for group in range(len(groups))]
    least = [min(least)] * len(least) if mode in OVER_BATCH else least
    above = torch.tensor([r - least[of] for r, of in zip(rewards, index, strict=True)], dtype=dtype)
    num_tokens = torch.tensor([sum(t.num_sampled for t in branches) for _, branches in episodes])
    of_episodes: list[float] = group_advantages(above, torch.tensor(index), mode, num_tokens=num_tokens).tolist()
    shares = [len(branches) if branch_weight == "shared" else 1 for _, branches in episodes]
    pairs = zip(of_episodes, shares, episodes, strict=True)
    return [advantage / share for advantage, share, (_, branches) in pairs for _ in branches]


def turn_advantages_of(groups: Sequence[TrajectoryGroup]) -> list[float]:
    """Give the advantage of every sampled token, in the order of a batch: that of its turn's return-to-go, in float64.

    The return-to-go of turn k is what the episode was given from that turn on, ``G_k = reward - sum of the rewards of turns
    before k``, the reward of its end included; the advantage is ``G_k`` less its mean over the group's trajectories that have a
    turn k. That mean depends on nothing that turn k or a later one does, but for the episode's own share in it, as in
    "mean-only". Without rewards of turns every ``G_k`` is the reward. It is exactly 0 where all of them are equal.

    Example:
        Two episodes of two turns, rewards of turns 1, 0 and 0, 2, none at the end: G is 1, 0 and 2, 2, so that the advantages
        of their turns are -1/2, -1 and 1/2, 1.
    """
    found: list[float] = []
    for group in groups:
        returns = [_returns_to_go(trajectory) for trajectory in group.trajectories]
        for trajectory, own in zip(group.trajectories, returns, strict=True):
            turn = -1
            for before, segment in pairwise(trajectory.segments):
                if isinstance(segment, Context):
                    continue
                turn += isinstance(before, Context)
                others = [one[turn] for one in returns if turn < len(one)]
                least = min(others)
                above = own[turn] - least - sum(other - least for other in others) / len(others)
                found += [above] * len(segment.token_ids)
    return found


def _returns_to_go(trajectory: Trajectory) -> list[float]:
    """Give what the episode was given from each turn of a trajectory on; a turn that was not answered was given nothing."""
    rewards = trajectory.turn_rewards
    return [trajectory.reward - math.fsum(rewards[:turn]) for turn in range(trajectory.num_turns)]
