"""What a run learns, and what of its recipe the loop itself goes by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from oldlogits.config.episodes import EvalConfig, RolloutConfig
from oldlogits.config.objective.sections import ObjectiveConfig
from oldlogits.config.schema import RecordConfig, RunConfig
from oldlogits.rollout.player import Player
from oldlogits.rollout.tasks import TaskDataset

CHECKED_EVERY: Final = 16
"""Of the trajectories whose OLD the training forward gives, one in so many is scored all the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What is learned: who plays the episodes, their rows, and the fixed prompt of the probe."""

    player: Player
    rows: TaskDataset
    probe_ids: Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopConfig:
    """What the loop goes by: sections of the recipe, and decisions as values.

    Args:
        seed: The run's seed.
        num_updates: The version at which the run ends.
        temperature: The temperature that training samples at.
        max_lag: The staleness that admission allows for: `max_staleness`, or less where the runtime controls the lag.
        minibatches: Optimizer steps of an update.
        checked_every: The training forward gives OLD of the tokens of its own version, and of so many of their trajectories
            one is scored all the same; 0: all are scored.
        keeps_all_versions: Whether the store keeps every version in flight, whatever the source needs.
        bytes_per_parameter: Bytes of a parameter of a version.
    """

    seed: int
    num_updates: int
    temperature: float
    max_lag: int
    minibatches: int
    objective: ObjectiveConfig
    checked_every: int
    keeps_all_versions: bool
    bytes_per_parameter: int
    rollout: RolloutConfig
    eval: EvalConfig
    record: RecordConfig

    @classmethod
    def of(cls, config: RunConfig) -> LoopConfig:
        """Take the values from a recipe."""
        return cls(
            seed=config.seed,
            num_updates=config.num_updates,
            temperature=config.sampling.temperature,
            max_lag=config.window,
            minibatches=config.trainer.minibatches_per_update,
            objective=config.objective,
            checked_every=CHECKED_EVERY if config.takes_training_forward else 0,
            keeps_all_versions=config.audit.share > 0,
            bytes_per_parameter=2 if config.model.forward_dtype == "bf16" else 4,
            rollout=config.rollout,
            eval=config.eval,
            record=config.record,
        )
