"""The conversations of one episode of an agent program: which tokens a request goes on from, and what it samples.

    request: messages m0 .. mn --> the longest beginning that ended with a turn which was sampled here
        its tokens, as they were sampled and read, then the new messages --> engine --> the turn, and a point to go on from

    at the end of its branch   the branch grows                                            continued
    within a branch            a new branch, whose context are the tokens up to there      forked
    nowhere                    a new branch, encoded from its text; "rewritten" where it   opened, rewritten
                               begins like one that was read before, and differs later

What was sampled is a `Sampled` segment of one branch, and context in every other one: no token is trained twice. A request that
nobody waits for any more leaves no trace in its branch.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final, Literal, cast

from oldlogits.core.engine import Generation, Sampling
from oldlogits.core.errors import ConfigError, ContentError, OldLogitsError
from oldlogits.core.trajectory import Branches, Context, Sampled, Segment, Trajectory, branch_id
from oldlogits.engines.chat_api.formats import ChatFormats, as_written, digests_of, next_digest, raised, refusal_or
from oldlogits.engines.chat_api.messages import ApiError, ChatAnswer, ChatMessage, ChatRequest, Turn
from oldlogits.engines.chat_api.turn import answer_of, read_turn
from oldlogits.engines.chat_api.wishes import Rules
from oldlogits.models.chat.format import ChatFormat
from oldlogits.rollout.answers import size_of
from oldlogits.rollout.asked import off_loop
from oldlogits.rollout.environment_errors import EnvironmentFailed
from oldlogits.rollout.environment_runner import attempt
from oldlogits.rollout.gateway.counts import GatewayCounts
from oldlogits.rollout.turns import Agent, sampled_segments

Rewritten = Callable[[str, int, str, int], None]
"""Told of a conversation that goes on with other messages: the branch, the first that differs, its role, the tokens encoded."""

_OVER: Final = 403


@dataclass(slots=True, kw_only=True, eq=False)
class _Branch:
    """One sequence of tokens. `tip` is its newest turn's end.

    Nothing else goes on from it while it `is_busy`: a request samples, or `is_withdrawn` and what it sampled is put away.
    """

    id: str
    tokens: array[int] = field(default_factory=lambda: array("i"))
    segments: list[Segment] = field(default_factory=list)
    tip: _Point | None = None
    is_busy: bool = True
    is_withdrawn: bool = False
    num_requests: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Point:
    """The end of a turn that was sampled: the first `num_tokens` of a branch; one that `is_cut` has no end-of-turn token."""

    branch: _Branch
    num_tokens: int
    is_cut: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Where a request goes on: how, in which branch, after what, and how what follows is encoded.

    Args:
        num_read: Messages that were read before, from the first on; less than all of them in a rewritten conversation.
        size: Bytes of what is said in the messages that are encoded.
        size_of_calls: Bytes of the calls and tools that are encoded beside them.
    """

    kind: Literal["opened", "continued", "forked", "rewritten"]
    branch: _Branch
    encode: Callable[[], list[int]]
    size: int
    size_of_calls: int = 0
    is_cut: bool = False
    num_read: int = 0


