"""The sections of a recipe that say what runs where: engine, versions, runtime."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Le

from oldlogits.config.ranges import Auto, Bytes, Count, Few, NotNegative, Seconds, Tokens, Versions
from oldlogits.core.backend import BACKENDS
from oldlogits.core.engine import ENGINES
from oldlogits.core.server import SERVER_PROTOCOLS


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """The engine that samples."""

    type: Annotated[str, ENGINES] = "embedded"
    """embedded: a process of the run. vllm: servers over HTTP, of the run's own or running already."""
    precision: Literal["fp32", "bf16", "fp8", "int8", "int4", "fp8_dynamic"] = "fp32"
    """The engine's numerics; the embedded engine emulates all but fp32, which gives a real training-inference mismatch."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the embedded engine computes, in fp32 on either. auto: on a GPU if torch finds one, beside the trainer's model; not
    in lockstep, on Ray only with ray.worker_gpus. vLLM has flags for it."""
    max_num_seqs: Annotated[int, Ge(1), Le(65_536)] = 128
    """Sequences decoded at the same time."""
    kv: Literal["recompute", "stale"] = "recompute"
    """What happens to keys and values of running sequences when the weights change."""
    weight_sync: Literal["auto", "full"] = "auto"
    """What the engine is given. auto: a patch where the source keeps versions and it is below half a copy. full: all."""
    probe_tolerance: Annotated[float, Ge(0)] | Auto = "auto"
    """Largest mean |log-prob difference| of the probe in nats; auto: what is known of the numerics."""
    urls: tuple[str, ...] = ()
    """vllm only: running servers of this machine, such as "http://127.0.0.1:8000"; empty: the run starts its own."""
    token_env: str = ""
    """engine.urls only: the environment variable that holds their bearer token; empty: they want none."""
    server: Annotated[str, SERVER_PROTOCOLS] = "vllm"
    """vllm only: what the servers are. embedded: `oldlogits serve`, the embedded engine behind vLLM's routes."""
    num_servers: Few = 1
    """vllm without urls: how many servers the run starts."""
    flags: tuple[str, ...] = ()
    """vllm without urls: further flags of the server's command line."""
    python: str = ""
    """vllm without urls: the Python interpreter that has the server installed; empty: this one."""
    recover_s: Seconds = 300.0
    """vllm only: seconds without any server that answers, after which the run ends."""
    request_timeout_s: Seconds = 600.0
    """vllm only: seconds that a request may run; then it is sent again with what it has. A server that answers none of its
    requests for so long counts as hung."""
    control_timeout_s: Seconds = 60.0
    """vllm only: seconds that pause, weight update, resume and abort may take."""
    start_timeout_s: Seconds = 300.0
    """vllm without urls: seconds that a server may take until it answers."""
    max_restarts: Count = 5
    """vllm without urls: how often servers that ended are started again, in all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionsConfig:
    """How exact versions are kept, where a source needs them, and how they reach the engine."""

    uncompressed: Count = 4
    """Newest patches that stay as they are; older ones are compressed."""
    budget_bytes: Bytes = 0
    """Memory for all patches beside the resident copy; over it they are compressed, then left on disk. 0: no bound."""
    folder: str = ""
    """Where versions are written if there is a budget; empty: versions/ of the run folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeConfig:
    """Who runs where."""

    type: Annotated[str, BACKENDS] = "local"
    """lockstep: one process, virtual time, bit for bit repeatable. local: engine and trainer in processes of their own on
    this machine. ray: actors of a Ray cluster, one or several nodes."""
    heartbeat_timeout_s: Seconds = 60.0
    """Seconds without a heartbeat after which a process of the run counts as frozen: it is killed, and the run ends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LockstepConfig:
    """runtime.type = "lockstep" only: how stale every token is."""

    lag: Literal["fresh_first", "even", "skewed", "random"] = "even"
    """How the lags of a trajectory's tokens are spread over 0 .. max_lag."""
    max_lag: Versions = 4
    """The largest lag, in versions; at most max_staleness."""
    tokens_per_version: Tokens = 12
    """Mean number of tokens that a trajectory samples with one version before it switches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RayConfig:
    """runtime.type = "ray" only: who runs on which part of the cluster."""

    address: str = ""
    """The address of a running cluster, "auto" for the one of this machine; empty: the run starts one here."""
    num_workers: Few = 2
    """Rollout workers: each an engine and a share of the environments. `oldlogits workers` changes it while a run runs."""
    worker_cpus: NotNegative = 1.0
    """CPUs that a worker reserves."""
    worker_gpus: NotNegative = 0.0
    """GPUs that a worker reserves for its engine."""
    trainer_cpus: NotNegative = 1.0
    """CPUs that the trainer reserves, and a dedicated scorer again."""
    trainer_gpus: NotNegative = 0.0
    """GPUs that the trainer reserves, and a dedicated scorer again."""
    placement: Literal["PACK", "SPREAD", "STRICT_SPREAD"] = "SPREAD"
    """How the first workers are placed. PACK: on few nodes. SPREAD: on many. STRICT_SPREAD: each on a node of its own."""
    start_timeout_s: Seconds = 300.0
    """Seconds until the cluster must have given every actor its place, and again until each must have started there."""
