"""The engine of a backend whose engine runs beside it: a process of the run, or servers over HTTP."""

from __future__ import annotations

import asyncio
import importlib.util
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from oldlogits.config.schema import EngineConfig
from oldlogits.core.engine import RolloutEngine
from oldlogits.core.errors import ConfigError
from oldlogits.engines.embedded.process import EngineProcess
from oldlogits.engines.spec import EngineStats, Incident
from oldlogits.loop.backend import BackendSpec

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


def open_engine(spec: BackendSpec) -> AbstractAsyncContextManager[OpenEngine]:
    """Start the engine of a recipe, or connect to it; on leaving nothing of it stays behind."""
    return _open_servers(spec) if samples_on_servers(spec.engine) else _open_process(spec)


def samples_on_servers(engine: EngineConfig) -> bool:
    """Whether an engine samples on servers."""
    return engine.type == "vllm"


@asynccontextmanager
async def _open_process(spec: BackendSpec) -> AsyncIterator[OpenEngine]:
    """The embedded engine in a process of its own; its calls wait until it is ready."""
    engine = EngineProcess(spec.sampler)
    try:
        yield OpenEngine(engine=engine, stats=engine.stats, ready=_at_once, supervise=None, listen=lambda hear: None)
    finally:
        engine.close()


async def _at_once() -> None:
    return


@asynccontextmanager
async def _open_servers(spec: BackendSpec) -> AsyncIterator[OpenEngine]:
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

    e = spec.engine
    patience = Timeouts(
        recover_s=e.recover_s,
        request_s=e.request_timeout_s,
        control_s=e.control_timeout_s,
        start_s=e.start_timeout_s,
        max_restarts=e.max_restarts,
    )
    hosts = _attached(e) if e.urls else _started(spec)
    engine = HttpEngine(
        hosts,
        max_context=spec.sampler.max_context,
        numerics=spec.sampler.numerics,
        adapter_scale=spec.sampler.adapter_scale,
        patience=patience,
    )

    def listen(hear: Callable[[Incident], None]) -> None:
        engine.fleet.listen = hear

    try:
        yield OpenEngine(engine=engine, stats=engine.stats, ready=engine.start, supervise=engine.fleet.supervise, listen=listen)
    finally:
        await asyncio.shield(engine.close())


def _attached(engine: EngineConfig) -> list[Host]:
    from oldlogits.engines.http.client import Server
    from oldlogits.engines.http.servers import Host

    name = engine.token_env
    if name and not os.environ.get(name):
        raise ConfigError(
            "the environment variable of engine.token_env is not set", got=f"no {name}", allowed="a token", fix=f"export {name}"
        )
    token, timeout_s = os.environ.get(name, "") if name else "", engine.control_timeout_s
    return [Host(server=Server(url, token=token, control_timeout_s=timeout_s)) for url in engine.urls]


def _started(spec: BackendSpec) -> list[Host]:
    from oldlogits.engines.http.client import Server
    from oldlogits.engines.http.launch import Launched, LaunchSpec
    from oldlogits.engines.http.servers import Host

    e, sampler = spec.engine, spec.sampler
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
            launch = LaunchSpec(
                server=e.server,
                model_path=str(spec.model_folder.resolve()),
                numerics=sampler.numerics,
                max_num_seqs=sampler.max_num_seqs,
                max_context=sampler.max_context,
                flags=e.flags,
                python=e.python,
                log_folder=spec.folder / "servers",
                seed=sampler.seed + number,
                adapter_scale=sampler.adapter_scale,
            )
            launched = Launched(launch, f"server-{number}")
            server = Server(launched.url, token=launched.token, control_timeout_s=e.control_timeout_s)
            hosts.append(Host(server=server, launched=launched))
    except BaseException:
        for host in hosts:
            assert host.launched is not None
            host.launched.close()
        raise
    return hosts
