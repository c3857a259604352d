"""What a recipe asks of its engine, as the values that engines are given. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from oldlogits.config.schema import RunConfig
from oldlogits.core.engine import EngineSpec, ServerOptions, Timeouts


def engine_spec(config: RunConfig, model_folder: Path, *, seed: int = 0) -> EngineSpec:
    """The engine that a recipe wants over a model folder."""
    return EngineSpec(
        model_path=str(model_folder),
        numerics=config.engine.precision,
        max_num_seqs=config.engine.max_num_seqs,
        max_context=config.env.max_episode_tokens,
        seed=seed,
        adapter_scale=config.model.adapter_scale,
    )


def server_options(config: RunConfig, log_folder: Path = Path()) -> ServerOptions:
    """What a recipe says of servers, whose messages go to `log_folder`."""
    e = config.engine
    return ServerOptions(
        protocol=e.server,
        urls=e.urls,
        token_env=e.token_env,
        num_servers=e.num_servers,
        flags=e.flags,
        python=e.python,
        log_folder=log_folder,
        timeouts=Timeouts(
            recover_s=e.recover_s,
            request_s=e.request_timeout_s,
            control_s=e.control_timeout_s,
            start_s=e.start_timeout_s,
            max_restarts=e.max_restarts,
        ),
    )
