"""What a run learns, and the values of its recipe that the loop itself works with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from oldlogits.config import RunConfig
from oldlogits.core.environment import Environment
from oldlogits.objective.advantages import AdvantageMode
from oldlogits.rollout.tasks import TaskDataset
from oldlogits.rollout.turns import Agent


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What is learned: the environment, its rows, the agent that plays it, and the fixed prompt of the probe."""

    environment_class: type[Environment]
    rows: TaskDataset
    agent: Agent
    probe_ids: Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopConfig:
    """The values that the loop works with; `oldlogits show recipe` explains those that a recipe names.

    Args:
        max_lag: The staleness that admission allows for: `max_staleness`, or less where the runtime controls the lag.
        max_running_groups: Groups sampled at the same time; 0: as many as are admitted.
        keeps_all_versions: Whether the store keeps every version in flight, whatever the source needs.
        bytes_per_parameter: Bytes of a parameter of a version.
        num_eval: Episodes of the evaluations before and after training.
        eval_every: Updates between two evaluations; 0: none.
        checkpoint_every: Updates between two checkpoints; 0: only at the end.
    """

    num_updates: int
    max_lag: int
    prompts_per_update: int
    group_size: int
    max_running_groups: int
    filter_uniform: bool
    minibatches: int
    advantage: AdvantageMode
    keeps_all_versions: bool
    bytes_per_parameter: int
    num_eval: int
    num_eval_during: int
    eval_every: int
    eval_concurrent: int
    checkpoint_every: int

    @classmethod
    def of(cls, config: RunConfig) -> LoopConfig:
        """Take the values from a recipe."""
        return cls(
            num_updates=config.num_updates,
            max_lag=config.window,
            prompts_per_update=config.rollout.prompts_per_update,
            group_size=config.rollout.group_size,
            max_running_groups=config.rollout.running_limit,
            filter_uniform=config.rollout.filter_uniform,
            minibatches=config.trainer.minibatches_per_update,
            advantage=config.objective.advantage,
            keeps_all_versions=config.audit.share > 0,
            bytes_per_parameter=2 if config.model.forward_dtype == "bf16" else 4,
            num_eval=config.eval.num_episodes,
            num_eval_during=config.eval.num_episodes_during,
            eval_every=config.eval.every,
            eval_concurrent=config.eval.max_concurrent,
            checkpoint_every=config.record.checkpoint_every,
        )
