"""The turns between agent and environment: token in, token out.

    prompt -> [engine samples a turn] -> tool call?  run it, its result is context -> next turn
                                      -> message?    reply() is context, or the episode ends

What was sampled is never re-tokenised: a turn's prompt is every token before it, as it was sampled or read.
"""

from __future__ import annotations

import copy
import json
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, NoReturn, cast

from oldlogits.core.engine import Generation, RolloutEngine, Sampling
from oldlogits.core.environment import Environment, JsonValue, Row, SavedEnvironment
from oldlogits.core.errors import ConfigError, ContentError
from oldlogits.core.parser import Parser
from oldlogits.core.trajectory import Context, Sampled, Segment, Trajectory, goes_on
from oldlogits.envs.base import ToolErrors, prompt_of, prompt_to_ask, system_prompt_of
from oldlogits.envs.text import readable
from oldlogits.models.chat.format import ChatFormat
from oldlogits.models.chat.template import Said
from oldlogits.rollout.answers import opening_of, reward_of, size_of, words_of
from oldlogits.rollout.asked import AskedEnvironment, EnvironmentRunner, HandOver, named, off_loop
from oldlogits.rollout.environment_errors import EnvironmentFailed, EnvironmentLost

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
    `tool_errors` says which exceptions of tools are answers (`env.tool_errors`); with `keeps_messages`,
    trajectories have theirs.
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
    keeps_messages: bool = False


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
    agent: Agent, make_environment: Callable[[], Environment], row: Row, *, id: str, group_id: str, known: Known | None = None
) -> Trajectory | Failure:
    """Play one episode in an environment of its own; returns the trajectory, or a failure that says what the environment did.

    Args:
        agent: The agent.
        make_environment: The class of the environment, or what else makes one.
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
        made: list[Environment] = []
        is_saved, begin = known is not None and known.num_saved > 0, HandOver(run, "the constructor")

        def make() -> object:
            made.append(make_environment())
            if is_saved:
                return None
            begin.next("reset")
            return made[0].reset(**own_row(row))  # an environment may change its arguments; its group shares the row

        opening = await begin(make)
        environment = made[0]
        episode = _Episode(agent, environment, id, known.segments if known else ())
        if known is not None and is_saved:
            stop_reason = await episode.go_on(known)
        else:
            system = await named(run, "system_prompt", ask) if (ask := prompt_to_ask(environment)) else prompt_of(environment)
            own_system = await off_loop(run, partial(words_of, "system_prompt", system), size_of(system))
            row_system, said = await off_loop(run, partial(opening_of, opening), size_of(opening))
            stop_reason = await episode.play(said, own_system if row_system is None else row_system)
        reward = await episode.reward()
    except EnvironmentFailed as failure:
        segments = episode.all_segments if episode else known.segments if known else ()
        num_tokens = sum(len(s.token_ids) for s in segments if isinstance(s, Sampled))
        again = isinstance(failure, EnvironmentLost)
        reason = readable(str(failure))
        return Failure(id=id, group_id=group_id, reason=reason, begins_again=again, num_tokens=num_tokens)
    return Trajectory(
        id=id,
        group_id=group_id,
        segments=tuple(episode.segments),
        reward=reward,
        stop_reason=stop_reason,
        turn_rewards=tuple(episode.turn_rewards),
        messages=tuple(episode.messages) if agent.keeps_messages else (),
    )


def own_row(row: Row) -> Row:
    """Return a copy of a row, all of it."""
    return {name: _own(value) for name, value in row.items()}


def _own(value: JsonValue) -> JsonValue:
    if type(value) is dict:
        return {name: _own(inner) for name, inner in value.items()}
    if type(value) is list:
        return [_own(inner) for inner in value]
    return value if type(value) in _PLAIN else copy.deepcopy(value)


_PLAIN: Final = frozenset({str, int, float, bool, type(None)})


class _Episode:
    """The tokens of one episode, as they grow."""

    def __init__(self, agent: Agent, environment: Environment, id: str, known: Iterable[Segment]) -> None:
        self._agent, self._environment, self._id = agent, environment, id
        self._asked = AskedEnvironment(environment, agent.run_environment, agent.parser, agent.tool_errors)
        self._tokens: array[int] = array("i")
        self._asked_last: Sampling | None = None
        self._known = deque(known)  # that was sampled and read before, and is not taken up yet
        self._chat = agent.chat
        self.messages: list[Mapping[str, str]] = []
        self.turn_rewards: list[float] = []
        self.segments: list[Segment] = []

    @property
    def all_segments(self) -> tuple[Segment, ...]:
        """Its segments, and those that are known and not taken up yet."""
        return (*self.segments, *self._known)

    async def reward(self) -> float:
        """The reward of the episode: that of its end, and those of its turns."""
        reward = await self._asked.reward(self.messages)
        return reward_of(sum(self.turn_rewards, reward), "the rewards of the turns") if self.turn_rewards else reward

    async def play(self, opening: Sequence[Said], system: str) -> str:
        """Play until the episode ends; returns why it did."""
        self._chat = await self._asked.ask_for_tools(self._agent.chat)
        limits, own = self._agent.limits, system_prompt_of(type(self._environment))
        encode, words = partial(self._chat.prompt_ids, opening, None if system == own else system), [system]
        words += [content for _, content in opening]
        read = await self._encoded(encode, words)
        if read is None or len(read) >= limits.max_tokens:
            size = f"{size_of(words):,} bytes" if read is None else f"{len(read)} tokens"
            raise EnvironmentFailed(f"a prompt of {size} fills the episode: raise env.max_episode_tokens ({limits.max_tokens})")
        await self._read(read)
        return await self._play_turns(0)

    async def go_on(self, known: Known) -> str:
        """Go on where the environment was saved; returns why the episode ended."""
        environment, run = cast(SavedEnvironment, self._environment), self._agent.run_environment
        await named(run, "load_state", lambda: environment.load_state(json.loads(known.state)))
        self._chat = await self._asked.ask_for_tools(self._agent.chat)
        read = [self._take_up() for _ in range(known.num_saved)]
        return await self._play_turns(sum(isinstance(segment, Context) for segment in read) - 1)

    async def _play_turns(self, first: int) -> str:
        limits = self._agent.limits
        for turn in range(first, limits.max_turns):
            room = limits.max_tokens - len(self._tokens)
            ids = await self._sample(turn, min(room, limits.max_tokens_per_turn))
            self.messages.append({"role": "assistant", "content": (text := self._chat.decode(ids))})
            if not ids or ids[-1] not in self._chat.stop_ids:
                return "turn_too_long" if room > len(ids) else "max_tokens"
            answer = await self._asked.answer(text)
            if self._asked.has_turn_reward:
                self.turn_rewards.append(await self._asked.turn_reward())
            if answer is None:
                return self._end("done")
            self.messages += [{"role": role, "content": content} for role, content in answer]
            read = await self._encoded(partial(self._chat.continuation_ids, answer), [content for _, content in answer])
            if read is None or len(self._tokens) + len(read) >= limits.max_tokens:
                return self._end("max_tokens")
            if turn + 1 < limits.max_turns:
                await self._read(read)
        return "max_turns"

    async def _encoded(self, encode: Callable[[], list[int]], words: Sequence[str]) -> list[int] | None:
        """The token ids of words of the environment; None where so many bytes do not fit the rest of the episode.

        Words that the tokenizer or the template refuses end the episode.
        """
        size = size_of(words)
        if size > self._chat.most_bytes * (self._agent.limits.max_tokens - len(self._tokens)):
            return None
        try:
            return await off_loop(self._agent.run_environment, encode, size)
        except (ContentError, ConfigError) as error:
            raise EnvironmentFailed(str(error)) from error

    async def _sample(self, turn: int, max_tokens: int) -> tuple[int, ...]:
        """Sample a turn, or what is left of it where its beginning is known."""
        known: tuple[int, ...] = ()
        while self._known and isinstance(self._known[0], Sampled):
            known += tuple(self._take_up().token_ids)
        if known and (self._known or known[-1] in self._chat.stop_ids or len(known) >= max_tokens):
            return known
        sampling = self._sampling(max_tokens - len(known))
        generation = await self._agent.engine.generate(self._tokens, sampling, f"{self._id}/{turn}")
        self._tokens.extend(generation.output_ids)
        self.segments += sampled_segments(generation, sampling.temperature, self.segments)
        self._agent.report(self._id, self.segments)
        return known + generation.output_ids

    def _sampling(self, max_tokens: int) -> Sampling:
        """How to sample a turn; most are asked for as many tokens as the one before."""
        if self._asked_last is None or self._asked_last.max_tokens != max_tokens:
            self._asked_last = replace(self._agent.sampling, max_tokens=max_tokens, stop_token_ids=self._chat.stop_ids)
        return self._asked_last

    async def _read(self, ids: list[int]) -> None:
        if self._known:
            if self._take_up() != Context(token_ids=ids):
                self._answered_otherwise()
            return
        self._tokens.extend(ids)
        self.segments.append(Context(token_ids=ids))
        self._agent.report(self._id, self.segments)
        await self._save()

    async def _save(self) -> None:
        """Tell of the state of the environment, where it can be saved."""
        save, run, num_segments = self._agent.save, self._agent.run_environment, len(self.segments)
        if save is not None and self._asked.can_be_saved:
            environment = cast(SavedEnvironment, self._environment)
            state = await named(run, "save_state", environment.save_state)
            save(self._id, num_segments, await named(run, "save_state", partial(_json_of, state)))

    def _take_up(self) -> Segment:
        """Take up the next segment that is known."""
        segment = self._known.popleft()
        self._tokens.extend(segment.token_ids)
        self.segments.append(segment)
        return segment

    def _end(self, reason: str) -> str:
        return reason if not self._known else self._answered_otherwise()

    def _answered_otherwise(self) -> NoReturn:
        raise EnvironmentLost("the run went on from a checkpoint, and the environment answered otherwise than before it")


def _json_of(state: object) -> str:
    return json.dumps(state, allow_nan=False)


def sampled_segments(generation: Generation, temperature: float, before: Sequence[Segment] = ()) -> list[Sampled]:
    """One `Sampled` segment for each span of a generation; greedy ones count as temperature 1, as their log-probs do.

    Of the routing, what the segments `before` have already is left out.
    """
    last = next((i for i, one in reversed(list(enumerate(before))) if isinstance(one, Sampled)), -1)
    newest = cast(Sampled, before[last]) if last >= 0 else None
    num_read = sum(len(one.token_ids) for one in before[last + 1 :])
    found = []
    for span in generation.spans:
        segment = Sampled(
            token_ids=generation.output_ids[span.start : span.end],
            logp_mu=generation.logprobs[span.start : span.end],
            version=span.version,
            kv=span.kv,
            temperature=temperature or 1.0,
            routing=span.routing,
        )
        if span.routing is not None and goes_on(segment, newest):
            segment = replace(segment, routing=span.routing.last(num_read + len(segment.token_ids)))
        found.append(segment)
        newest, num_read = segment, 0
    return found
