"""The engine that samples: what it is asked for, what it returns, and the seam through which a kind of engine is added.

recipe: engine.type = "embedded" | "vllm" | "package.module:Name"
-> ENGINES.find(name)() -> EngineKind, whose attributes say what may be asked of such an engine
-> EngineKind.open(EngineSpec, ServerOptions) -> OpenEngine, which holds a RolloutEngine
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Final, Literal, Protocol, runtime_checkable

from oldlogits.core.engine_stats import EngineCapabilities, EngineStats, Incident
from oldlogits.core.errors import ConfigError, MissingLogprobError, TrajectoryError
from oldlogits.core.registry import Registry
from oldlogits.core.trajectory import KV, Routing
from oldlogits.core.weights import PolicyVersion, WeightUpdate

FinishReason = Literal["stop", "length", "abort"]
PauseMode = Literal["keep", "abort"]
"""What becomes of running requests: they go on after the pause, or they end."""
KVMode = Literal["recompute", "stale"]
"""What an update does with keys and values of running requests."""

LARGEST: Final = 2**31
"""Token ids are below this."""
MOST_STOPS: Final = 1024
"""Stop tokens of one request: the engine compares every sampled token with each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    """What a recipe asks of an engine.

    Args:
        model_path: A Hugging Face model folder; its weights are version 0.
        numerics: How the engine rounds weights, such as "fp32" or "int8".
        max_context: The most tokens of one sequence, prompt and output.
        adapter_scale: Updates bring LoRA adapters, whose product, scaled by this, is added to the folder's weights; 0: they
            bring all weights.
        device: The device that the embedded engine computes on; "auto": a GPU if torch finds one.
        returns_routing: Spans have their routing, where the model chooses experts.
    """

    model_path: str
    numerics: str = "fp32"
    max_num_seqs: int = 128
    max_context: int = 512
    seed: int = 0
    adapter_scale: float = 0.0
    device: Literal["auto", "cpu", "cuda"] = "cpu"
    returns_routing: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """How long to wait for what, in seconds.

    Args:
        recover_s: How long a run goes on without any server.
        request_s: How long one answer may take; then the request is cut and sent again with what it has.
        control_s: How long a control call may take: pause, weight update, resume, abort.
        start_s: How long a server that was started may take until it answers.
        heartbeat_s: How long a process of the engine may give no heartbeat until it counts as frozen.
        poll_s: The time between two looks at a server.
        max_restarts: How often servers that the run starts are started again, in all.
    """

    recover_s: float = 300.0
    heartbeat_s: float = 60.0
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to sample a completion.

    Args:
        max_tokens: The most tokens to sample, >= 1.
        temperature: 0 is greedy decoding (evaluation only; log-probs are then those at temperature 1).
        top_p: Nucleus mass; below 1 it changes the support: evaluation only.
        top_k: Keep the k likeliest tokens; 0 keeps all: evaluation only.
        stop_token_ids: Sampling ends after any of these; the stop token is part of the output.
        prompt_logprobs: Also return the log-prob of every prompt token but the first, at temperature 1.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_token_ids: tuple[int, ...] = ()
    prompt_logprobs: bool = False

    def __post_init__(self) -> None:
        stops = self.stop_token_ids
        holds = {
            "max_tokens": self.max_tokens >= 1,
            "temperature": self.temperature == 0 or 1e-3 <= self.temperature <= 1e3,
            "top_p": 1e-6 <= self.top_p <= 1,
            "top_k": 0 <= self.top_k < LARGEST,
            "stop_token_ids": not stops or (len(stops) <= MOST_STOPS and min(stops) >= 0 and max(stops) < LARGEST),
        }
        if not all(holds.values()):
            said = [f"{name} = {getattr(self, name)!r:.60}" for name, is_right in holds.items() if not is_right]
            raise ConfigError(
                "sampling parameters out of range",
                got=", ".join(said)[:200],
                allowed="max_tokens from 1, temperature 0 or 0.001 to 1000, top_p from 1e-6 to 1, top_k from 0, "
                f"at most {MOST_STOPS} stop_token_ids from 0; ids and top_k below 2^31",
                fix="correct what is named, in the recipe or in the request",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Output tokens ``[start, end)`` of one version; `routing`, where it is told: the experts of the tokens before the last."""

    version: PolicyVersion
    start: int
    end: int
    kv: KV = "fresh"
    routing: Routing | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What an engine sampled for one request.

    Args:
        output_ids: The sampled tokens, the stop token included.
        logprobs: Natural log of the probability of each, under the distribution that it was sampled from.
        spans: Contiguous from 0 to ``len(output_ids)``, versions non-decreasing; empty when nothing was sampled.
        finish_reason: "stop" (a stop token), "length" (max_tokens or the engine's context), "abort".
        prompt_logprobs: The log-probs of prompt tokens 1, 2, ...; empty unless the request asked for them.
    """

    output_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    spans: tuple[Span, ...]
    finish_reason: FinishReason
    prompt_logprobs: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if len(self.logprobs) != len(self.output_ids):
            raise MissingLogprobError(
                "an engine returned tokens without log-probs",
                got=f"{len(self.output_ids)} tokens, {len(self.logprobs)} log-probs",
                allowed="one log-prob per sampled token",
                fix="ask the engine for the log-probs of the distribution that it samples from",
            )
        edges = [0, *(edge for span in self.spans for edge in (span.start, span.end)), len(self.output_ids)]
        if any(a != b for a, b in zip(edges[::2], edges[1::2], strict=True)) or any(s.end <= s.start for s in self.spans):
            raise TrajectoryError(
                "an engine returned tokens without a version",
                got=f"spans {[(span.start, span.end) for span in self.spans]} of {len(self.output_ids)} tokens",
                allowed="contiguous, non-empty spans over all tokens",
                fix="tag every token with the version that sampled it",
            )


class EngineControls(Protocol):
    """What is asked of an engine besides generations."""

    async def pause(self, mode: PauseMode, kv: KVMode) -> None:
        """Stop sampling; the engine is idle on return. `kv` says what an update does with keys and values."""

    async def partials(self) -> Mapping[str, Generation]:
        """While paused: what each running request has sampled so far, by request id."""

    async def resume(self) -> None:
        """Go on sampling."""

    async def stats(self) -> EngineStats:
        """Return the counters."""


@runtime_checkable
class RolloutEngine(EngineControls, Protocol):
    """Samples tokens. `update_weights` is called only between `pause` and `resume`."""

    @property
    def capabilities(self) -> EngineCapabilities:
        """What this engine can do."""

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling, request_id: str) -> Generation:
        """Sample a completion, through pauses and updates; copy the prompt, an array or other sequence that goes on to grow."""

    async def abort(self, request_id: str) -> None:
        """End a request; its `generate` returns what was sampled so far with finish reason "abort"."""

    async def update_weights(self, update: WeightUpdate, version: PolicyVersion) -> None:
        """Replace the weights; later tokens are tagged with `version`.

        Raises:
            ReceiverBehindError: Patches do not lead on from what the engine's host holds: give it full weights.
        """


