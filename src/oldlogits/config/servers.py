"""The rules for servers that sample over HTTP. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Final
from urllib.parse import urlsplit

from oldlogits.config.schema import EngineConfig, RayConfig, RunConfig
from oldlogits.core.engine import ENGINES
from oldlogits.core.errors import ConfigError
from oldlogits.core.server import SERVER_PROTOCOLS

_OF_SERVERS: Final = ("urls", "token_env", "server", "num_servers", "flags", "python")
_OF_STARTED: Final = ("num_servers", "flags", "python")


def check_servers(config: RunConfig) -> None:
    """Refuse keys that would have no effect, and servers that the run cannot use.

    Raises:
        ConfigError: What is wrong, what was found, what is allowed, and how to fix it.
    """
    engine = config.engine
    _check_ranges(engine)
    _check_ray(config)
    kind = ENGINES.find(engine.type)()
    if config.runtime.type == "lockstep" and not kind.is_stepwise:
        raise ConfigError(
            "lockstep decides how many tokens each version samples, and this engine does not let it",
            got=f"engine.type = '{engine.type}', runtime.type = 'lockstep'",
            allowed="runtime.type = 'local', or engine.type = 'embedded'",
            fix="set runtime.type = 'local'",
        )
    if engine.kv not in kind.kv_modes:
        raise ConfigError(
            "this engine shares older keys and values among trajectories: what it samples over them is of no version",
            got=f"engine.kv = '{engine.kv}', engine.type = '{engine.type}'",
            allowed="engine.kv = 'recompute', or engine.type = 'embedded'",
            fix=f"remove engine.kv = '{engine.kv}'",
        )
    if not kind.has_servers:
        _refuse_idle(engine, _OF_SERVERS, f"engine.type = '{engine.type}' has no servers", "set engine.type = 'vllm'")
        return
    SERVER_PROTOCOLS.find(engine.server)
    if engine.urls:
        _refuse_idle(engine, _OF_STARTED, "with engine.urls the run starts no server", "remove it, or remove engine.urls")
        _check_urls(engine)
    else:
        _check_started(engine)


def _check_served(config: RunConfig) -> None:
    """Runtime ray starts servers: the engine must have some, or be offered by some."""
    kind = ENGINES.find(config.engine.type)()
    if not kind.has_servers and not kind.served_by:
        raise ConfigError(
            "workers of the runtime ray sample on servers, and no server offers this engine",
            got=f"engine.type = '{config.engine.type}', runtime.type = 'ray'",
            allowed="engine.type = 'vllm' or 'embedded', or an engine whose `served_by` names a server protocol",
            fix="set engine.type = 'vllm' and engine.server, or runtime.type = 'local'",
        )


def _check_ray(config: RunConfig) -> None:
    ray, default = config.ray, RayConfig()
    _require(ray.num_workers >= 1, "ray.num_workers", ray.num_workers, ">= 1", "2")
    for name in ("worker_cpus", "worker_gpus", "trainer_cpus", "trainer_gpus"):
        amount: float = getattr(ray, name)
        _require(0 <= amount < math.inf, f"ray.{name}", amount, ">= 0", "1.0")
    _require(0 < ray.start_timeout_s < math.inf, "ray.start_timeout_s", ray.start_timeout_s, "> 0 seconds", "300")
    if config.runtime.type != "ray":
        for name in sorted(field.name for field in fields(RayConfig)):
            if getattr(ray, name) != getattr(default, name):
                raise ConfigError(
                    f"ray.{name} has no effect without the runtime ray",
                    got=f"ray.{name} = {getattr(ray, name)!r}, runtime.type = '{config.runtime.type}'",
                    allowed="runtime.type = 'ray'",
                    fix=f"set runtime.type = 'ray', or remove ray.{name}",
                )
        return
    if config.trainer.device == "cuda" and not ray.trainer_gpus:
        raise ConfigError(
            "the trainer is to use a GPU that the cluster does not reserve for it",
            got="trainer.device = 'cuda', ray.trainer_gpus = 0",
            allowed="ray.trainer_gpus > 0",
            fix="ray.trainer_gpus = 1",
        )
    _check_served(config)
    engine = config.engine
    if engine.urls or engine.num_servers != 1:
        raise ConfigError(
            "with the runtime ray every worker has one server of its own",
            got=f"engine.urls = {list(engine.urls)}, engine.num_servers = {engine.num_servers}",
            allowed="no engine.urls, engine.num_servers = 1",
            fix="remove them and set ray.num_workers",
        )
    if engine.kv == "stale":
        raise ConfigError(
            "a trajectory may go on with another worker, which does not have its keys and values of older versions",
            got="engine.kv = 'stale', runtime.type = 'ray'",
            allowed="engine.kv = 'recompute', or runtime.type = 'local'",
            fix="remove engine.kv = 'stale'",
        )


def _refuse_idle(engine: EngineConfig, keys: tuple[str, ...], what: str, fix: str) -> None:
    default = EngineConfig()
    for key in keys:
        if getattr(engine, key) != getattr(default, key):
            got = f"engine.{key} = {getattr(engine, key)!r}"
            raise ConfigError(f"{what}: engine.{key} has no effect", got=got, allowed="no such key", fix=fix)


def _check_ranges(engine: EngineConfig) -> None:
    for key in ("recover_s", "request_timeout_s", "control_timeout_s", "start_timeout_s"):
        seconds: float = getattr(engine, key)
        _require(0 < seconds < math.inf, f"engine.{key}", seconds, "> 0 seconds", "60")
    _require(engine.num_servers >= 1, "engine.num_servers", engine.num_servers, ">= 1", "1")
    _require(engine.max_restarts >= 0, "engine.max_restarts", engine.max_restarts, ">= 0", "5")


def _require(holds: bool, key: str, got: float, allowed: str, fix: str) -> None:
    if not holds:
        raise ConfigError(f"{key} is out of range", got=f"{key} = {got}", allowed=allowed, fix=f"{key} = {fix}")


def _check_urls(engine: EngineConfig) -> None:
    allowed, fix = "http://HOST:PORT or https://HOST:PORT, each once", "engine.urls = ['http://127.0.0.1:8000']"
    for url in engine.urls:
        parts = urlsplit(url)
        beside = parts.path.strip("/") or parts.query or parts.username is not None
        if parts.scheme not in ("http", "https") or not parts.hostname or beside:
            raise ConfigError("engine.urls names no server", got=url, allowed=allowed, fix=fix)
    if len({url.rstrip("/") for url in engine.urls}) < len(engine.urls):
        raise ConfigError("engine.urls names a server twice", got=", ".join(engine.urls), allowed=allowed, fix=fix)


def _check_started(engine: EngineConfig) -> None:
    if engine.token_env:
        got = f"engine.token_env = '{engine.token_env}'"
        raise ConfigError(
            "servers that the run starts get a token of their own",
            got=got,
            allowed="engine.urls",
            fix="remove engine.token_env",
        )
    numerics = SERVER_PROTOCOLS.find(engine.server).numerics
    if engine.precision not in numerics:
        raise ConfigError(
            f"servers '{engine.server}' are not started with these numerics; no server but the embedded one rounds activations",
            got=f"engine.precision = '{engine.precision}'",
            allowed=f"{', '.join(sorted(numerics))}, or engine.server = 'embedded'",
            fix=f"set engine.precision = '{'fp8' if 'fp8' in numerics else 'fp32'}'",
        )
