"""The tasks of a recipe: its environment class and the rows that it is given. Imports no torch."""

from __future__ import annotations

from oldlogits.config import RunConfig
from oldlogits.envs.shape import Environment, load_environment
from oldlogits.rollout.tasks import TaskDataset


def load_tasks(config: RunConfig) -> tuple[type[Environment], TaskDataset]:
    """Load the recipe's environment class and its rows.

    Raises:
        ConfigError: There are no rows, or a file holds something else than JSON objects.
        EnvironmentShapeError: The target is no environment.
    """
    environment_class = load_environment(config.env.target)
    dataset = TaskDataset(
        environment_class,
        seed=config.seed,
        train_data=config.env.train_data,
        eval_data=config.env.eval_data,
        needs_heldout=bool(config.eval.num_episodes or config.eval.every),
    )
    return environment_class, dataset
