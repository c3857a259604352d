"""The turns between agent and environment: token in, token out.

    prompt -> [engine samples a turn] -> tool call?  run it, its result is context -> next turn
                                      -> message?    reply() is context, or the episode ends

What was sampled is never re-tokenised: a turn's prompt is every token before it, as it was sampled or read.
"""

from __future__ import annotations

import copy
import json
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, NoReturn, Protocol, TypeVar, cast

from oldlogits.core.engine import Generation, RolloutEngine, Sampling
from oldlogits.core.environment import ConversingEnvironment, Environment, Row, SavedEnvironment
from oldlogits.core.errors import ConfigError, ContentError
from oldlogits.core.parser import Malformed, Parser
from oldlogits.core.trajectory import Context, Sampled, Segment, Trajectory
from oldlogits.envs.base import ToolErrors, prompt_of, prompt_to_ask, system_prompt_of
from oldlogits.envs.text import readable, spoken
from oldlogits.envs.tools import BoundCall, calls_of, can_be_saved, render_result
from oldlogits.models.chat.format import ChatFormat
from oldlogits.models.chat.template import Said
from oldlogits.rollout.answers import reward_of, size_of, text_of, words_of
from oldlogits.rollout.environment_errors import EnvironmentFailed, EnvironmentLost, Raised, answering, errors_of

T = TypeVar("T")

LONG: Final = 1 << 14
"""Characters above which a text is worked on where environment code runs: the event loop must not wait for it."""


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

