"""The engine of runtime "local": a process of the run, or servers over HTTP."""

from __future__ import annotations

import asyncio
import importlib.util
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from oldlogits.config import RunConfig
from oldlogits.core.engine import RolloutEngine
from oldlogits.core.errors import ConfigError
from oldlogits.engines.spec import EngineStats, Incident

if TYPE_CHECKING:
    from oldlogits.engines.http.servers import Host


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenEngine:
    """An engine that is being started.

    Args:
        engine: Samples, once `ready` has returned.
        stats: Its counters.
        ready: Waits until it can be used.
        supervise: Runs beside it, where it must be watched; ends only by an error.
        listen: Takes who wants to know what happens to servers.
    """

    engine: RolloutEngine
    stats: Callable[[], Awaitable[EngineStats]]
    ready: Callable[[], Awaitable[None]]
    supervise: Callable[[], Coroutine[None, None, None]] | None
    listen: Callable[[Callable[[Incident], None]], None]


@asynccontextmanager
async def open_servers(config: RunConfig, model_folder: Path, seed: int, log_folder: Path) -> AsyncIterator[OpenEngine]:
    """Servers over HTTP: those of the recipe, or started here; on leaving none of the latter stays behind.

    Raises:
        ConfigError: What it needs is not installed, or not set.
    """
    if importlib.util.find_spec("aiohttp") is None:
        raise ConfigError(
            "engine.type = 'vllm' needs a package that is not installed",
            got="no aiohttp",
            allowed="the extra 'vllm'",
            fix="pip install 'oldlogits[vllm]'",
        )
    from oldlogits.engines.http.engine import HttpEngine
    from oldlogits.engines.http.servers import Timeouts

    e = config.engine
    patience = Timeouts(
        recover_s=e.recover_s,
        request_s=e.request_timeout_s,
        control_s=e.control_timeout_s,
        start_s=e.start_timeout_s,
        max_restarts=e.max_restarts,
    )
    hosts = _attached(config) if e.urls else _started(config, model_folder, seed, log_folder)
    engine = HttpEngine(
        hosts,
        max_context=config.env.max_episode_tokens,
        numerics=e.precision,
        adapter_scale=config.model.adapter_scale,
        patience=patience,
    )

    def listen(hear: Callable[[Incident], None]) -> None:
        engine.fleet.listen = hear

    try:
        yield OpenEngine(engine=engine, stats=engine.stats, ready=engine.start, supervise=engine.fleet.supervise, listen=listen)
    finally:
        await asyncio.shield(engine.close())


def _attached(config: RunConfig) -> list[Host]:
    from oldlogits.engines.http.client import Server
    from oldlogits.engines.http.servers import Host

    name = config.engine.token_env
    if name and not os.environ.get(name):
        raise ConfigError(
            "the environment variable of engine.token_env is not set", got=f"no {name}", allowed="a token", fix=f"export {name}"
        )
    token, timeout_s = os.environ.get(name, "") if name else "", config.engine.control_timeout_s
    return [Host(server=Server(url, token=token, control_timeout_s=timeout_s)) for url in config.engine.urls]


def _started(config: RunConfig, model_folder: Path, seed: int, log_folder: Path) -> list[Host]:
    from oldlogits.engines.http.client import Server
    from oldlogits.engines.http.launch import Launched, LaunchSpec
    from oldlogits.engines.http.servers import Host

    e = config.engine
    needed = "vllm" if e.server == "vllm" else "uvicorn"
    if not e.python and importlib.util.find_spec(needed) is None:
        raise ConfigError(
            f"the run is to start a server, and {needed} is not installed",
            got="engine.type = 'vllm' without engine.urls",
            allowed=f"{needed} in this environment, or in that of engine.python; or running servers in engine.urls",
            fix="install vLLM and set engine.python to its interpreter, or start `oldlogits serve MODEL` and set engine.urls",
        )
    hosts: list[Host] = []
    try:
        for number in range(e.num_servers):
            spec = LaunchSpec(
                server=e.server,
                model_path=str(model_folder.resolve()),
                numerics=e.precision,
                max_num_seqs=e.max_num_seqs,
                max_context=config.env.max_episode_tokens,
                flags=e.flags,
                python=e.python,
                log_folder=log_folder,
                seed=seed + number,
                adapter_scale=config.model.adapter_scale,
            )
            launched = Launched(spec, f"server-{number}")
            server = Server(launched.url, token=launched.token, control_timeout_s=e.control_timeout_s)
            hosts.append(Host(server=server, launched=launched))
    except BaseException:
        for host in hosts:
            assert host.launched is not None
            host.launched.close()
        raise
    return hosts
