"""The seams of the system, and the data that passes through them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from oldlogits.core.errors import ConfigError, MissingLogprobError, TrajectoryError
from oldlogits.core.policies import Policy, Provenance
from oldlogits.core.trajectory import KV, Sampled, Segment, Trajectory

if TYPE_CHECKING:
    from torch import Tensor

PolicyVersion = int
"""A version of the forward weights: an int64 that counts from 0."""

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
class FullWeights:
    """All forward weights under their Hugging Face parameter names."""

    tensors: Mapping[str, Tensor]

    @property
    def num_bytes(self) -> int:
        """Bytes of all of them."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchWeights:
    """What leads a receiver that holds the version `base` to a later one.

    Args:
        base: The version that the first patch begins at.
        patches: Serialised `versions.Patch`, oldest first, of the weights under their Hugging Face parameter names.
    """

    base: PolicyVersion
    patches: tuple[bytes | memoryview, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of all of them."""
        return sum(len(patch) for patch in self.patches)


WeightUpdate = FullWeights | PatchWeights


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Publication:
    """What a store did with a version.

    Args:
        version: Which.
        stored_bytes: What it takes in memory and is the price of keeping it: its patch, or its copy.
        full_bytes: A full copy of it.
        share_changed: Of its values, those with other bits than in the version before; NaN where they were not compared.
        encode_s: Seconds until it was stored, without waiting.
        log_bytes: What was written to disk.
        waited_s: Seconds that it was held back until there was room.
    """

    version: PolicyVersion
    stored_bytes: int
    full_bytes: int
    share_changed: float
    encode_s: float
    log_bytes: int = 0
    waited_s: float = 0.0


class VersionStore(Protocol):
    """Keeps the exact forward weights of every version that tokens in flight still need."""

    @property
    def versions(self) -> tuple[PolicyVersion, ...]:
        """The versions that are there, ascending."""
        ...

    @property
    def num_bytes(self) -> int:
        """Bytes of memory that all of them take."""
        ...

    def publish(self, version: PolicyVersion, weights: Mapping[str, Tensor]) -> Publication:
        """Store the bits of `weights` as `version`, which is above all others."""
        ...

    def checkout(self, version: PolicyVersion) -> AbstractContextManager[Mapping[str, Tensor]]:
        """The weights of `version`, for reading inside the context.

        Raises:
            VersionEvictedError: Names the version, the window that is held, and the remedy.
        """
        ...

    def walk(self) -> AbstractContextManager[None]:
        """Inside it, checkouts in the order of their versions cost one way down and one way back in all."""
        ...

    def retain(self, oldest_needed: PolicyVersion) -> list[PolicyVersion]:
        """Versions below `oldest_needed` are no longer needed, but for the newest and those held; returns those dropped."""
        ...

    def hold(self, version: PolicyVersion) -> None:
        """Keep a version until `release`, whatever `retain` says.

        Raises:
            VersionEvictedError: The version is not there.
        """
        ...

    def release(self, version: PolicyVersion) -> list[PolicyVersion]:
        """Take one `hold` back; returns the versions dropped."""
        ...

    def rewind(self, version: PolicyVersion) -> None:
        """Forget all versions above one, which becomes the newest: a run goes on from an older checkpoint.

        Raises:
            VersionEvictedError: The version is not there.
        """
        ...

    def close(self) -> None:
        """Give up what it has open; a second call does nothing."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """Log-probs of a batch's loss tokens under one policy, and how they were obtained.

    Args:
        policy: Whose log-probs these are.
        values: float32 [loss token], natural log, in batch order.
        computed_at: int64 [loss token]; the version whose weights computed each value.
        num_switches: How often the scoring weights were switched.
        provenance: Of every token, where the route fell back on another policy's values; None: the policy's own.
    """

    policy: Policy
    values: NDArray[np.float32]
    computed_at: NDArray[np.int64]
    num_switches: int
    provenance: Provenance | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchTokens:
    """The loss tokens of the batch that enters training, in batch order.

    Args:
        versions: int64 [loss token]; the version that sampled each.
        trajectory_ids: One per trajectory; its loss tokens stand side by side.
        trainer_version: The trainer's version, before its first optimizer step on this batch.
        has_mixed_kv: Whether some were sampled over keys and values of older versions.
    """

    versions: NDArray[np.int64]
    trajectory_ids: tuple[str, ...]
    trainer_version: PolicyVersion
    has_mixed_kv: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """The tokens of one trajectory that one version sampled, and all that a forward pass needs to score them.

    Args:
        trajectory_id: Whose.
        token_ids: int64 [token]; the trajectory from its beginning to the last of these tokens.
        positions: int64 [scored token], ascending, >= 1; the last is that of the last token.
        temperature: float32 [scored token].
    """

    trajectory_id: str
    token_ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    temperature: NDArray[np.float32]

    @property
    def num_read(self) -> int:
        """Tokens that a forward pass reads to score it: all but the last, which is predicted only."""
        return int(self.positions[-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredPieces:
    """Log-probs of pieces.

    Args:
        values: float32 [scored token], natural log, piece after piece.
        seconds_s: The time that the scorer worked.
        switch_s: The part of it until the model pointed at the version's weights, checkout included.
        witness_s: The part of it that witnessed them; 0 where they were witnessed when the scorer received them.
    """

    values: NDArray[np.float32]
    seconds_s: float
    switch_s: float
    witness_s: float


class PieceScorer(Protocol):
    """Scores pieces of trajectories at versions that it holds, wherever it runs."""

    async def score_pieces(self, pieces: Sequence[Piece], at: PolicyVersion) -> ScoredPieces:
        """Log-probs of the pieces' tokens.

        Args:
            pieces: At least one.
            at: A version that it holds.

        Raises:
            VersionEvictedError: The version is not held.
        """
        ...


class ScoringHandle(PieceScorer, Protocol):
    """What a source may ask of the trainer, wherever it runs."""

    @property
    def is_idle(self) -> bool:
        """Whether no call is being carried out."""
        ...

    async def score(self, tokens: NDArray[np.int64], at: PolicyVersion | None) -> NDArray[np.float32]:
        """Log-probs of loss tokens of the batch in training.

        Args:
            tokens: int64, ascending positions among the batch's loss tokens.
            at: A stored version, or None for the live weights.

        Returns:
            float32, one value per entry of `tokens`.

        Raises:
            VersionEvictedError: The version is no longer held.
        """
        ...

    async def score_mixed(self) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Log-probs of all loss tokens of the batch in training, over keys and values of the versions that the engine had.

        Returns:
            float32 and int64 [loss token]: the values, and the version that scored each, -1 where none did.

        Raises:
            VersionEvictedError: A version is no longer held.
            TrajectoryError: The batch does not say which versions computed them.
        """
        ...


class DedicatedScorer(PieceScorer, Protocol):
    """A second model that only scores, with a window of versions of its own."""

    @property
    def window(self) -> int:
        """Versions that it holds: the newest ones."""
        ...

    async def publish(self, version: PolicyVersion, update: WeightUpdate, probe_logps: NDArray[np.float32]) -> float:
        """Take over a version, and drop the oldest beyond the window.

        Args:
            version: Its number.
            update: Its weights, copied before this returns, or what leads to them from the version before.
            probe_logps: float32 [probe token]; what the trainer's live weights give the fixed probe tokens.

        Returns:
            The largest difference on these tokens, in nats.

        Raises:
            ExactnessError: The weights that arrived give the probe tokens other log-probs.
        """
        ...


class LogprobSource(Protocol):
    """A route to the log-probs of a stand-in: one seam for every route. The runtime pauses, a source only scores.

    A route inherits from this class; hooks that it does not need do nothing. In the order of a run::

        on_segment_closed ... on_arrival -> acquire -> (steps) -> on_paused -> on_published -> ... -> drop
        on_segment_closed ... on_arrival -> on_paused -> acquire -> (steps) -> on_published -> ... -> drop    needs_pause
    """

    needs_pause: bool = False
    """Whether the engine is paused from before the first optimizer step until it holds the next version."""
    needs_partials: bool = False
    """Whether `on_paused` is to be called."""
    witness_max_abs_error: float = math.nan
    """Largest error in nats of witnesses of exactness that the trainer does not have; NaN: there is none."""

    @property
    def provides(self) -> Policy:
        """The policy whose log-probs `acquire` returns."""
        ...

    def on_segment_closed(self, trajectory_id: str, segments: Sequence[Segment]) -> None:
        """A running trajectory grew.

        Args:
            trajectory_id: Which.
            segments: All of it so far; goes on growing.
        """
        return

    async def on_arrival(self, trajectories: Sequence[Trajectory]) -> None:
        """The trajectories of a group have ended and wait for training."""
        return

    async def on_paused(self, running: Mapping[str, Sequence[Sampled]]) -> None:
        """The engine is paused and has sampled the last token of its version.

        Args:
            running: By trajectory, what unfinished turns have sampled so far.
        """
        return

    async def on_published(self, version: PolicyVersion, update: WeightUpdate, probe_logps: NDArray[np.float32]) -> None:
        """The engine holds `version` and samples again.

        Args:
            version: Its number.
            update: The trainer's weights, valid until its next optimizer step, or what leads to them.
            probe_logps: float32 [probe token]; what they give the fixed probe tokens.
        """
        return

    async def acquire(self, batch: BatchTokens) -> Scored | None:
        """The log-probs of the batch that enters training; None from a route for variants that need none."""
        ...

    def drop(self, trajectory_ids: Iterable[str]) -> None:
        """These were trained, filtered, failed or cancelled: forget them."""
        return

    def oldest_needed(self, in_flight: PolicyVersion) -> PolicyVersion:
        """The oldest version that this route may still ask the trainer's store for.

        Args:
            in_flight: The oldest version that a trajectory in flight may have tokens of.
        """
        return in_flight

    def metrics(self) -> Mapping[str, float]:
        """What this route has done since the last call; docs/metrics.md."""
        return {}

    async def close(self) -> None:
        """The run ends: leave nothing running."""
        return
