"""The engine that samples: what it is asked for, and what it returns."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from oldlogits.core.errors import ConfigError, MissingLogprobError, TrajectoryError
from oldlogits.core.trajectory import KV
from oldlogits.core.weights import PolicyVersion, WeightUpdate

FinishReason = Literal["stop", "length", "abort"]


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
        """Refuse values out of range."""
        if self.max_tokens < 1 or not 0 <= self.temperature < math.inf or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ConfigError(
                "sampling parameters out of range",
                got=str(self),
                allowed="max_tokens >= 1, temperature >= 0 and finite, 0 < top_p <= 1, top_k >= 0",
                fix="correct the sampling section of the recipe",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Output tokens ``[start, end)`` of a generation were sampled with one version."""

    version: PolicyVersion
    start: int
    end: int
    kv: KV = "fresh"


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What an engine sampled for one request.

    Args:
        output_ids: The sampled tokens, the stop token included.
        logprobs: Natural log of the probability of each, under the distribution that it was sampled from.
        spans: Contiguous from 0 to ``len(output_ids)``, versions non-decreasing; empty when nothing was sampled.
        finish_reason: "stop" (a stop token), "length" (max_tokens or the engine's context), "abort".
        prompt_logprobs: Of prompt tokens 1, 2, ...; empty unless asked for.
    """

    output_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    spans: tuple[Span, ...]
    finish_reason: FinishReason
    prompt_logprobs: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Refuse tokens without a log-prob and tokens without a version."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineCapabilities:
    """What an engine can do, read when it starts.

    Args:
        max_context: The most tokens (prompt + output) of one sequence.
        partials: Whether `RolloutEngine.partials` exists; if not, a request is interrupted by abort and resubmit.
        kv_modes: What `pause` can promise about keys and values after the update. "stale": a trajectory keeps its own, and
            shares none of older versions with others.
        numerics: The engine's numerics, such as "fp32" or "int8".
        arithmetic: What it computes in; all but fp32 adds to the differences that its numerics make.
        num_replicas: Engines behind this one, each with a copy of the weights; requests for a prompt's log-probs go to one
            after the other.
        num_host_copies: Further copies, from which they load.
    """

    max_context: int
    partials: bool
    kv_modes: frozenset[Literal["recompute", "stale"]]
    numerics: str
    arithmetic: Literal["fp32", "bf16"] = "fp32"
    num_replicas: int = 1
    num_host_copies: int = 0


@runtime_checkable
class RolloutEngine(Protocol):
    """Samples tokens. `update_weights` is called only between `pause` and `resume`."""

    @property
    def capabilities(self) -> EngineCapabilities:
        """What this engine can do."""
        ...

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling, request_id: str) -> Generation:
        """Sample a completion; waits through pauses and weight updates."""
        ...

    async def abort(self, request_id: str) -> None:
        """End a request; its `generate` returns what was sampled so far with finish reason "abort"."""
        ...

    async def pause(self, mode: Literal["keep", "abort"], kv: Literal["recompute", "stale"]) -> None:
        """Stop sampling; the engine is idle on return. `kv` says what an update does with keys and values."""
        ...

    async def partials(self) -> Mapping[str, Generation]:
        """While paused: what each running request has sampled so far, by request id."""
        ...

    async def update_weights(self, update: WeightUpdate, version: PolicyVersion) -> None:
        """Replace the weights; later tokens are tagged with `version`.

        Raises:
            ReceiverBehindError: Patches do not lead on from what the engine's host holds: give it full weights.
        """
        ...

    async def resume(self) -> None:
        """Go on sampling."""
        ...


def trajectory_of(request_id: str) -> str:
    """The trajectory whose turn a request to the engine is: requests are named ``{trajectory}/{turn}``."""
    return request_id.rpartition("/")[0]
