"""``oldlogits serve MODEL``: the embedded engine behind vLLM's HTTP routes."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

import tyro

from oldlogits.config.model_folder import check_model_folder
from oldlogits.config.schema import ModelConfig, RunConfig
from oldlogits.core.engine import EngineSpec
from oldlogits.core.environment import MODELS
from oldlogits.core.errors import ConfigError
from oldlogits.core.registry import require
from oldlogits.models.checksums import check_model_sums
from oldlogits.rpc.processes import name_process
from oldlogits.run.start import prepare_model
from oldlogits.run.tasks import environment_of

if TYPE_CHECKING:
    from oldlogits.engines.embedded.process import EngineProcess
    from oldlogits.engines.server.served import Served

TOKEN_VARIABLE: Final = "OLDLOGITS_TOKEN"
"""The environment variable that a token is read from, where it stays out of process lists."""

_GRACE_S: Final = 2
"""How long open requests may go on after Ctrl-C."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """Serve a model folder over the token-in/token-out and weight-update routes of vLLM 0.32."""

    model: Annotated[str, tyro.conf.Positional]
    """A Hugging Face folder of the Llama/Qwen family, or the name of a starting model, such as tiny."""
    host: str = "127.0.0.1"
    """Where to listen; any but a loopback host needs a token."""
    port: int = 8000
    """Where to listen; 0: a free one, which is printed."""
    token: str = ""
    """Bearer token that requests must carry; empty: of the environment variable OLDLOGITS_TOKEN, or none."""
    numerics: Literal["fp32", "bf16", "fp8", "int8", "int4", "fp8_dynamic"] = "fp32"
    """The engine's numerics; all but fp32 are emulated."""
    max_num_seqs: int = 128
    """Sequences decoded at the same time."""
    max_context: int = 0
    """The most tokens of one sequence; 0: the model's, at most 4096."""
    seed: int = 0
    """Of the sampler."""
    max_body_bytes: int = 0
    """The largest body of a request; 0: 1 MiB, and 16 bytes for each token of max_context."""
    max_connections: int = 4096
    """Connections at the same time; a further one is closed at once."""
    idle_s: float = 60.0
    """Seconds that a client may take for the head of a request, and again for its body."""
    adapter_scale: float = 0.0
    """For a run with model.lora_rank, whose updates bring adapters: its lora_alpha / lora_rank; 0: they bring all weights."""


def command(arguments: Sequence[str]) -> int:
    """Serve until interrupted."""
    name_process("server")
    options = tyro.cli(ServeOptions, prog="oldlogits serve", args=list(arguments))
    require("serve", "fastapi", "uvicorn", what="oldlogits serve")
    from oldlogits.engines.embedded.model_folder import read_config
    from oldlogits.engines.embedded.process import EngineProcess
    from oldlogits.engines.server.app import check_host
    from oldlogits.engines.server.served import Served

    token = options.token or os.environ.get(TOKEN_VARIABLE, "")
    check_host(options.host, token)
    _check_options(options)
    folder = _folder(options.model)
    spec = EngineSpec(
        model_path=str(folder),
        numerics=options.numerics,
        max_num_seqs=options.max_num_seqs,
        max_context=options.max_context or min(4096, read_config(folder).max_positions),
        seed=options.seed,
        adapter_scale=options.adapter_scale,
    )
    engine = EngineProcess(spec)
    try:
        asyncio.run(_serve(engine, Served(engine, spec, folder.name), options, token))
    finally:
        engine.close()
    return 0


def _check_options(options: ServeOptions) -> None:
    """Refuse numbers that nothing can be done with; the engine's size is checked against its model."""
    for flag, holds, allowed in (
        ("port", 0 <= options.port < 2**16, "0 to 65535"),
        ("seed", 0 <= options.seed < 2**32, "0 to 2^32 - 1"),
        ("max_num_seqs", 1 <= options.max_num_seqs <= 65_536, "1 to 65536"),
        ("max_context", options.max_context == 0 or 2 <= options.max_context < 2**31, "from 2, or 0"),
        ("max_body_bytes", 0 <= options.max_body_bytes <= 2**34, "0 to 16 GiB"),
        ("max_connections", 1 <= options.max_connections <= 10**6, "1 to 1000000"),
        ("idle_s", 0 < options.idle_s <= 1e6, "above 0, to 1e6"),
        ("adapter_scale", 0 <= options.adapter_scale <= 1e6, "0 to 1e6"),
    ):
        if not holds:
            word = f"--{flag.replace('_', '-')}"
            got = f"{word} {getattr(options, flag)}"
            raise ConfigError(f"{word} is out of range", got=got, allowed=allowed, fix="leave it out, or correct it")


def _folder(model: str) -> Path:
    """Return the model's folder; that of a starting model is made first, if it is not cached."""
    config = RunConfig(model=ModelConfig(path=model))
    environment_class = environment_of(config.env)
    folder = prepare_model(config, environment_class, lambda note: print(note, flush=True)).model
    check_model_folder(folder, fix=f"name a Hugging Face folder, or a starting model ({', '.join(MODELS.names)})")
    check_model_sums(folder)
    return folder


async def _serve(engine: EngineProcess, served: Served, options: ServeOptions, token: str) -> None:
    """Serve until interrupted, or until the engine process ends.

    Raises:
        WorkerDiedError: It did.
    """
    import uvicorn

    from oldlogits.engines.server.app import make_app
    from oldlogits.engines.server.limits import Limits, http_protocol

    await engine.ready()
    limits = Limits(
        max_body_bytes=options.max_body_bytes or 2**20 + 16 * served.spec.max_context,
        max_connections=options.max_connections,
        idle_s=options.idle_s,
    )
    config = uvicorn.Config(
        make_app(served, limits, token=token),
        host=options.host,
        port=options.port,
        http=http_protocol(limits),
        ws="none",
        log_level="warning",
        timeout_graceful_shutdown=_GRACE_S,
        access_log=False,
    )
    server = uvicorn.Server(config)
    listening = config.bind_socket()
    listening.listen()  # who reads the line below may connect at once
    port = listening.getsockname()[1]
    print(f"serving {options.model} on http://{options.host}:{port} ({'with' if token else 'without'} a token)", flush=True)
    watching = asyncio.create_task(engine.watch())
    watching.add_done_callback(lambda _: setattr(server, "should_exit", True))
    try:
        await server.serve(sockets=[listening])
    finally:
        watching.cancel()
        listening.close()
    with contextlib.suppress(asyncio.CancelledError):
        await watching
