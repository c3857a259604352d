"""The turns between agent and environment: token in, token out.

    prompt -> [engine samples a turn] -> tool call?  run it, its result is context -> next turn
                                      -> message?    reply() is context, or the episode ends

What was sampled is never re-tokenised: a turn's prompt is every token before it, as it was sampled or read.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from numbers import Real
from typing import Literal, Protocol, TypeVar, cast

from oldlogits.core.engine import Generation, RolloutEngine, Sampling
from oldlogits.core.environment import ConversingEnvironment, Environment, Row
from oldlogits.core.errors import ConfigError, ContentError
from oldlogits.core.parser import Malformed, Parser, ToolCall
from oldlogits.core.trajectory import Context, Sampled, Segment, Trajectory
from oldlogits.envs.text import readable, spoken
from oldlogits.envs.tools import bind, render_result
from oldlogits.models.chat import ChatFormat

T = TypeVar("T")


class EnvironmentRunner(Protocol):
    """How environment code is run: inline, or in a thread with a deadline."""

    async def __call__(self, call: Callable[[], T | Awaitable[T]], *, is_tool: bool = False) -> T:
        """Run `call` (it may return an awaitable) and return its result; tools and replies may have a latency.

        Raises:
            EnvironmentFailed: It raised, or took too long.
        """
        ...


Report = Callable[[str, Sequence[Segment]], None]
"""Told of a trajectory that grew: its id, and all its segments so far; they go on growing."""


class EnvironmentFailed(Exception):  # noqa: N818 - an outcome of an episode, not an error of this package
    """Environment code raised or timed out; the text says what and where."""


class EnvironmentLost(EnvironmentFailed):
    """An environment ended through no fault of its own: its episode begins again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnLimits:
    """Where an episode is cut off.

    Args:
        max_turns: The assistant's turns.
        max_tokens_per_turn: Sampled tokens of one turn.
        max_tokens: Tokens of the whole episode, context included.
    """

    max_turns: int
    max_tokens_per_turn: int
    max_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Agent:
    """What an episode needs besides its task: engine, chat format, parser, limits, sampling, and who watches it grow."""

    engine: RolloutEngine
    chat: ChatFormat
    parser: Parser
    limits: TurnLimits
    sampling: Sampling
    run_environment: EnvironmentRunner
    report: Report = lambda trajectory_id, segments: None


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """An episode that the environment ended, by an exception or a time-out, after `num_tokens` were sampled.

    It `begins_again` where the environment was lost with its worker.
    """

    id: str
    group_id: str
    reason: str
    begins_again: bool = False
    num_tokens: int = 0


async def run_episode(
    agent: Agent, environment_class: type[Environment], row: Row, *, id: str, group_id: str
) -> Trajectory | Failure:
    """Play one episode in an environment of its own; returns the trajectory, or a failure that says what the environment did.

    Args:
        agent: The agent.
        environment_class: The class of the environment.
        row: The task: the arguments of `reset`.
        id: The trajectory's id; requests to the engine are named ``{id}/{turn}``.
        group_id: The id of its group.

    Raises:
        WorkerDiedError: The engine ended.
        MissingLogprobError: The engine returned tokens without log-probs.
    """
    run = agent.run_environment
    episode: _Episode | None = None
    try:
        environment = await run(environment_class)
        own_row = copy.deepcopy(row)  # an environment may change its arguments; its group shares the row
        opening = await run(lambda: environment.reset(**own_row))
        episode = _Episode(agent, environment, id)
        stop_reason = await episode.play(_text_of("reset", opening) or "")
        reward = _reward_of(await run(environment.get_reward))
    except EnvironmentFailed as failure:
        num_tokens = sum(len(s.token_ids) for s in episode.segments if isinstance(s, Sampled)) if episode else 0
        again = isinstance(failure, EnvironmentLost)
        return Failure(id=id, group_id=group_id, reason=str(failure), begins_again=again, num_tokens=num_tokens)
    return Trajectory(id=id, group_id=group_id, segments=tuple(episode.segments), reward=reward, stop_reason=stop_reason)


def _text_of(method: str, value: object) -> str | None:
    """What a method of the environment returned, if it is a text or None."""
    if value is None:
        return None
    if isinstance(value, str):
        return readable(value)
    raise EnvironmentFailed(f"{method} returned {type(value).__name__}, not text or None")