class GrowingEngine(Protocol):
    """What an engine offers whose `EngineCapabilities.growth` says so."""

    async def grown(self, known: Mapping[str, int]) -> Mapping[str, Generation]:
        """What the running turns of trajectories have sampled after the first `known` tokens of each, by request id.

        It is asked while the engine samples, and other trajectories are left out.
        """


def check_update(version: PolicyVersion, *, over: PolicyVersion, is_paused: bool) -> None:
    """Refuse an update of the weights while an engine samples, or to a version before the one that it has."""
    if not is_paused or version < over:
        raise ConfigError(
            "weights change only between pause and resume, to a version that is not older",
            got=f"version {version} while version {over} is {'paused' if is_paused else 'running'}",
            allowed=f"a paused engine and a version >= {over}",
            fix="call pause, update_weights and resume in this order, with ascending versions",
        )


def trajectory_of(request_id: str) -> str:
    """The trajectory whose turn a request to the engine is: requests are named ``{trajectory}/{turn}``."""
    return request_id.rpartition("/")[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenEngine:
    """An engine that is being started: `engine` samples once `ready` has returned.

    Args:
        supervise: Runs beside the engine, where it must be watched; ends only by an error.
        listen: Takes a function that is told what happens to servers.
    """

    engine: RolloutEngine
    ready: Callable[[], Awaitable[None]]
    supervise: Callable[[], Coroutine[None, None, None]] | None = None
    listen: Callable[[Callable[[Incident], None]], None] = lambda hear: None


class StepwiseEngine(RolloutEngine, Protocol):
    """An engine of the caller's process that samples only while the caller steps it: what lockstep needs."""

    @property
    def idle(self) -> bool:
        """Whether a step would do nothing: the engine is paused, or no request can go on."""

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, request_id: str, *, quota: int | None = None
    ) -> Generation:
        """Sample a completion; waits through pauses and updates, and at `quota` sampled tokens until the quota is raised."""

    def set_quota(self, request_id: str, num_tokens: int | None) -> None:
        """Hold a request once it has sampled so many tokens; None lifts the quota. Does nothing to a request that ended."""

    def drive_once(self) -> bool:
        """Take one step; returns False if there was nothing to do."""

    def reset(self, seed: int) -> None:
        """Sample from here on as an engine that was made with this seed and has the present weights; it has no request."""


