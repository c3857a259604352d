"""Trajectories: what an agent saw and said, token by token, each sampled token with its version.

A trajectory alternates `Context` (prompt, tool results, user turns: not sampled, no log-prob, no version) and
`Sampled` segments of exactly one version each. A weight update in mid-turn starts a new segment. Tokens and log-probs are kept
flat: given as any sequence, they are `Ints` and `Floats`, which equal tuples.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from typing import Any, ClassVar, Final, Literal, TypeVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

from oldlogits.core.errors import TrajectoryError

T = TypeVar("T", int, float)
KV = Literal["fresh", "mixed"]
"""Whether every attended key and value was computed with the token's own version.

"mixed": over the entries that the trajectory's sampled tokens before it attended to and added, and those of the tokens read
since, which its own version computed (batch/kv_segments.py)."""


Choices = NDArray[np.unsignedinteger[Any]]
"""uint8 or uint16 [token, layer, choice]: expert ids."""
RoutingMode = Literal["off", "recorded", "replayed"]
"""What is made of the engine's routing: nothing; it is kept and compared; it is kept and the trainer chooses the same."""

NARROW: Final = 256
"""Experts of a layer that one byte tells apart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """The experts of consecutive tokens, as bytes: immutable, comparable, and a small part of what the tokens took to compute.

    Args:
        data: ``[token, layer, choice]`` in C order, little endian.
        num_layers: The layers of the model, those without experts included.
        num_chosen: The experts that serve a token in a layer.
        id_bytes: The bytes of each expert id.
    """

    data: bytes
    num_layers: int
    num_chosen: int
    id_bytes: Literal[1, 2] = 1
    __pydantic_config__: ClassVar[Mapping[str, str]] = {"val_json_bytes": "base64"}

    def __post_init__(self) -> None:
        if min(self.num_layers, self.num_chosen) < 1 or len(self.data) % self._token_bytes:
            raise TrajectoryError(
                "routing is not that of whole tokens",
                got=f"{len(self.data)} bytes, {self.num_layers} layers, {self.num_chosen} experts a token",
                allowed=f"a multiple of {self._token_bytes} bytes",
                fix="give the experts of every layer for every token",
            )

    @classmethod
    def of(cls, choices: Choices) -> Routing:
        """Keep the choices of an array."""
        _, num_layers, num_chosen = choices.shape
        data = np.ascontiguousarray(choices, choices.dtype.newbyteorder("<")).tobytes()
        return cls(data=data, num_layers=num_layers, num_chosen=num_chosen, id_bytes=1 if choices.itemsize == 1 else 2)

    @property
    def choices(self) -> Choices:
        """The choices as an array, without a copy."""
        kind = np.dtype(f"<u{self.id_bytes}")
        found: Choices = np.frombuffer(self.data, kind).reshape(-1, self.num_layers, self.num_chosen)
        return found

    def __len__(self) -> int:
        return len(self.data) // self._token_bytes

    def __add__(self, other: Routing) -> Routing:
        """Append the tokens that follow."""
        mine, others = ((r.num_layers, r.num_chosen, r.id_bytes) for r in (self, other))
        if mine != others:
            raise TrajectoryError(
                "routing of two models cannot be one",
                got=f"layers, experts a token and bytes of each: {mine} and {others}",
                allowed="the same",
                fix="use servers of one model",
            )
        return replace(self, data=self.data + other.data)

    def last(self, num_tokens: int) -> Routing:
        """Select the last tokens, all of them where there are fewer."""
        return replace(self, data=self.data[max(0, len(self) - num_tokens) * self._token_bytes :])

    @property
    def _token_bytes(self) -> int:
        return self.num_layers * self.num_chosen * self.id_bytes


class Flat(Sequence[T]):
    """Numbers side by side that do not change: equal to a tuple or list of the same ones, in a seventh of the memory."""

    __slots__ = ("numbers",)
    code: ClassVar[str]

    def __init__(self, numbers: Iterable[T] = ()) -> None:
        try:
            self.numbers: array[T] = numbers.numbers if isinstance(numbers, type(self)) else array(self.code, numbers)
        except (OverflowError, TypeError) as error:
            what, fix = "a segment holds something else than token ids and log-probs", "pass those of the model"
            raise TrajectoryError(what, got=str(error), allowed="integers of 32 bits, and floats", fix=fix) from error

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(self.numbers, dtype)

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[T]:
        return iter(self.numbers)

    def __getitem__(self, at: Any) -> Any:
        return type(self)(self.numbers[at]) if isinstance(at, slice) else self.numbers[at]

    def __eq__(self, other: object) -> bool:
        if isinstance(other, tuple | list):
            return tuple(self.numbers) == tuple(other)
        return isinstance(other, Flat) and self.numbers == other.numbers

    def __hash__(self) -> int:
        return hash(tuple(self.numbers))

    def __repr__(self) -> str:
        return repr(tuple(self.numbers))


class Ints(Flat[int]):
    """Token ids: 4 bytes each."""

    __slots__ = ()
    code = "i"


class Floats(Flat[float]):
    """Log-probs: 8 bytes each."""

    __slots__ = ()
    code = "d"


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """Tokens that the agent read, at least one: prompt, tool result, user turn."""

    token_ids: Sequence[int]

    def __post_init__(self) -> None:
        object.__setattr__(self, "token_ids", Ints(self.token_ids))
        _check(bool(self.token_ids), "a context segment is empty", "0 tokens", "at least one token", "leave the segment out")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """Tokens that the engine sampled with one version of the weights.

    Args:
        logp_mu: Natural-log probability of each under the distribution it was sampled from (logits / temperature).
        kv: "mixed" when keys and values of older versions were attended to: those of the sampled segments before it.
        temperature: The sampling temperature, > 0.
        routing: The experts that served the tokens before its last one when it was sampled: of the tokens whose keys and values
            were computed since the sampled segment before it, or of all where they were computed anew; None: not recorded.
    """

    token_ids: Sequence[int]
    logp_mu: Sequence[float]
    version: int
    kv: KV = "fresh"
    temperature: float = 1.0
    routing: Routing | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "token_ids", Ints(self.token_ids))
        object.__setattr__(self, "logp_mu", Floats(self.logp_mu))
        _check(bool(self.token_ids), "a sampled segment is empty", "0 tokens", "at least one token", "leave the segment out")
        _check(
            len(self.token_ids) == len(self.logp_mu),
            "every sampled token needs its log-prob",
            f"{len(self.token_ids)} tokens and {len(self.logp_mu)} log-probs",
            "as many log-probs as tokens",
            "ask the engine for the log-probs of the tokens that it samples",
        )
        _check(self.version >= 0, "a version counts from 0", str(self.version), ">= 0", "tag tokens with their version")
        _check(
            math.isfinite(self.temperature) and self.temperature > 0,
            "the temperature of a sampled segment must be positive",
            str(self.temperature),
            "> 0",
            "greedy decoding is for evaluation; it has no log-prob to train on",
        )
        above = [logp for logp in self.logp_mu if logp > 1e-4]
        _check(not above, "a log-prob is above 0", str(above), "<= 0 (or NaN, counted later)", "pass log-probs")


Segment = Context | Sampled


def goes_on(segment: Sampled, before: Sampled | None) -> bool:
    """Whether a segment was sampled over the keys and values that the sampled segment before it attended to and added."""
    is_same = before is not None and before.version == segment.version and before.kv == "fresh"
    return segment.kv == "mixed" or is_same


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """One sequence of tokens of an agent's episode; `group_id` names those of the same task, which are compared.

    Most episodes are one trajectory. An agent program may hold several conversations in one episode, its branches: they have
    the same reward, and their ids are ``g000012.3``, ``g000012.3#1``, ``g000012.3#2``, ...

    Args:
        segments: In the order of the tokens; versions never decrease.
        stop_reason: Why the episode ended: "done", "max_turns", "max_tokens", ...
        turn_rewards: What the environment gave for each turn, where it does; `reward` is the sum of all.
        messages: The messages after the first prompt, ``{"role": ..., "content": ...}`` each, where a group reward reads them.
    """

    id: str
    group_id: str
    segments: tuple[Segment, ...]
    reward: float
    stop_reason: str
    turn_rewards: tuple[float, ...] = ()
    messages: tuple[Mapping[str, str], ...] = ()

    def __post_init__(self) -> None:
        starts_with_context = bool(self.segments) and isinstance(self.segments[0], Context)
        _check(
            starts_with_context,
            f"trajectory {self.id} does not start with its prompt",
            "no leading context",
            "a Context",
            "put the prompt first",
        )
        versions = [segment.version for segment in self.sampled]
        _check(bool(versions), f"trajectory {self.id} has no sampled token", "only context", "one Sampled segment", "drop it")
        _check(
            versions == sorted(versions),
            f"versions of trajectory {self.id} decrease",
            str(versions),
            "non-decreasing versions",
            "an engine never goes back to an older version in a sequence",
        )
        _check(
            math.isfinite(self.reward),
            f"the reward of trajectory {self.id} is not finite",
            str(self.reward),
            "a finite number",
            "check get_reward()",
        )

    @property
    def episode_id(self) -> str:
        """The episode of which it is a branch."""
        return episode_of(self.id)

    @property
    def sampled(self) -> Iterator[Sampled]:
        """The sampled segments in order."""
        return (segment for segment in self.segments if isinstance(segment, Sampled))

    @property
    def num_tokens(self) -> int:
        """All tokens, context included."""
        return sum(len(segment.token_ids) for segment in self.segments)

    @property
    def num_sampled(self) -> int:
        """Sampled tokens: those that the loss sees."""
        return sum(len(segment.token_ids) for segment in self.sampled)

    @property
    def num_turns(self) -> int:
        """The agent's turns: a sampled segment after context begins one."""
        return sum(isinstance(b, Sampled) and isinstance(a, Context) for a, b in pairwise(self.segments))

    @property
    def versions(self) -> tuple[int, ...]:
        """The distinct versions that sampled it, ascending."""
        return tuple(sorted({segment.version for segment in self.sampled}))


