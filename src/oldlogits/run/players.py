"""Who plays the episodes of a recipe: an environment class, or an agent program behind a gateway."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from oldlogits.config.schema import RunConfig
from oldlogits.core.environment import PROGRAMS, Environment, ProgramSource
from oldlogits.loop.backend import Backend
from oldlogits.models.chat.format import ChatFormat
from oldlogits.rollout.player import ClassPlayer, Player
from oldlogits.run.tasks import make_agent


@asynccontextmanager
async def open_player(
    config: RunConfig, backend: Backend, chat: ChatFormat, environment_class: type[Environment]
) -> AsyncIterator[Player]:
    """Open the player of a recipe.

    Args:
        config: The recipe.
        backend: Supplies the engine, and runs environment code.
        chat: The chat format of the model with the environment's tools.
        environment_class: What `env.target` names.
    """
    env = config.env
    agent = make_agent(env, backend.engine, chat, backend.run_environment, temperature=config.sampling.temperature)
    if not env.is_program:
        yield ClassPlayer(agent=agent, environment_class=backend.host_environment(environment_class))
        return
    from oldlogits.rollout.gateway.formats import ChatFormats
    from oldlogits.rollout.gateway.listener import Gateway
    from oldlogits.rollout.gateway.player import ProgramPlayer
    from oldlogits.rollout.gateway.programs import CommandRunner, FunctionRunner, Runner
    from oldlogits.rollout.gateway.wishes import Rules

    runner: Runner
    if env.command:
        runner = CommandRunner(env.command, timeout_s=env.program_timeout_s, memory_bytes=env.program_memory_bytes)
    else:
        own: object = environment_class
        program = own.program if isinstance(own, ProgramSource) else PROGRAMS.find(env.program)
        runner = FunctionRunner(program, timeout_s=env.program_timeout_s)
    async with Gateway().listening() as gateway, runner.opened():
        yield ProgramPlayer(
            agent=agent,
            formats=ChatFormats(chat.with_tools),
            gateway=gateway,
            program=runner,
            rules=Rules(unmet=env.unmet_wishes),
        )