class EngineKind(Protocol):
    """A kind of engine: what a recipe may ask of it, and how it is opened.

    One's own inherits from this class and defines what differs; `engine.type = "package.module:Name"` names it. Its module
    is imported when a recipe is read, so it imports heavy packages inside its methods only.
    """

    has_servers: ClassVar[bool] = False
    """Whether it samples on servers, so that engine.urls, engine.server and the keys beside them have an effect."""
    kv_modes: ClassVar[frozenset[KVMode]] = frozenset({"recompute"})
    """What it can do with keys and values of running sequences when the weights change; "stale" ones are those of one
    trajectory, and are never shared with others."""
    has_routing: ClassVar[bool] = False
    """Whether it can say which experts served a token (`EngineSpec.returns_routing`)."""
    is_stepwise: ClassVar[bool] = False
    """Whether `build` makes a `StepwiseEngine`."""
    served_by: ClassVar[str] = ""
    """Without servers of its own: the server protocol that offers it over HTTP; empty: none does."""

    def check(self, spec: EngineSpec, servers: ServerOptions) -> None:
        """Refuse a model folder (which may hold config.json only), numerics or a size that this engine cannot run.

        Raises:
            ModelFolderError: The model is of a family that it does not implement.
            ConfigError: The numerics or the size are out of range.
        """
        return

    def open(self, spec: EngineSpec, servers: ServerOptions) -> AbstractAsyncContextManager[OpenEngine]:
        """Start an engine; on leaving nothing of it stays behind."""

    def build(self, spec: EngineSpec) -> StepwiseEngine:
        """Make an engine of this process that the caller steps; called only where `is_stepwise` says so."""
        raise ConfigError(
            f"{type(self).__name__} does not make an engine that is stepped",
            got="is_stepwise = True, and no method build",
            allowed="a method build(spec) that returns a StepwiseEngine",
            fix="define it, or set is_stepwise = False and use runtime.type = 'local'",
        )

    def weight_bytes(self, spec: EngineSpec, *, num_parameters: int, head_parameters: int) -> int:
        """Estimate the bytes of the weights that one engine computes with.

        A tied head counts once among `num_parameters`; `head_parameters` are its own, and 0 where it is not tied.
        """
        return 4 * num_parameters

    def cache_bytes(self, spec: EngineSpec, *, token_bytes: int) -> int:
        """Estimate the bytes of keys and values that the engine holds, from those of an fp32 token; 0: it fits itself in."""
        return 0


ENGINES: Final = Registry[type[EngineKind]](
    "engine",
    key="engine.type",
    builtin={
        "embedded": "oldlogits.engines.embedded.kind:EmbeddedKind",
        "vllm": "oldlogits.engines.http.kind:HttpKind",
    },
    needs=("open", "check", "has_servers"),
)