class Conversations:
    """The conversations of one episode.

    Args:
        id: The episode's id.
        agent: Engine, parser, limits and sampling; who follows the tokens.
        formats: How conversations are written.
        rules: What requests may ask.
        counts: Counts what is asked for.
        rewritten: Is told of conversations that go on with other messages.
    """

    def __init__(
        self, id: str, agent: Agent, formats: ChatFormats, rules: Rules, counts: GatewayCounts, rewritten: Rewritten
    ) -> None:
        self._id, self._agent, self._formats, self._rules = id, agent, formats, rules
        self._counts, self._rewritten = counts, rewritten
        self._branches: list[_Branch] = []
        self._points: dict[bytes, _Point] = {}  # by the digest of tools and messages up to a turn
        self._read: set[bytes] = set()  # digests of all that was read
        self._sampling: dict[str, asyncio.Task[Generation]] = {}  # by the name of the request to the engine
        self._given_up: set[asyncio.Task[None]] = set()
        self._num_turns = 0
        self._engine_error: BaseException | None = None
        self.stop_reason = "done"
        self.is_over = False
        self.failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Fails with what ends the run, or with what environment code raised."""

    @property
    def ids(self) -> list[str]:
        """The ids of all branches."""
        return [branch.id for branch in self._branches]

    @property
    def num_sampled(self) -> int:
        """Sampled tokens of all branches."""
        segments = (segment for branch in self._branches for segment in branch.segments)
        return sum(len(segment.token_ids) for segment in segments if isinstance(segment, Sampled))

    async def answer(self, request: ChatRequest) -> ChatAnswer:
        """Sample the next turn of a conversation.

        Raises:
            ApiError: The request is refused.
        """
        try:
            return await self._answer(request)
        except ApiError as error:
            self._counts.refused[error.code] += 1
            raise
        except (ConfigError, ContentError) as error:
            self._counts.refused["invalid_request"] += 1
            raise _refusal(str(error)) from error
        except (asyncio.CancelledError, GeneratorExit):
            raise
        except BaseException as error:  # supervision: who plays the episode raises it
            if not self.failure.done():
                said = EnvironmentFailed(f"a request could not be read: {type(error).__name__}: {error}")
                is_own = isinstance(error, OldLogitsError | EnvironmentFailed) or error is self._engine_error
                self.failure.set_exception(error if is_own else said)
            raise ApiError(
                "the turn could not be sampled", got=str(error)[:300], allowed="", fix="see the run", status=500, code="failed"
            ) from error

    async def close(self) -> None:
        """Refuse what is still asked, and give up what is being sampled."""
        self.is_over = True
        while self._sampling or self._given_up:
            for name in list(self._sampling):
                with suppress(OldLogitsError):  # the engine has ended
                    await self._agent.engine.abort(name)
            await asyncio.gather(*self._sampling.values(), *self._given_up, return_exceptions=True)
            await asyncio.sleep(0)  # whoever waits for these goes on
        if self.failure.done() and not self.failure.cancelled():
            self.failure.exception()  # seen

    def trajectories(self, group_id: str, reward: float) -> Branches:
        """Return every branch in which something was sampled."""
        sampled = [branch for branch in self._branches if any(isinstance(s, Sampled) for s in branch.segments)]
        return tuple(
            Trajectory(id=b.id, group_id=group_id, segments=tuple(b.segments), reward=reward, stop_reason=self.stop_reason)
            for b in sampled
        )

    async def _answer(self, request: ChatRequest) -> ChatAnswer:
        self._check_open(request)
        self._num_turns += 1
        try:
            turn = await self._sampled(request)
        except BaseException:
            self._num_turns -= 1  # only turns that are trained count
            raise
        return await self._read_by(request, *turn)

    async def _sampled(self, request: ChatRequest) -> tuple[_Place, ChatFormat, bytes, array[int], Generation]:
        """Find where a request goes on, and sample its turn, which is trained from then on: whoever leaves, it counts."""
        sampling = self._rules.sampling(self._agent.sampling, request.wishes, self._counts.overridden)
        digests = digests_of(request)
        chat = await self._formats.of(digests[0], request.tools, self._agent.run_environment)
        place = self._place(request, digests, chat)
        branch, limits = place.branch, self._agent.limits
        try:
            read = await self._encoded(place, chat, digests[-1])
            room = limits.max_tokens - len(branch.tokens) - len(read)
            if room <= 0:
                raise _too_long(f"{len(branch.tokens) + len(read):,} tokens", limits.max_tokens)
            self._read.update(digests[1:])
            if place.kind == "rewritten":
                self._counts.encoded_anew += len(read)
                self._rewritten(branch.id, place.num_read, request.messages[place.num_read].role, len(read))
            most = min(request.wishes.max_tokens or room, room, limits.max_tokens_per_turn)
            stops = replace(sampling, max_tokens=most, stop_token_ids=chat.stop_ids)
            generation, prompt = await self._sample(branch, read, stops)
        except BaseException:
            branch.is_busy = branch.is_withdrawn
            raise
        self._counts.requests[place.kind] += 1
        return place, chat, digests[-1], prompt, generation

    async def _read_by(
        self, request: ChatRequest, place: _Place, chat: ChatFormat, digest: bytes, prompt: array[int], generation: Generation
    ) -> ChatAnswer:
        """Read a turn that was sampled, so that what its client sends back goes on from it."""
        branch, is_whole = place.branch, generation.finish_reason == "stop"
        try:
            text = chat.decode(generation.output_ids)
            read = partial(attempt, partial(read_turn, text, self._agent.parser, request.tools, is_whole=is_whole))
            turn = cast(Turn, await off_loop(self._agent.run_environment, read, len(text)))  # parsers may be the user's code
            said = ChatMessage(role="assistant", content=turn.content, calls=turn.calls)
            point = _Point(branch=branch, num_tokens=len(branch.tokens), is_cut=not is_whole)
            branch.tip = self._points[next_digest(digest, said)] = point
        finally:
            branch.is_busy = False
        return answer_of(chat, request, prompt, generation, turn)

    async def _encoded(self, place: _Place, chat: ChatFormat, digest: bytes) -> list[int]:
        """The tokens that a request adds to its branch."""
        begins, prompts = not place.branch.tokens, self._formats.prompts
        if begins and (kept := prompts.get(digest)) is not None:
            return kept
        if place.size > chat.most_bytes * (self._agent.limits.max_tokens - len(place.branch.tokens)):
            raise _too_long(f"{place.size:,} bytes", self._agent.limits.max_tokens)
        size, encode = place.size + place.size_of_calls, partial(refusal_or, place.encode)
        read = raised(await off_loop(self._agent.run_environment, encode, size))
        if begins:
            self._counts.unknown_tokens += read.count(chat.unknown_id)
            prompts.keep(digest, read)
        return [chat.end_of_turn_id, *read] if place.is_cut else read

    def _check_open(self, request: ChatRequest) -> None:
        if self.is_over:
            raise _ended()
        if self._num_turns >= self._agent.limits.max_turns:
            self.stop_reason = "max_turns"
            most = self._agent.limits.max_turns
            raise _over("the episode has had all of its turns", f"turn {most + 1}", f"env.max_turns = {most}", "max_turns")
        if request.messages[-1].role == "assistant":
            raise _refusal("the last message is the assistant's: a turn is sampled whole, and not begun by the client")

    def _place(self, request: ChatRequest, digests: Sequence[bytes], chat: ChatFormat) -> _Place:
        """Find the tokens that a request goes on from."""
        messages = request.messages
        for num in range(len(messages) - 1, 0, -1):
            point = self._points.get(digests[num])
            if point is None:
                continue
            following = [(m.role, m.content) for m in messages[num:] if m.role != "assistant"]
            if len(following) < len(messages) - num:
                break  # a turn that was not sampled here
            encode, size = partial(chat.continuation_ids, following), sum(size_of(words) for _, words in following)
            if point.branch.tip is point and not point.branch.is_busy:
                point.branch.is_busy = True
                return _Place(kind="continued", branch=point.branch, encode=encode, size=size, is_cut=point.is_cut)
            fork = self._new_branch()
            fork.tokens += point.branch.tokens[: point.num_tokens]
            fork.segments.append(Context(token_ids=fork.tokens))
            return _Place(kind="forked", branch=fork, encode=encode, size=size, is_cut=point.is_cut)
        written = [as_written(m, self._agent.parser, chat) for m in messages]
        num_read = next((i for i, digest in enumerate(digests[1:]) if digest not in self._read), len(messages))
        is_known = num_read and messages[num_read - 1].role != "system"
        return _Place(
            kind="forked" if num_read == len(messages) else "rewritten" if is_known else "opened",
            branch=self._new_branch(),
            encode=partial(chat.conversation_ids, written),
            size=sum(size_of(message.content) for message in messages),
            size_of_calls=size_of(request.tools)
            + sum(size_of((call.name, call.arguments)) for message in messages for call in message.calls),
            num_read=num_read,
        )

    def _new_branch(self) -> _Branch:
        branch = _Branch(id=branch_id(self._id, len(self._branches)))
        self._branches.append(branch)
        return branch

    async def _sample(self, branch: _Branch, read: list[int], sampling: Sampling) -> tuple[Generation, array[int]]:
        """Sample on from a branch; where nobody waits any more, the branch is as it was."""
        if self.is_over:
            raise _ended()
        before, prompt = branch.segments, branch.tokens + array("i", read)
        is_fork = len(before) == 1  # whose context goes on
        context = Context(token_ids=prompt if is_fork else read)
        branch.segments = [context] if is_fork else [*before, context]
        self._agent.report(branch.id, branch.segments)
        name, branch.num_requests = f"{branch.id}/{branch.num_requests}", branch.num_requests + 1
        sampled = self._sampling[name] = asyncio.create_task(self._agent.engine.generate(prompt, sampling, name))
        try:
            generation = await asyncio.shield(sampled)
            if self.is_over or not generation.output_ids:
                raise _ended()
        except BaseException as error:
            self._engine_error = error
            self._give_up(branch, before, sampled, name)
            raise
        finally:
            self._sampling.pop(name, None)
        branch.tip, branch.tokens = None, prompt + array("i", generation.output_ids)
        branch.segments += sampled_segments(generation, sampling.temperature, branch.segments)
        self._agent.report(branch.id, branch.segments)
        return generation, prompt

    def _give_up(self, branch: _Branch, before: list[Segment], sampled: asyncio.Task[Generation], name: str) -> None:
        """Leave the branch as it was before a request, and count what was sampled for it."""

        async def end() -> None:
            if not sampled.done():
                with suppress(OldLogitsError):  # the engine has ended
                    await self._agent.engine.abort(name)
            ended = (await asyncio.gather(sampled, return_exceptions=True))[0]
            self._counts.dropped_answers += 1
            self._counts.dropped_tokens += len(ended.output_ids) if isinstance(ended, Generation) else 0
            self._agent.withdraw(branch.id, before)
            branch.is_busy = branch.is_withdrawn = False

        branch.segments, branch.is_withdrawn = before, True
        task = asyncio.create_task(end())
        self._given_up.add(task)
        task.add_done_callback(self._given_up.discard)


def _refusal(said: str) -> ApiError:
    return ApiError(said, got="this request", allowed="a conversation that the chat template can write", fix="correct it")


def _over(what: str, got: str, allowed: str, code: str = "episode_over") -> ApiError:
    return ApiError(what, got=got, allowed=allowed, fix="end the program", status=_OVER, code=code)


def _ended() -> ApiError:
    return _over("the episode is over", "a request after its end", "requests until the program has ended")


def _too_long(size: str, most: int) -> ApiError:
    return ApiError(
        "the conversation fills the context",
        got=size,
        allowed=f"fewer than env.max_episode_tokens = {most:,}",
        fix="shorten it, or raise the key",
        code="context_length_exceeded",
    )
