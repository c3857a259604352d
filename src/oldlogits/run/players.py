"""Who plays the episodes of a recipe: an environment class, or an agent program behind a gateway."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from oldlogits.config.schema import RunConfig
from oldlogits.core.engine import RolloutEngine
from oldlogits.core.environment import Environment, ProgramSource
from oldlogits.envs.rewards import load_group_reward
from oldlogits.models.chat.format import ChatFormat
from oldlogits.rollout.asked import EnvironmentRunner
from oldlogits.rollout.player import ClassPlayer, Player
from oldlogits.run.tasks import environment_of, make_agent


@asynccontextmanager
async def open_player(
    config: RunConfig,
    engine: RolloutEngine,
    run_environment: EnvironmentRunner,
    chat: ChatFormat,
    environment_class: type[Environment],
    log: Path,
) -> AsyncIterator[Player]:
    """Open the player of a recipe.

    Args:
        config: The recipe.
        engine: Samples the turns.
        run_environment: Runs environment code.
        chat: The chat format of the model with the environment's tools.
        environment_class: What `env.target` names, or the class whose instances stand for it here.
        log: A file to which is added what functions of agent programs print.
    """
    env = config.env
    agent = make_agent(env, engine, chat, run_environment, temperature=config.sampling.temperature)
    if not env.is_program:
        group_reward = load_group_reward(environment_of(env), env.group_reward)
        yield ClassPlayer(agent=agent, environment_class=environment_class, group_reward=group_reward)
        return
    from oldlogits.engines.chat_api.formats import ChatFormats
    from oldlogits.engines.chat_api.wishes import Rules
    from oldlogits.rollout.gateway.listener import Gateway
    from oldlogits.rollout.gateway.player import ProgramPlayer
    from oldlogits.rollout.gateway.programs import CommandRunner, Runner
    from oldlogits.rollout.gateway.worker import SpreadRunner, WorkerRunner

    runner: Runner
    if env.command:
        runner = CommandRunner(env.command, timeout_s=env.program_timeout_s, memory_bytes=env.program_memory_bytes)
    else:
        words = env.words if isinstance(environment_of(env), ProgramSource) else (env.program, "")
        workers = [WorkerRunner(*words, log=log, timeout_s=env.program_timeout_s) for _ in range(env.program_processes)]
        runner = SpreadRunner(workers)
    async with Gateway().listening() as gateway:
        try:
            await runner.open()
            yield ProgramPlayer(
                agent=agent,
                formats=ChatFormats(chat.for_tools),
                gateway=gateway,
                program=runner,
                rules=Rules(unmet=env.unmet_wishes),
            )
        finally:
            await runner.close()
