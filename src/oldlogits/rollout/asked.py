"""An environment as its episode asks it: for tools, for what it says to a turn, for rewards; always through a runner."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, Protocol, TypeVar, cast

from oldlogits.core.environment import ConversingEnvironment, Environment, Row, TurnRewardingEnvironment
from oldlogits.core.errors import ConfigError, EnvironmentShapeError
from oldlogits.core.parser import Malformed, Parser
from oldlogits.envs.base import ToolErrors
from oldlogits.envs.given import checked_schemas, gives_tools, schemas_to_ask
from oldlogits.envs.rewards import takes_messages
from oldlogits.envs.text import readable, spoken
from oldlogits.envs.tools import BoundCall, calls_of, can_be_saved, render_result
from oldlogits.models.chat.format import ChatFormat
from oldlogits.models.chat.template import Said
from oldlogits.rollout.answers import reward_of, size_of, text_of
from oldlogits.rollout.environment_errors import EnvironmentFailed, Raised, answering, errors_of
from oldlogits.rollout.environment_runner import begin_next_call

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


async def named(run: EnvironmentRunner, name: str, call: Callable[[], T | Awaitable[T]], *, is_tool: bool = False) -> T:
    """Run environment code; a failure says which call it was."""
    try:
        return await run(call, is_tool=is_tool)
    except EnvironmentFailed as failure:
        failure.args = (f"{name}: {failure}",)
        raise


class HandOver:
    """Calls of environment code that are run together: each has the whole deadline, and a failure says which it was."""

    def __init__(self, run: EnvironmentRunner, name: str) -> None:
        self._run, self._name = run, name

    async def __call__(self, calls: Callable[[], T | Awaitable[T]], *, is_tool: bool = False) -> T:
        """Run the calls; what they return may be awaitable, as the last one's."""
        try:
            return await self._run(calls, is_tool=is_tool)
        except EnvironmentFailed as failure:
            failure.args = (f"{self._name}: {failure}",)
            raise

    def next(self, name: str) -> bool:
        """Say, where they are run, that another call begins; returns whether that may be a tool."""
        may_be_tool = begin_next_call()
        self._name = name
        return may_be_tool


async def off_loop(run: EnvironmentRunner, call: Callable[[], T], size: int) -> T:
    """Carry out a call whose time grows with the size of a text: a long one not on the event loop."""
    return await run(call) if size > LONG else call()


@dataclass(frozen=True, slots=True)
class _Written:
    """The result of a tool as the agent reads it."""

    text: str


_UNANSWERED: Final = object()
"""Of a turn that was read only."""


class AskedEnvironment:
    """One environment, and the runner of its code.

    Args:
        environment: The environment.
        run: Runs its code.
        parser: Reads the calls of turns.
        tool_errors: Says which exceptions of tools are answers.
    """

    def __init__(self, environment: Environment, run: EnvironmentRunner, parser: Parser, tool_errors: ToolErrors) -> None:
        cls = type(environment)
        self._environment, self._run, self._parser, self._tool_errors = environment, run, parser, tool_errors
        self._tools: list[Row] | None = None  # of this episode, where the environment describes them itself
        self._takes_messages, self.has_turn_reward = takes_messages(cls), hasattr(cls, "get_turn_reward")
        self.can_be_saved: Final = can_be_saved(cls) and not self._takes_messages and not self.has_turn_reward
        """Whether its state is all that a run needs to go on with the episode."""

    async def ask_for_tools(self, chat: ChatFormat) -> ChatFormat:
        """Take the tools of the episode, where the environment describes them itself; returns how they are written."""
        cls = type(self._environment)
        if not gives_tools(cls):
            return chat
        written = await named(self._run, "tool_schemas", schemas_to_ask(self._environment))
        try:
            self._tools = checked_schemas(written, cls.__name__)
            return await off_loop(self._run, partial(chat.for_tools, self._tools), LONG + 1)
        except (ConfigError, EnvironmentShapeError) as error:
            raise EnvironmentFailed(str(error)) from error

    async def answer(self, text: str) -> Sequence[Said] | None:
        """What the environment says to a turn: the results of its calls, a user's reply, or None at the end."""
        run, aloud = HandOver(self._run, "reading a turn"), spoken(text)
        calls: list[BoundCall | Malformed] = []

        def read() -> object:
            calls.extend(calls_of(self._parser, self._environment, aloud, self._tools) or self._reply_to(aloud))
            return self._carry_out(calls[0], run) if run.next("reading a turn") and calls else _UNANSWERED

        first, said = await run(read), []
        for call in calls:
            said.append(await self._said(call, await self._ask(call) if first is _UNANSWERED else first))
            first = _UNANSWERED
        return [one for one in said if one is not None] or None

    def _reply_to(self, aloud: str) -> list[BoundCall]:
        """The call of `reply` with a message, where there is that method."""
        if not hasattr(type(self._environment), "reply"):
            return []
        reply = partial(cast(ConversingEnvironment, self._environment).reply, aloud)
        return [BoundCall(name="reply", method="reply", run=reply)]

    async def _ask(self, call: BoundCall | Malformed) -> object:
        """Hand a call over by itself, which may be delayed."""
        if isinstance(call, Malformed):
            return call
        run = HandOver(self._run, call.name)
        return await run(partial(self._carry_out, call, run), is_tool=True)

    def _carry_out(self, call: BoundCall | Malformed, run: HandOver) -> object:
        """Carry out a call where environment code runs, and write what comes of a tool, unless it is to be waited for."""
        if isinstance(call, Malformed):
            return call
        run.next(call.name)
        result = answering(call.run, errors_of(type(self._environment), call.method, self._tool_errors))()
        if call.method == "reply" or isinstance(result, Raised) or inspect.isawaitable(result):
            return result
        run.next(f"the result of {call.name}")
        return _Written(render_result(result))

    async def _said(self, call: BoundCall | Malformed, result: object) -> Said | None:
        """What the agent reads of what came of a call; None where there is no reply."""
        if isinstance(call, Malformed):
            return "tool", readable(call.reason)
        if call.method == "reply":
            read = partial(text_of, "reply", result)
            heard = None if isinstance(result, Raised) else await off_loop(self._run, read, size_of(result))
            return None if heard is None else ("user", heard)
        if isinstance(result, Raised | _Written):
            return "tool", result.text
        if type(result) is str and len(result) <= LONG:
            return "tool", readable(result)
        return "tool", await named(self._run, f"the result of {call.name}", partial(render_result, result))

    async def reward(self, messages: Sequence[Mapping[str, str]]) -> float:
        """Ask for the reward at the end, for which the environment may want the messages."""
        ask: Callable[..., float] = self._environment.get_reward
        return await self._number(
            "get_reward", partial(ask, messages=list(map(dict, messages))) if self._takes_messages else ask
        )

    async def turn_reward(self) -> float:
        """Ask for the reward of a turn."""
        return await self._number("get_turn_reward", cast(TurnRewardingEnvironment, self._environment).get_turn_reward)

    async def _number(self, method: str, ask: Callable[[], float]) -> float:
        reward = await named(self._run, method, ask)
        size = 0 if type(reward) in (int, float, bool) else LONG + 1
        return await off_loop(self._run, partial(reward_of, reward, method), size)