Branches = tuple[Trajectory, ...]
"""All branches of one episode that ended well, at least one."""


def episode_of(trajectory_id: str) -> str:
    """The episode of a trajectory, such as ``g000012.3`` of its branch ``g000012.3#1``."""
    return trajectory_id.partition("#")[0]


def branch_id(episode_id: str, number: int) -> str:
    """The id of a branch of an episode, counted from 0."""
    return f"{episode_id}#{number}" if number else episode_id


def is_success(reward: float, success_at: float) -> bool:
    """Whether an episode of this reward succeeded, by `eval.success_at`."""
    return reward >= success_at


@dataclass(frozen=True, slots=True, kw_only=True)
class TrajectoryGroup:
    """Episodes of one task, whose rewards are compared with each other: all their trajectories, branch after branch."""

    id: str
    trajectories: tuple[Trajectory, ...]

    def __post_init__(self) -> None:
        _check(bool(self.trajectories), f"group {self.id} is empty", "0 trajectories", "at least one", "drop the group")
        strangers = [t.id for t in self.trajectories if t.group_id != self.id]
        _check(
            not strangers,
            f"group {self.id} has members of other groups",
            str(strangers),
            "its own members",
            "group by group_id",
        )

    @property
    def episodes(self) -> tuple[Branches, ...]:
        """Its trajectories by episode."""
        return tuple(tuple(branches) for _, branches in groupby(self.trajectories, key=lambda t: t.episode_id))

    @property
    def oldest_version(self) -> int:
        """The version of its oldest sampled token: what the staleness bound counts from."""
        return min(trajectory.versions[0] for trajectory in self.trajectories)


def _check(holds: bool, what: str, got: str, allowed: str, fix: str) -> None:
    if not holds:
        raise TrajectoryError(what, got=got, allowed=allowed, fix=fix)