Save = Callable[[str, int, str], None]
"""Told of the state of an environment, as JSON text, after so many segments of a trajectory."""


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
    """What an episode needs besides its task: engine, chat format, parser, limits, sampling, and who watches it grow.

    `report` is told of a trajectory that grew, `withdraw` of one whose running turn was given up, with what was read for it.
    `tool_errors` says which exceptions of tools are answers (`env.tool_errors`).
    """

    engine: RolloutEngine
    chat: ChatFormat
    parser: Parser
    limits: TurnLimits
    sampling: Sampling
    run_environment: EnvironmentRunner
    tool_errors: ToolErrors = "declared"
    report: Report = lambda trajectory_id, segments: None
    withdraw: Report = lambda trajectory_id, segments: None
    save: Save | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What is known of an episode that goes on: its segments, and where its environment was saved after `num_saved` of them."""

    segments: Sequence[Segment]
    num_saved: int = 0
    state: str = ""


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
    agent: Agent, environment_class: type[Environment], row: Row, *, id: str, group_id: str, known: Known | None = None
) -> Trajectory | Failure:
    """Play one episode in an environment of its own; returns the trajectory, or a failure that says what the environment did.

    Args:
        agent: The agent.
        environment_class: The class of the environment.
        row: The task: the arguments of `reset`.
        id: The trajectory's id; requests to the engine are named ``{id}/{turn}``.
        group_id: The id of its group.
        known: What the episode has so far. An environment that was saved is restored; any other one gets the same calls again,
            and where it answers otherwise than before, the episode begins again.

    Raises:
        WorkerDiedError: The engine ended.
        MissingLogprobError: The engine returned tokens without log-probs.
    """
    run = agent.run_environment
    episode: _Episode | None = None
    try:
        environment = await named(run, "the constructor", environment_class)
        episode = _Episode(agent, environment, id, known.segments if known else ())
        if known is not None and known.num_saved:
            stop_reason = await episode.go_on(known)
        else:
            own_row = copy.deepcopy(row)  # an environment may change its arguments; its group shares the row
            opening = await named(run, "reset", lambda: environment.reset(**own_row))
            system = await named(run, "system_prompt", ask) if (ask := prompt_to_ask(environment)) else prompt_of(environment)
            stop_reason = await episode.play(
                await off_loop(run, partial(words_of, "reset", opening), size_of(opening)),
                await off_loop(run, partial(words_of, "system_prompt", system), size_of(system)),
            )
        reward = await named(run, "get_reward", environment.get_reward)
        reward = await off_loop(run, partial(reward_of, reward), 0 if type(reward) in (int, float, bool) else LONG + 1)
    except EnvironmentFailed as failure:
        segments = episode.all_segments if episode else known.segments if known else ()
        num_tokens = sum(len(s.token_ids) for s in segments if isinstance(s, Sampled))
        again = isinstance(failure, EnvironmentLost)
        reason = readable(str(failure))
        return Failure(id=id, group_id=group_id, reason=reason, begins_again=again, num_tokens=num_tokens)
    return Trajectory(id=id, group_id=group_id, segments=tuple(episode.segments), reward=reward, stop_reason=stop_reason)


async def named(run: EnvironmentRunner, name: str, call: Callable[[], T | Awaitable[T]], *, is_tool: bool = False) -> T:
    """Run environment code; a failure says which call it was."""
    try:
        return await run(call, is_tool=is_tool)
    except EnvironmentFailed as failure:
        failure.args = (f"{name}: {failure}",)
        raise


async def off_loop(run: EnvironmentRunner, call: Callable[[], T], size: int) -> T:
    """Carry out a call whose time grows with the size of a text: a long one not on the event loop."""
    return await run(call) if size > LONG else call()


class _Episode:
    """The tokens of one episode, as they grow."""

    def __init__(self, agent: Agent, environment: Environment, id: str, known: Iterable[Segment]) -> None:
        self._agent, self._environment, self._id = agent, environment, id
        self._tokens: list[int] = []
        self._known = deque(known)  # that was sampled and read before, and is not taken up yet
        self.segments: list[Segment] = []

    @property
    def all_segments(self) -> tuple[Segment, ...]:
        """Its segments, and those that are known and not taken up yet."""
        return (*self.segments, *self._known)

    async def play(self, opening: str, system: str) -> str:
        """Play until the episode ends; returns why it did."""
        limits, own = self._agent.limits, system_prompt_of(type(self._environment))
        encode = partial(self._agent.chat.prompt_ids, opening, None if system == own else system)
        read = await self._encoded(encode, opening + system)
        if read is None or len(read) >= limits.max_tokens:
            size = f"{size_of(opening + system):,} bytes" if read is None else f"{len(read)} tokens"
            raise EnvironmentFailed(f"a prompt of {size} fills the episode: raise env.max_episode_tokens ({limits.max_tokens})")
        await self._read(read)
        return await self._play_turns(0)

    async def go_on(self, known: Known) -> str:
        """Go on where the environment was saved; returns why the episode ended."""
        environment, run = cast(SavedEnvironment, self._environment), self._agent.run_environment
        await named(run, "load_state", lambda: environment.load_state(json.loads(known.state)))
        read = [self._take_up() for _ in range(known.num_saved)]
        return await self._play_turns(sum(isinstance(segment, Context) for segment in read) - 1)

    async def _play_turns(self, first: int) -> str:
        limits = self._agent.limits
        for turn in range(first, limits.max_turns):
            room = limits.max_tokens - len(self._tokens)
            ids = await self._sample(turn, min(room, limits.max_tokens_per_turn))
            if not ids or ids[-1] not in self._agent.chat.stop_ids:
                return "turn_too_long" if room > len(ids) else "max_tokens"
            answer = await self._answer(self._agent.chat.decode(ids))
            if answer is None:
                return self._end("done")
            words = "".join(content for _, content in answer)
            read = await self._encoded(partial(self._agent.chat.continuation_ids, answer), words)
            if read is None or len(self._tokens) + len(read) >= limits.max_tokens:
                return self._end("max_tokens")
            if turn + 1 < limits.max_turns:
                await self._read(read)
        return "max_turns"

    async def _encoded(self, encode: Callable[[], list[int]], words: str) -> list[int] | None:
        """The token ids of words of the environment; None where so many bytes do not fit the rest of the episode.

        Words that the tokenizer or the template refuses end the episode.
        """
        size = size_of(words)
        if size > self._agent.chat.most_bytes * (self._agent.limits.max_tokens - len(self._tokens)):
            return None
        try:
            return await off_loop(self._agent.run_environment, encode, size)
        except (ContentError, ConfigError) as error:
            raise EnvironmentFailed(str(error)) from error

    async def _answer(self, text: str) -> Sequence[Said] | None:
        """What the environment says to a turn: the results of its calls, a user's reply, or None at the end."""
        run, environment, aloud = self._agent.run_environment, self._environment, spoken(text)
        calls = await named(run, "reading a turn", partial(calls_of, self._agent.parser, environment, aloud))
        if calls:
            return [("tool", await self._result(call)) for call in calls]
        if not hasattr(type(environment), "reply"):
            return None
        reply = await self._call("reply", partial(cast(ConversingEnvironment, environment).reply, aloud))
        if isinstance(reply, Raised):
            return None
        heard = await off_loop(run, partial(text_of, "reply", reply), size_of(reply))
        return None if heard is None else [("user", heard)]

    async def _result(self, call: BoundCall | Malformed) -> str:
        """What the agent reads of a call."""
        if isinstance(call, Malformed):
            return readable(call.reason)
        result = await self._call(call.name, call.run)
        if isinstance(result, Raised):
            return result.text
        return await named(self._agent.run_environment, f"the result of {call.name}", partial(render_result, result))

    async def _call(self, name: str, call: Callable[[], object]) -> object:
        errors = errors_of(type(self._environment), name, self._agent.tool_errors)
        return await named(self._agent.run_environment, name, answering(call, errors), is_tool=True)

    async def _sample(self, turn: int, max_tokens: int) -> tuple[int, ...]:
        """Sample a turn, or what is left of it where its beginning is known."""
        known: tuple[int, ...] = ()
        while self._known and isinstance(self._known[0], Sampled):
            known += self._take_up().token_ids
        if known and (self._known or known[-1] in self._agent.chat.stop_ids or len(known) >= max_tokens):
            return known
        left = max_tokens - len(known)
        sampling = replace(self._agent.sampling, max_tokens=left, stop_token_ids=self._agent.chat.stop_ids)
        generation = await self._agent.engine.generate(self._tokens, sampling, f"{self._id}/{turn}")
        self._tokens += generation.output_ids
        self.segments += sampled_segments(generation, sampling.temperature)
        self._agent.report(self._id, self.segments)
        return known + generation.output_ids

    async def _read(self, ids: list[int]) -> None:
        if self._known:
            if self._take_up() != Context(token_ids=tuple(ids)):
                self._answered_otherwise()
            return
        self._tokens += ids
        self.segments.append(Context(token_ids=tuple(ids)))
        self._agent.report(self._id, self.segments)
        await self._save()

    async def _save(self) -> None:
        """Tell of the state of the environment, where it can be saved."""
        save, run, num_segments = self._agent.save, self._agent.run_environment, len(self.segments)
        if save is not None and can_be_saved(type(self._environment)):
            environment = cast(SavedEnvironment, self._environment)
            state = await named(run, "save_state", environment.save_state)
            save(self._id, num_segments, await named(run, "save_state", partial(_json_of, state)))

    def _take_up(self) -> Segment:
        """Take up the next segment that is known."""
        segment = self._known.popleft()
        self._tokens += segment.token_ids
        self.segments.append(segment)
        return segment

    def _end(self, reason: str) -> str:
        return reason if not self._known else self._answered_otherwise()

    def _answered_otherwise(self) -> NoReturn:
        raise EnvironmentLost("the run went on from a checkpoint, and the environment answered otherwise than before it")


def _json_of(state: object) -> str:
    return json.dumps(state, allow_nan=False)


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