def _reward_of(value: object) -> float:
    """What `get_reward` returned, if it is a number that a float holds."""
    try:
        if isinstance(value, Real) and math.isfinite(value):
            return float(value)
    except OverflowError:
        raise EnvironmentFailed("get_reward returned a number that is too large for a float") from None
    raise EnvironmentFailed(f"get_reward returned {value!r:.200}, not a finite number")


def _shown(encode: Callable[..., list[int]], *words: str) -> list[int]:
    """The token ids of words of the environment; words that the tokenizer or the template refuses end the episode."""
    try:
        return encode(*words)
    except (ContentError, ConfigError) as error:
        raise EnvironmentFailed(str(error)) from error


class _Episode:
    """The tokens of one episode, as they grow."""

    def __init__(self, agent: Agent, environment: Environment, id: str) -> None:
        self._agent, self._environment, self._id = agent, environment, id
        self._tokens: list[int] = []
        self.segments: list[Segment] = []

    async def play(self, opening: str) -> str:
        """Play until the episode ends; returns why it did."""
        agent = self._agent
        self._read(_shown(agent.chat.prompt_ids, opening))
        if len(self._tokens) >= agent.limits.max_tokens:
            raise EnvironmentFailed(
                f"a prompt of {len(self._tokens)} tokens fills the episode: "
                f"raise env.max_episode_tokens ({agent.limits.max_tokens})"
            )
        for turn in range(agent.limits.max_turns):
            room = agent.limits.max_tokens - len(self._tokens)
            ids = await self._sample(turn, min(room, agent.limits.max_tokens_per_turn))
            if not ids or ids[-1] not in agent.chat.stop_ids:
                return "turn_too_long" if room > len(ids) else "max_tokens"
            answer = await self._answer(agent.chat.decode(ids))
            if answer is None:
                return "done"
            read = _shown(agent.chat.continuation_ids, *answer)
            if len(self._tokens) + len(read) >= agent.limits.max_tokens:
                return "max_tokens"
            if turn + 1 < agent.limits.max_turns:
                self._read(read)
        return "max_turns"

    async def _answer(self, text: str) -> tuple[Literal["tool", "user"], str] | None:
        """What the environment says to a turn: a tool result, a user's reply, or None at the end."""
        run, environment, aloud = self._agent.run_environment, self._environment, spoken(text)
        call = await run(partial(_call_of, self._agent.parser, environment, aloud))
        if isinstance(call, Malformed):
            return "tool", readable(call.reason)
        if call is not None:
            result: object = await run(call, is_tool=True)
            return "tool", await run(partial(render_result, result))
        if not hasattr(type(environment), "reply"):
            return None
        partner = cast(ConversingEnvironment, environment)
        heard = _text_of("reply", await run(lambda: partner.reply(aloud), is_tool=True))
        return None if heard is None else ("user", heard)

    async def _sample(self, turn: int, max_tokens: int) -> tuple[int, ...]:
        sampling = replace(self._agent.sampling, max_tokens=max_tokens, stop_token_ids=self._agent.chat.stop_ids)
        generation = await self._agent.engine.generate(self._tokens, sampling, f"{self._id}/{turn}")
        self._tokens += generation.output_ids
        self.segments += sampled_segments(generation, sampling.temperature)
        self._agent.report(self._id, self.segments)
        return generation.output_ids

    def _read(self, ids: list[int]) -> None:
        self._tokens += ids
        self.segments.append(Context(token_ids=tuple(ids)))
        self._agent.report(self._id, self.segments)


def _call_of(parser: Parser, environment: Environment, aloud: str) -> Callable[[], object] | Malformed | None:
    """The call of a turn, ready to run; None where the turn is a message. Parsers may be the user's code, as types of tools."""
    if not (calls := parser.parse(aloud)):
        return None
    call = only_call(calls)
    return call if isinstance(call, Malformed) else bind(environment, call)


def only_call(calls: Sequence[ToolCall | Malformed]) -> ToolCall | Malformed:
    """Return the call of a turn; a turn of several calls is answered as malformed, and none of them is run."""
    return calls[0] if len(calls) == 1 else Malformed(reason="error : one call at a time")


def sampled_segments(generation: Generation, temperature: float) -> list[Sampled]:
    """One `Sampled` segment for each span of a generation; greedy ones count as temperature 1, as their log-probs do."""
    return [
        Sampled(
            token_ids=generation.output_ids[span.start : span.end],
            logp_mu=generation.logprobs[span.start : span.end],
            version=span.version,
            kv=span.kv,
            temperature=temperature or 1.0,
        )
        for span in generation.spans
    ]
