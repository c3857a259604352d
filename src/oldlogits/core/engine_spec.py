"""What a recipe asks of an engine, and what it says of servers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    """What a recipe asks of an engine.

    Args:
        model_path: A Hugging Face model folder; its weights are version 0.
        numerics: How the engine rounds weights, such as "fp32" or "int8".
        max_context: The most tokens of one sequence, prompt and output.
        adapter_scale: Updates bring LoRA adapters, whose product, scaled by this, is added to the folder's weights; 0: they
            bring all weights.
    """

    model_path: str
    numerics: str = "fp32"
    max_num_seqs: int = 128
    max_context: int = 512
    seed: int = 0
    adapter_scale: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """How long to wait for what, in seconds.

    Args:
        recover_s: How long a run goes on without any server.
        request_s: How long one answer may take; then the request is cut and sent again with what it has.
        control_s: How long a control call may take: pause, weight update, resume, abort.
        start_s: How long a server that was started may take until it answers.
        poll_s: The time between two looks at a server.
        max_restarts: How often servers that the run starts are started again, in all.
    """

    recover_s: float = 300.0
    request_s: float = 600.0
    control_s: float = 60.0
    start_s: float = 300.0
    poll_s: float = 1.0
    max_restarts: int = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """What a recipe says of servers.

    Args:
        protocol: The name of their protocol, in `SERVER_PROTOCOLS`.
        urls: The addresses of servers that run already; empty: the run starts its own.
        token_env: The environment variable that holds the bearer token of running servers; empty: they want none.
        python: The interpreter that has the server installed; empty: this one.
    """

    protocol: str
    urls: tuple[str, ...] = ()
    token_env: str = ""
    num_servers: int = 1
    flags: tuple[str, ...] = ()
    python: str = ""
    log_folder: Path = field(default_factory=Path)
    timeouts: Timeouts = field(default_factory=Timeouts)
