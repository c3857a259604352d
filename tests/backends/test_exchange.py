"""Requests to an actor that travel together: how many calls they take, and what becomes of slow, failing and lost ones."""

import asyncio
import pickle

import pytest

from oldlogits.backends.ray import exchange as module
from oldlogits.backends.ray.exchange import Desk, Exchange
from oldlogits.backends.ray.remote_environments import AwaitingRunner, call_here, remote_class
from oldlogits.core.engine import Sampling
from oldlogits.core.trajectory import Trajectory
from oldlogits.envs.parsers.plain import PlainParser
from oldlogits.rollout.environment_errors import EnvironmentFailed
from oldlogits.rollout.environment_runner import run_inline
from oldlogits.rollout.turns import Agent, run_episode

from ..rollout.test_turns import CALL, CHAT, DEFAULT, Counter, ScriptedEngine
from ..waiting import HUNG_S


class Actor:
    """The actor's end in this process; `calls` has what every call brought, `error` is raised by the next ones."""

    def __init__(self, **methods):
        self.desk, self.calls, self.error = Desk(methods), [], None

    async def exchange(self, requests):
        self.calls.append([method for _, method, _ in requests])
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error
        return await self.desk.exchange(requests)


def run(scenario):
    return asyncio.run(asyncio.wait_for(scenario, HUNG_S))


def test_requests_of_one_moment_take_one_call_and_each_gets_its_own_answer():
    async def scenario():
        actor = Actor(double=lambda n: asyncio.sleep(0, 2 * n))
        asked = Exchange(actor.exchange)
        assert await asyncio.gather(*(asked.ask("double", n) for n in range(40))) == [2 * n for n in range(40)]
        assert actor.calls == [["double"] * 40]

    run(scenario())


def test_a_request_that_takes_long_holds_up_no_other_one_and_is_answered():
    async def scenario():
        ends = asyncio.Event()

        async def wait():
            await ends.wait()
            return "late"

        actor = Actor(wait=wait, quick=lambda: asyncio.sleep(0, "quick"))
        asked = Exchange(actor.exchange)
        slow = asked.ask("wait")
        assert await asked.ask("quick") == "quick", "of the same call"
        for _ in range(5):
            assert await asked.ask("quick") == "quick"
        assert not slow.done()
        ends.set()
        assert await slow == "late"
        await asyncio.sleep(4 * module.LINGER_S)
        assert not asked._on_way, "nothing is on its way where nobody waits"
        assert len(actor.calls) <= 1 + 5 + 2

    run(scenario())


def test_what_a_method_raises_is_raised_to_who_asked_and_what_cannot_be_sent_is_said_to_them_alone():
    async def scenario():
        async def fails():
            raise EnvironmentFailed("timed out")

        async def unsendable():
            return lambda: 0

        actor = Actor(fails=fails, unsendable=unsendable, fine=lambda x: asyncio.sleep(0, x))
        asked = Exchange(actor.exchange)
        failed, lost, fine = asked.ask("fails"), asked.ask("unsendable"), asked.ask("fine", 3)
        with pytest.raises(EnvironmentFailed, match="timed out"):
            await failed
        with pytest.raises(Exception, match="lambda"):
            await lost
        assert await fine == 3
        with pytest.raises((pickle.PicklingError, AttributeError)):
            asked.ask("fine", lambda: 0)
        assert await asked.ask("fine", 4) == 4

    run(scenario())


class Unreadable(Exception):
    """Python pickles it with its message alone, and cannot make it again of that."""

    def __init__(self, code, message):
        super().__init__(message)


def test_an_answer_that_cannot_be_read_is_told_to_who_asked_and_to_nobody_else():
    async def scenario():
        async def raises():
            raise Unreadable(3, "no such order")

        actor = Actor(raises=raises, returns=lambda: asyncio.sleep(0, Unreadable(3, "")), fine=lambda x: asyncio.sleep(0, x))
        asked = Exchange(actor.exchange)
        raised, returned, *fine = asked.ask("raises"), asked.ask("returns"), *(asked.ask("fine", n) for n in range(3))
        for one in (raised, returned):
            with pytest.raises(RuntimeError, match=r"cannot be read here: TypeError: .*__init__"):
                await one
        assert await asyncio.gather(*fine) == [0, 1, 2]
        assert await asked.ask("fine", 4) == 4

    run(scenario())


def test_an_exception_that_a_method_returns_is_a_value_as_anywhere_else():
    async def scenario():
        actor = Actor(returns=lambda: asyncio.sleep(0, ValueError("a result of a tool")))
        value = await Exchange(actor.exchange).ask("returns")
        assert isinstance(value, ValueError)

    run(scenario())


def test_the_end_of_the_actor_is_told_to_all_who_wait():
    async def scenario():
        actor = Actor(wait=asyncio.Event().wait)
        asked = Exchange(actor.exchange)
        waiting = [asked.ask("wait") for _ in range(3)]
        await asyncio.sleep(2 * module.LINGER_S)
        actor.error = ConnectionError("it ended")
        waiting.append(asked.ask("wait"))
        for one in waiting:
            with pytest.raises(ConnectionError, match="it ended"):
                await one

    run(scenario())


def test_episodes_that_play_at_the_same_time_take_less_than_half_the_calls_that_they_make_requests():
    class Environments:
        """A worker's environments, and a place for the episodes here."""

        def __init__(self):
            self.made, self.num_asked = {}, 0
            self.actor = Actor(open=self.make, call=self.carry_out)
            self.asked = Exchange(self.actor.exchange)

        async def make(self, id):
            self.made[id] = Counter()

        async def carry_out(self, id, method, args, kwargs):
            return await run_inline(lambda: call_here(self.made[id], method, args, kwargs, "declared"))

        async def choose(self):
            return self

        async def open(self, id):
            self.num_asked += 1
            self.asked.ask("open", id)

        async def call(self, *of):
            self.num_asked += 1
            return await self.asked.ask("call", *of)

        def drop(self, id):
            del self.made[id]

    async def scenario():
        there = Environments()
        environment = remote_class(Counter, there)

        def play(member):
            agent = Agent(
                engine=ScriptedEngine(CALL, CALL, "bye", "bye", "bye"),
                chat=CHAT,
                parser=PlainParser(),
                limits=DEFAULT,
                sampling=Sampling(max_tokens=1),
                run_environment=AwaitingRunner(latency_s=0.0, seed=0),
            )
            return run_episode(agent, environment, {"start": member}, id=f"g000001.{member}", group_id="g000001")

        outcomes = await asyncio.gather(*map(play, range(16)))
        assert all(isinstance(outcome, Trajectory) for outcome in outcomes), outcomes
        assert [outcome.reward for outcome in outcomes] == [4.0 + member for member in range(16)]
        num_turns, num_calls = sum(outcome.num_turns for outcome in outcomes), len(there.actor.calls)
        assert there.num_asked > 1.5 * num_turns, "each of which was a call"
        assert num_calls < there.num_asked / 2

    run(scenario())
