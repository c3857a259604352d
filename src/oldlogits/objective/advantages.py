"""Advantages from the rewards of a group: trajectories of one task, compared with each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from oldlogits.core.errors import ConfigError
from oldlogits.core.trajectory import TrajectoryGroup

AdvantageMode = Literal["group-normalised", "mean-only", "leave-one-out"]
"""How a reward is compared with those of its group."""

BranchWeight = Literal["each", "shared"]
"""each: every branch has its episode's advantage. shared: they divide it, so that an episode counts once."""


def group_advantages(
    rewards: Float[Tensor, " trajectory"],
    group_index: Int[Tensor, " trajectory"],
    mode: AdvantageMode,
    epsilon: float = 1e-6,
) -> Float[Tensor, " trajectory"]:
    """Give one advantage per trajectory; exactly 0 throughout a group of equal rewards, and in a group of one.

    - "group-normalised": ``(r - mean) / (std + epsilon)``, std with Bessel's correction (n - 1), as in verl and TRL
      (GRPO, arXiv 2402.03300, does not say which).
    - "mean-only": ``r - mean`` (Dr. GRPO, arXiv 2503.20783).
    - "leave-one-out": ``r - mean of the others = n / (n - 1) * (r - mean)`` (RLOO, arXiv 2402.14740).

    Args:
        rewards: Finite rewards.
        group_index: The group of each trajectory: any integers, in any order.
        mode: How a reward is compared with those of its group.
        epsilon: What is added to the standard deviation, in units of reward.

    Raises:
        ConfigError: The mode is unknown.

    Example:
        Rewards 0, 0, 1 of one group: mean 1/3, std 0.577: normalised -0.577, -0.577, 1.155; mean-only -1/3, -1/3,
        2/3; leave-one-out -1/2, -1/2, 1.
    """
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
    if mode == "group-normalised":
        std = (zeros.index_add(0, group, centred.square()) / others).sqrt()
        return centred / (std[group] + epsilon)
    raise ConfigError(
        "unknown advantage mode",
        got=repr(mode),
        allowed="group-normalised, mean-only, leave-one-out",
        fix="choose one of these",
    )


def advantages_of(groups: Sequence[TrajectoryGroup], mode: AdvantageMode, branch_weight: BranchWeight = "each") -> list[float]:
    """Give the advantage of every trajectory, in order: that of its episode, as its branches share it.

    Only differences within a group count: they are taken in float64, in which large rewards that differ stay different.

    Args:
        groups: The groups of a batch.
        mode: How a reward is compared with those of its group.
        branch_weight: What a branch gets of its episode's advantage.

    Example:
        A group of rewards 1e8 and 1e8 + 1, "leave-one-out": -1 and 1. Where the second episode has two branches: -1, 1, 1
        with "each", and -1, 0.5, 0.5 with "shared".
    """
    episodes = [(index, branches) for index, group in enumerate(groups) for branches in group.episodes]
    least = [min(t.reward for t in group.trajectories) for group in groups]
    rewards = torch.tensor([branches[0].reward - least[index] for index, branches in episodes])
    of_episodes: list[float] = group_advantages(rewards, torch.tensor([index for index, _ in episodes]), mode).tolist()
    shares = [len(branches) if branch_weight == "shared" else 1 for _, branches in episodes]
    pairs = zip(of_episodes, shares, episodes, strict=True)
    return [advantage / share for advantage, share, (_, branches) in pairs for _ in branches]
