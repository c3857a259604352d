"""Environments that live elsewhere: a lost place costs a trajectory nothing, unless the environment answers otherwise."""

import asyncio
import gc

import pytest

from oldlogits.backends.ray.remote_environments import AwaitingRunner, PlaceLostError, call_here, remote_class
from oldlogits.core.engine import Sampling
from oldlogits.core.parser import ToolCall
from oldlogits.core.trajectory import Trajectory
from oldlogits.envs.base import REMOTE_PROMPT, load_environment, prompt_to_ask, system_prompt_of
from oldlogits.envs.given import REMOTE_TOOLS
from oldlogits.envs.parsers.hermes import HermesParser
from oldlogits.envs.tools import bind, tool_schemas
from oldlogits.models.chat.format import ChatFormat
from oldlogits.rollout.environment_errors import EnvironmentFailed, EnvironmentLost, Raised
from oldlogits.rollout.turns import Agent, TurnLimits, run_episode

from ..models.tokenizers import WITH_TOOLS, byte_level
from ..rollout.test_agents_words import Sampler


class Counter:
    """Counts."""

    system_prompt = "count"

    def reset(self, start):
        self.count = start
        return f"at {start}"

    def add(self, number: int) -> int:
        """Add a number.

        Args:
            number: What is added.
        """
        self.count += number
        if self.count > 100:
            raise ValueError("too much")
        return self.count

    def get_reward(self):
        return float(self.count)


class Place:
    """A place in this process."""

    def __init__(self, make=Counter):
        self.make, self.living, self.calls, self.is_lost = make, {}, [], False

    async def open(self, id):
        if self.is_lost:
            raise PlaceLostError
        self.living[id] = self.make()

    async def call(self, id, method, args, kwargs):
        if self.is_lost:
            raise PlaceLostError
        self.calls.append(method)
        try:
            return call_here(self.living[id], method, args, kwargs, "declared")
        except ValueError as error:
            raise EnvironmentFailed(str(error)) from error

    def drop(self, id):
        del self.living[id]


class Places:
    def __init__(self, *places):
        self.places = places

    async def choose(self):
        return next(place for place in self.places if not place.is_lost)


def play(places, *, lose_before=None, numbers=(1, 2, 3)):
    """Reset, add numbers, take the reward; the first place is lost before the addition of that number."""

    async def run():
        environment, runner = remote_class(Counter, places)(), AwaitingRunner(latency_s=0.0, seed=0)
        heard = [await runner(lambda: environment.reset(start=10))]
        for i, number in enumerate(numbers):
            if i == lose_before:
                places.places[0].is_lost = True
            heard.append(await runner(lambda number=number: environment.add(number), is_tool=True))
        return [*heard, await runner(environment.get_reward)]

    return asyncio.run(run())


def test_a_remote_class_has_the_tools_and_the_prompt_of_its_class():
    made = remote_class(Counter, Places(Place()))
    assert tool_schemas(made) == tool_schemas(Counter)
    assert system_prompt_of(made) == "count"


def test_environments_behind_another_one_their_tools_of_a_row_and_rewards_beside_the_class_live_elsewhere_too():
    made = load_environment("tests.envs.test_trl:SEVERAL", "trl", "tests.envs.test_trl:guess_reward")
    place, chat = Place(made), ChatFormat(byte_level(WITH_TOOLS))
    agent = Agent(
        engine=Sampler(chat, ['<tool_call>{"name": "guess", "arguments": {"word": "a"}}</tool_call>', "bye"]),
        chat=chat,
        parser=HermesParser(),
        limits=TurnLimits(max_turns=4, max_tokens_per_turn=1000, max_tokens=10_000),
        sampling=Sampling(max_tokens=1, temperature=1.0),
        run_environment=AwaitingRunner(latency_s=0.0, seed=0),
    )
    row = {"environment": "guess", "word": "a"}
    played = asyncio.run(run_episode(agent, remote_class(made, Places(place)), row, id="g.0", group_id="g"))
    assert isinstance(played, Trajectory), played
    assert '"guess"' in chat.decode(played.segments[0].token_ids)
    assert '{"found": true}' in chat.decode(played.segments[2].token_ids)
    assert played.reward == 1.0
    assert place.calls == ["reset", REMOTE_PROMPT, REMOTE_TOOLS, "call_tool", "get_reward"]


def test_calls_are_carried_out_in_the_place():
    place = Place()
    assert play(Places(place)) == ["at 10", 11, 13, 16, 16.0]
    assert place.calls == ["reset", "add", "add", "add", "get_reward"]


@pytest.mark.parametrize("lose_before", [0, 1, 2])
def test_after_a_place_is_lost_another_answers_as_if_nothing_had_happened(lose_before):
    first, second = Place(), Place()
    assert play(Places(first, second), lose_before=lose_before) == ["at 10", 11, 13, 16, 16.0]
    assert second.calls == ["reset", "add", "add", "add", "get_reward"], "the recorded calls, then those that follow"


def test_an_environment_that_answers_otherwise_is_not_the_one_that_the_trajectory_knows():
    class Other(Counter):
        def add(self, number):
            return super().add(number) + 1

    with pytest.raises(EnvironmentLost, match="add, called again, answered otherwise"):
        play(Places(Place(), Place(Other)), lose_before=1)


def test_an_environment_that_fails_when_called_again_is_lost_and_not_to_blame():
    class Broken(Counter):
        def reset(self, start):
            raise ValueError("no more")

    with pytest.raises(EnvironmentLost, match="reset, called again, failed: no more"):
        play(Places(Place(), Place(Broken)), lose_before=1)


def test_its_own_failure_ends_the_episode():
    with pytest.raises(EnvironmentFailed, match="too much") as caught:
        play(Places(Place()), numbers=(1, 200))
    assert not isinstance(caught.value, EnvironmentLost)


@pytest.mark.slow
def test_what_nobody_needs_any_more_is_dropped():
    place = Place()
    play(Places(place))
    gc.collect()
    assert place.living == {}


class Kinds(Counter):
    """Tools of every kind, a declared exception, and a system prompt of the episode."""

    tool_errors = (ZeroDivisionError,)

    def reset(self, start):
        self.system_prompt = f"from {start}"
        return super().reset(start)

    @staticmethod
    def half(number: int) -> int:
        """Halve."""
        return number // 2

    @classmethod
    def name(cls, suffix: str) -> str:
        """Name."""
        return cls.__name__ + suffix

    def divide(self, by: int) -> float:
        """Divide."""
        return self.count / by


def test_static_and_class_methods_declared_exceptions_and_the_prompt_of_the_episode_are_those_of_the_place():
    place = Place(Kinds)

    class One:
        async def choose(self):
            return place

    async def main():
        cls = remote_class(Kinds, One())
        assert tool_schemas(cls) == tool_schemas(Kinds)
        environment = cls()
        await environment.reset(4)
        assert await prompt_to_ask(environment)() == "from 4"
        assert await bind(environment, ToolCall(name="half", named={"number": 9}))() == 4
        assert await bind(environment, ToolCall(name="name", named={"suffix": "!"}))() == "Kinds!"
        return await bind(environment, ToolCall(name="divide", named={"by": 0}))()

    assert asyncio.run(main()) == Raised("error : division by zero")
    assert {"half", "name", "divide"} <= set(place.calls)
