"""Servers over HTTP as a kind of engine: attached or started by the run, of whatever protocol `engine.server` names."""

from __future__ import annotations

import asyncio
import importlib.util
import os
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from oldlogits.core.engine import EngineKind, EngineSpec, OpenEngine, ServerOptions
from oldlogits.core.engine_stats import Incident
from oldlogits.core.errors import ConfigError
from oldlogits.core.registry import require
from oldlogits.core.server import SERVER_PROTOCOLS, LaunchSpec

if TYPE_CHECKING:
    from oldlogits.engines.http.replica import Replica


class HttpKind(EngineKind):
    """One or several servers; what they can run is their protocol's to say."""

    has_servers: ClassVar[bool] = True
    has_routing: ClassVar[bool] = True

    def check(self, spec: EngineSpec, servers: ServerOptions) -> None:
        """Refuse what the servers' protocol refuses; see `EngineKind.check`."""
        SERVER_PROTOCOLS.find(servers.protocol).check(spec)

    @asynccontextmanager
    async def open(self, spec: EngineSpec, servers: ServerOptions) -> AsyncIterator[OpenEngine]:
        """Connect to the servers of the recipe, or start some; on leaving none of the latter stays behind."""
        require("vllm", "aiohttp", what="an engine over HTTP")
        from oldlogits.engines.http.engine import HttpEngine

        replicas = attach(servers) if servers.urls else start(spec, servers)
        engine = HttpEngine(replicas, spec, servers.timeouts)

        def listen(hear: Callable[[Incident], None]) -> None:
            engine.fleet.listen = hear

        try:
            yield OpenEngine(engine=engine, ready=engine.start, supervise=engine.supervise, listen=listen)
        finally:
            await asyncio.shield(engine.close())

    def weight_bytes(self, spec: EngineSpec, *, num_parameters: int, head_parameters: int) -> int:
        """In fp32, or in two bytes each."""
        return (4 if spec.numerics == "fp32" else 2) * num_parameters


def attach(servers: ServerOptions) -> list[Replica]:
    """The servers that run already."""
    from oldlogits.engines.http.client import HttpClient
    from oldlogits.engines.http.replica import Replica

    name = servers.token_env
    if name and not os.environ.get(name):
        raise ConfigError(
            "the environment variable of engine.token_env is not set", got=f"no {name}", allowed="a token", fix=f"export {name}"
        )
    token, protocol = os.environ.get(name, "") if name else "", SERVER_PROTOCOLS.find(servers.protocol)
    control_s = servers.timeouts.control_s
    return [Replica(server=protocol(HttpClient(url, token=token, control_timeout_s=control_s))) for url in servers.urls]


def start(spec: EngineSpec, servers: ServerOptions) -> list[Replica]:
    """Start servers; each has a seed of its own."""
    from oldlogits.engines.http.client import HttpClient
    from oldlogits.engines.http.launch import ServerProcess
    from oldlogits.engines.http.replica import Replica

    protocol = SERVER_PROTOCOLS.find(servers.protocol)
    if protocol.needs and not servers.python and importlib.util.find_spec(protocol.needs) is None:
        raise ConfigError(
            f"the run is to start a server, and {protocol.needs} is not installed",
            got=f"engine.server = '{servers.protocol}' without engine.urls",
            allowed=f"{protocol.needs} in this environment, or in that of engine.python; or running servers in engine.urls",
            fix=f"install {protocol.needs} and set engine.python to its interpreter, "
            "or start `oldlogits serve MODEL` and set engine.urls",
        )
    replicas: list[Replica] = []
    with ExitStack() as started:
        for number in range(servers.num_servers):
            own = replace(spec, seed=spec.seed + number)
            launched = ServerProcess(LaunchSpec(engine=own, servers=servers), f"server-{number}")
            started.callback(launched.close)
            http = HttpClient(launched.url, token=launched.token, control_timeout_s=servers.timeouts.control_s)
            replicas.append(Replica(server=protocol(http), launched=launched))
        started.pop_all()  # all have started: they are the engine's to close
    return replicas
