"""The rules between the engine, its servers and the runtime that a recipe names. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from operator import attrgetter
from typing import Final
from urllib.parse import urlsplit

from oldlogits.config.schema import RunConfig
from oldlogits.config.systems import EngineConfig, RayConfig
from oldlogits.core.backend import BACKENDS
from oldlogits.core.engine import ENGINES
from oldlogits.core.errors import ConfigError, reading
from oldlogits.core.server import SERVER_PROTOCOLS

_OF_STARTED: Final = ("engine.num_servers", "engine.flags", "engine.python")
_OF_SERVERS: Final = ("engine.urls", "engine.token_env", "engine.server", *_OF_STARTED)
_OF_RAY: Final = sorted(f"ray.{field.name}" for field in fields(RayConfig))


def check_servers(config: RunConfig) -> None:
    """Refuse keys that would have no effect, and engines that the runtime cannot use.

    Raises:
        ConfigError: What is wrong, what was found, what is allowed, and how to fix it.
    """
    engine = config.engine
    kind, runtime = ENGINES.find(engine.type)(), BACKENDS.find(config.runtime.type)
    _check_ray(config)
    if runtime.steps_engine and not kind.is_stepwise:
        raise ConfigError(
            "lockstep decides how many tokens each version samples, and this engine does not let it",
            got=f"engine.type = '{engine.type}', runtime.type = '{config.runtime.type}'",
            allowed="runtime.type = 'local', or engine.type = 'embedded'",
            fix="set runtime.type = 'local'",
        )
    if engine.kv not in kind.kv_modes:
        raise ConfigError(
            "the engine shares keys and values of older versions among trajectories: its samples over them are of no version",
            got=f"engine.kv = '{engine.kv}', engine.type = '{engine.type}'",
            allowed="engine.kv = 'recompute', or engine.type = 'embedded'",
            fix=f"remove engine.kv = '{engine.kv}'",
        )
    if kind.has_servers and (engine.urls or SERVER_PROTOCOLS.find(engine.server).uses_gpu):
        _refuse_idle(config, ("engine.device",), "where a server decides on its device", "engine.type = 'embedded'")
    if config.model.routing != "off" and not kind.has_routing:
        raise ConfigError(
            "the engine does not say which experts it chose",
            got=f"model.routing = '{config.model.routing}', engine.type = '{engine.type}'",
            allowed="model.routing = 'off', or engine.type = 'embedded' or 'vllm'",
            fix="set model.routing = 'off'",
        )
    if not kind.has_servers:
        _refuse_idle(config, _OF_SERVERS, f"with engine.type = '{engine.type}', which has no servers", "engine.type = 'vllm'")
    elif engine.urls:
        _refuse_idle(config, _OF_STARTED, "with engine.urls, where the run starts no server", "no engine.urls")
        _check_urls(engine)
    else:
        _check_started(engine)


def _check_ray(config: RunConfig) -> None:
    """Refuse keys of [ray] that nothing reads, and what its workers cannot have."""
    ray, runtime = config.ray, BACKENDS.find(config.runtime.type)
    if not runtime.on_cluster:
        _refuse_idle(config, _OF_RAY, "without the runtime ray", "runtime.type = 'ray'")
        return
    if config.trainer.device == "cuda" and not ray.trainer_gpus:
        raise ConfigError(
            "the trainer is to use a GPU that the cluster does not reserve for it",
            got="trainer.device = 'cuda', ray.trainer_gpus = 0",
            allowed="ray.trainer_gpus > 0",
            fix="ray.trainer_gpus = 1",
        )
    engine, kind = config.engine, ENGINES.find(config.engine.type)()
    if engine.device == "cuda" and not ray.worker_gpus:
        raise ConfigError(
            "the engine is to use a GPU that the cluster does not reserve for it",
            got="engine.device = 'cuda', ray.worker_gpus = 0",
            allowed="ray.worker_gpus > 0",
            fix="ray.worker_gpus = 1",
        )
    if not kind.has_servers and not kind.served_by:
        raise ConfigError(
            "workers of the runtime ray sample on servers, and no server offers this engine",
            got=f"engine.type = '{engine.type}', runtime.type = '{config.runtime.type}'",
            allowed="engine.type = 'vllm' or 'embedded', or an engine whose `served_by` names a server protocol",
            fix="set engine.type = 'vllm' and engine.server, or runtime.type = 'local'",
        )
    if engine.urls or engine.num_servers != 1:
        raise ConfigError(
            "with the runtime ray every worker has one server of its own",
            got=f"engine.urls = {list(engine.urls)}, engine.num_servers = {engine.num_servers}",
            allowed="no engine.urls, engine.num_servers = 1",
            fix="remove them and set ray.num_workers",
        )
    if engine.kv == "stale" and runtime.moves_trajectories:
        raise ConfigError(
            "a trajectory may go on with another worker, which does not have its keys and values of older versions",
            got=f"engine.kv = 'stale', runtime.type = '{config.runtime.type}'",
            allowed="engine.kv = 'recompute', or runtime.type = 'local'",
            fix="remove engine.kv = 'stale'",
        )


def _refuse_idle(config: RunConfig, keys: Sequence[str], where: str, needed: str) -> None:
    """Refuse keys that differ from their defaults and have no effect, for want of what is needed."""
    default = RunConfig()
    for key in keys:
        if (value := attrgetter(key)(config)) != attrgetter(key)(default):
            fix = f"remove {key}, or have {needed}"
            raise ConfigError(f"{key} has no effect {where}", got=f"{key} = {value!r}", allowed=needed, fix=fix)


def _check_urls(engine: EngineConfig) -> None:
    allowed, fix = "http://HOST:PORT or https://HOST:PORT, each once", "engine.urls = ['http://127.0.0.1:8000']"
    for url in engine.urls:
        with reading(ConfigError, "engine.urls names no server", got=url, allowed=allowed, fix=fix):
            parts = urlsplit(url)
            parts.port  # noqa: B018 # one that is no number raises
        beside = parts.path.strip("/") or parts.query or parts.username is not None
        if parts.scheme not in ("http", "https") or not parts.hostname or beside:
            raise ConfigError("engine.urls names no server", got=url, allowed=allowed, fix=fix)
    if len({url.rstrip("/") for url in engine.urls}) < len(engine.urls):
        raise ConfigError("engine.urls names a server twice", got=", ".join(engine.urls), allowed=allowed, fix=fix)


def _check_started(engine: EngineConfig) -> None:
    """Refuse a token for servers that get one from the run, and numerics that such a server cannot be started with."""
    numerics = SERVER_PROTOCOLS.find(engine.server).numerics
    if engine.token_env:
        raise ConfigError(
            "servers that the run starts get a token of their own",
            got=f"engine.token_env = '{engine.token_env}'",
            allowed="engine.urls",
            fix="remove engine.token_env",
        )
    if engine.precision not in numerics:
        raise ConfigError(
            f"a server '{engine.server}' that the run starts cannot have these numerics",
            got=f"engine.precision = '{engine.precision}'",
            allowed=", ".join(sorted(numerics)),
            fix=f"set engine.precision to one of these, or engine.server to one that has {engine.precision}",
        )
