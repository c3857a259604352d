"""The tasks of a recipe: its environment class, the rows that it is given, and who plays them. Imports no torch."""

from __future__ import annotations

from oldlogits.config.episodes import EnvConfig
from oldlogits.config.mixture import MixturePart
from oldlogits.config.schema import RunConfig
from oldlogits.core.engine import RolloutEngine, Sampling
from oldlogits.core.environment import MODELS, Demonstrated, DescribedModel, Environment, is_model_folder
from oldlogits.core.errors import ConfigError
from oldlogits.core.parser import PARSERS, make_parser
from oldlogits.envs.base import load_environment, named_parts
from oldlogits.envs.delegate import players_of
from oldlogits.envs.rewards import load_group_reward
from oldlogits.models.chat.format import ChatFormat
from oldlogits.rollout.asked import EnvironmentRunner
from oldlogits.rollout.tasks import MixedRows, MixtureDataset, TaskDataset
from oldlogits.rollout.turns import Agent, TurnLimits


def load_tasks(config: RunConfig) -> tuple[type[Environment], TaskDataset]:
    """Load the recipe's environment class and its rows, and check that parser and model fit the environment.

    Raises:
        ConfigError: There are no rows, a file holds something else than JSON objects, or the parser or the starting model does
            not exist or does not fit.
        EnvironmentShapeError: The target is no environment.
    """
    PARSERS.find(config.env.parser)
    environment_class = environment_of(config.env)
    load_group_reward(environment_class, config.env.group_reward)
    _check_model(config, environment_class)
    needs_heldout = bool(config.eval.num_episodes or config.eval.every)
    return environment_class, rows_of(config.env, environment_class, seed=config.seed, needs_heldout=needs_heldout)


def environment_of(env: EnvConfig) -> type[Environment]:
    """Load the environment class of a recipe."""
    return load_environment(*env.words, env.reward, env.mixture)


def rows_of(env: EnvConfig, environment_class: type[Environment], *, seed: int, needs_heldout: bool) -> TaskDataset:
    """Return the rows of a recipe, those of a mixture from all of its environments."""

    def rows(part: EnvConfig | MixturePart, cls: type[Environment]) -> TaskDataset:
        return TaskDataset(
            cls,
            seed=seed,
            train_data=part.train_data,
            eval_data=part.eval_data,
            needs_heldout=needs_heldout,
            any_row=env.is_program,
        )

    if not env.mixture:
        return rows(env, environment_class)
    classes, parts = players_of(environment_class), named_parts(env.mixture)
    mixed = {name: MixedRows(rows=rows(part, classes[name]), weight=part.weight) for name, part in parts.items()}
    return MixtureDataset(mixed, seed=seed)


def make_agent(
    env: EnvConfig, engine: RolloutEngine, chat: ChatFormat, run_environment: EnvironmentRunner, *, temperature: float
) -> Agent:
    """Return the agent that plays under the parser and the limits of `env`."""
    return Agent(
        engine=engine,
        chat=chat,
        parser=make_parser(env.parser, chat.tokenizer),
        limits=TurnLimits(
            max_turns=env.max_turns, max_tokens_per_turn=env.max_tokens_per_turn, max_tokens=env.max_episode_tokens
        ),
        sampling=Sampling(max_tokens=env.max_tokens_per_turn, temperature=temperature),
        run_environment=run_environment,
        tool_errors=env.tool_errors,
    )


def _check_model(config: RunConfig, environment_class: type[Environment]) -> None:
    """Refuse a model that does not know the environment's words, and a warm start without demonstrations."""
    m, played = config.model, list(players_of(environment_class).values())
    begun = is_model_folder(m.path)
    for cls in played if m.warm_start_steps not in ("auto", 0) and (begun or len(played) > 1) else ():
        if not isinstance(cls, Demonstrated):
            target = "a table of env.mixture" if config.env.mixture else f"env.target = '{config.env.target}'"
            raise ConfigError(
                f"the environment {cls.__name__} has no demonstrations",
                got=f"model.warm_start_steps = {m.warm_start_steps}, {target}",
                allowed="0 with this environment, or an environment class with a static method warm_start(order)",
                fix="remove model.warm_start_steps, and begin with a model that was trained on such demonstrations",
            )
    if begun:
        return
    model = MODELS.find(m.path)
    if isinstance(model, DescribedModel) and not all(issubclass(cls, model.only_environment) for cls in played):
        raise ConfigError(
            f"the model '{m.path}' knows only the words of {model.only_environment.__name__}",
            got=f"model.path = '{m.path}', env.target = '{config.env.target}'",
            allowed="model.path = FOLDER with this environment",
            fix="set model.path to a Hugging Face folder whose tokenizer has a chat template, or to smollm2 (93 MB)",
        )
