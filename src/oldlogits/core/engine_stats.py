"""What engines can do, and what they count: their work, how long it takes, and what happens to servers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Literal

from oldlogits.core.weights import PolicyVersion


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineCapabilities:
    """What an engine can do, read when it starts.

    Args:
        partials: Whether `RolloutEngine.partials` exists; if not, a request is interrupted by abort and resubmit.
        growth: Whether `GrowingEngine.grown` exists; if not, a kill loses what running turns have sampled at the last version.
        arithmetic: What it computes in; all but fp32 adds to the differences that its numerics make.
        num_replicas: Engines behind this one, each with a copy of the weights; requests for a prompt's log-probs go to one
            after the other.
        num_host_copies: Further copies of the weights, from which these engines load.
    """

    partials: bool
    growth: bool = False
    arithmetic: Literal["fp32", "bf16"] = "fp32"
    num_replicas: int = 1
    num_host_copies: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """Sums over pieces of work, from which a straight line of seconds (`s`) against size can be drawn."""

    num: float = 0.0
    size: float = 0.0
    size_sq: float = 0.0
    s: float = 0.0
    size_s: float = 0.0

    def __add__(self, other: Line) -> Line:
        return Line(**{name: value + getattr(other, name) for name, value in asdict(self).items()})

    def metrics(self, name: str) -> dict[str, float]:
        """The sums, under names that begin with `name`."""
        return {f"{name}_{what}": total for what, total in asdict(self).items()}


def piece(size: float, seconds_s: float) -> Line:
    """One piece of work."""
    return Line(num=1.0, size=size, size_sq=size**2, s=seconds_s, size_s=size * seconds_s)


@dataclass(slots=True, kw_only=True)
class EngineStats:
    """Counters since the engine was built, which counts in one and gives copies.

    Args:
        num_prefill_tokens: Prompt tokens computed, recomputation included.
        num_prefix_hit_tokens: Prompt tokens that were found in the cache instead.
        busy_s: Seconds inside `EngineCore.step`.
        waiting_s: Seconds outside it with nothing to do: paused, or nothing to sample.
        decode: Decode steps; the size of one is the sequences that it decoded.
        prefill: Prefills between two decode steps; the size of one is the tokens that it computed.
    """

    version: PolicyVersion = 0
    num_steps: int = 0
    num_decode_tokens: int = 0
    num_prefill_tokens: int = 0
    num_prefix_hit_tokens: int = 0
    busy_s: float = 0.0
    waiting_s: float = 0.0
    num_requests: int = 0
    decode: Line = field(default_factory=Line)
    prefill: Line = field(default_factory=Line)


@dataclass(frozen=True, slots=True, kw_only=True)
class Incident:
    """A server went down or came back.

    Args:
        reason: Why it counts as down, or what was done before it counted as up.
        num_requests: Requests that ran on it and are sent again.
        num_kept_tokens: Tokens that these requests have sampled and keep.
        num_lost_tokens: A lower bound of the tokens that the server sampled, by its own count at the last look, and that did
            not arrive; None: it does not count.
        is_failure: False if it was asked to leave.
    """

    what: Literal["down", "up"]
    server: str
    reason: str
    num_requests: int = 0
    num_kept_tokens: int = 0
    num_lost_tokens: int | None = None
    is_failure: bool = True
