"""``oldlogits serve MODEL``: the embedded engine behind vLLM's HTTP routes and the chat interfaces of agent programs."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

import tyro

from oldlogits.config.schema import RunConfig
from oldlogits.core.engine import EngineSpec
from oldlogits.core.errors import ConfigError, ModelFolderError
from oldlogits.core.parser import PARSERS, make_parser
from oldlogits.core.registry import require
from oldlogits.rpc.processes import name_process
from oldlogits.run.chat import model_chat
from oldlogits.run.checkpoint import NamedModel
from oldlogits.run.start import prepare_model
from oldlogits.run.tasks import environment_of

if TYPE_CHECKING:
    from oldlogits.engines.embedded.process import EngineProcess
    from oldlogits.engines.server.chat import ServedChat
    from oldlogits.engines.server.served import Served

TOKEN_VARIABLE: Final = "OLDLOGITS_TOKEN"
"""The environment variable that a token is read from, where it stays out of process lists."""

_GRACE_S: Final = 2
"""How long open requests may go on after Ctrl-C."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """Serve a model over the token-in/token-out and weight-update routes of vLLM 0.32, and over chat interfaces.

    The latter are /v1/chat/completions, /v1/responses and /v1/messages.
    """

    model: Annotated[str, tyro.conf.Positional]
    """A run folder (its newest checkpoint), one of its checkpoints, a Hugging Face folder of the Llama/Qwen family, or the name
    of a starting model, such as tiny."""
    parser: str = ""
    """Chat: how the model writes tool calls, as env.parser says it (plain, hermes, ...); empty: as in its run, else plain."""
    chat_tools: Literal["template", "system", "user", ""] = ""
    """Chat: where the model reads of its tools, as model.chat_tools says it; empty: as in its run, else template."""
    unmet_wishes: Literal["override", "refuse"] = "override"
    """Chat: what becomes of a parameter that would change what is sampled, other than temperature, top_p, top_k and the most
    tokens. override: it is ignored, and counted. refuse: an error says why."""
    host: str = "127.0.0.1"
    """Where to listen; any but a loopback host needs a token."""
    port: int = 8000
    """Where to listen; 0: a free one, which is printed."""
    token: str = ""
    """Bearer token that requests must carry; empty: of the environment variable OLDLOGITS_TOKEN, or none."""
    numerics: Literal["fp32", "bf16", "fp8", "int8", "int4", "fp8_dynamic"] = "fp32"
    """The engine's numerics; all but fp32 are emulated."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where it computes; auto: on a GPU if torch finds one."""
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
    enable_return_routed_experts: bool = False
    """Mixtures of experts: answers say which experts served each token, as model.routing needs it."""
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
    config, folder = _model(options)
    spec = EngineSpec(
        model_path=str(folder),
        numerics=options.numerics,
        max_num_seqs=options.max_num_seqs,
        max_context=options.max_context or min(4096, read_config(folder).max_positions),
        seed=options.seed,
        adapter_scale=options.adapter_scale,
        device=options.device,
        returns_routing=options.enable_return_routed_experts,
    )
    engine = EngineProcess(spec)
    try:
        served = Served(engine, spec, folder.name)
        asyncio.run(_serve(engine, served, _chat(served, config, folder, options), options, token))
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


def _model(options: ServeOptions) -> tuple[RunConfig, Path]:
    """Return what is known of the model, and its folder; that of a starting model is made first, if it is not cached."""
    named = NamedModel.find(options.model)
    config = named.put_into(named.recipe or RunConfig())
    if options.parser:
        PARSERS.find(options.parser)
        config = replace(config, env=replace(config.env, parser=options.parser))
    if options.chat_tools:
        config = replace(config, model=replace(config.model, chat_tools=options.chat_tools))
    if named.run is not None or config.model.warm_start_steps == 0:
        return config, Path(config.model.path)
    environment_class = environment_of(config.env)
    return config, prepare_model(config, environment_class, _say).model


def _chat(served: Served, config: RunConfig, folder: Path, options: ServeOptions) -> ServedChat | None:
    """Open the chat of a model; one that cannot write conversations is served without it."""
    from oldlogits.engines.server.chat import ServedChat

    try:
        chat = model_chat(config, folder)
        parser = make_parser(config.env.parser, chat.tokenizer)
    except (ConfigError, ModelFolderError) as error:
        if options.parser or options.chat_tools:
            raise
        _say(f"no chat routes: {error}")
        return None
    return ServedChat(served, chat, parser, unmet=options.unmet_wishes, note=_say)


def _say(note: str) -> None:
    print(note, flush=True)


async def _serve(engine: EngineProcess, served: Served, chat: ServedChat | None, options: ServeOptions, token: str) -> None:
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
        make_app(served, limits, token=token, chat=chat),
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
    url = f"http://{options.host}:{port}"
    chats = f"; base URL of chat clients: {url}/v1" if chat is not None else ""
    print(f"serving {options.model} on {url} ({'with' if token else 'without'} a token){chats}", flush=True)
    watching = asyncio.create_task(engine.watch())
    watching.add_done_callback(lambda _: setattr(server, "should_exit", True))
    try:
        await server.serve(sockets=[listening])
    finally:
        watching.cancel()
        listening.close()
    with contextlib.suppress(asyncio.CancelledError):
        await watching
