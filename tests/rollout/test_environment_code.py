"""What environment code may return, raise and be: each is right, or refused in plain words."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from decimal import Decimal
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from oldlogits.core.engine import Generation, Sampling, Span
from oldlogits.core.trajectory import Context, TrajectoryGroup
from oldlogits.envs.base import check_environment, system_prompt_of
from oldlogits.envs.parsers.plain import PlainParser
from oldlogits.envs.tools import tool_schemas
from oldlogits.models.chat.content import most_bytes
from oldlogits.models.chat.format import ChatFormat
from oldlogits.objective.advantages import advantages_of
from oldlogits.rollout.asked import LONG
from oldlogits.rollout.environment_runner import ThreadRunner, run_inline
from oldlogits.rollout.turns import Agent, Failure, TurnLimits, run_episode
from order_desk.tiny import tiny_tokenizer

from ..builders import sampled, trajectory
from ..models.tokenizers import WITH_TOOLS, byte_level
from ..waiting import HUNG_S

TOKENIZER = byte_level(WITH_TOOLS)


class Bare:
    """Rewards what its class says."""

    reward: object = 1.0

    def reset(self):
        return "hello"

    def get_reward(self):
        return self.reward


class Engine:
    """Says one text after the other, then nothing."""

    def __init__(self, chat, *said):
        self._chat, self._said, self.prompts = chat, list(said), []

    async def generate(self, prompt_ids, sampling, request_id):
        self.prompts.append(tuple(prompt_ids))
        out = tuple(self._chat.turn_ids(self._said.pop(0) if self._said else "bye"))
        span = Span(version=0, start=0, end=len(out))
        return Generation(output_ids=out, logprobs=(-0.5,) * len(out), spans=(span,), finish_reason="stop")


def play(environment, *said, runner=run_inline, limit=4000, tool_errors="declared", tokenizer=TOKENIZER):
    """An episode; returns its outcome, and what the agent read turn by turn."""
    check_environment(environment)
    chat = ChatFormat(tokenizer, tool_schemas(environment), system_prompt_of(environment))
    engine = Engine(chat, *said)
    agent = Agent(
        engine=engine,
        chat=chat,
        parser=PlainParser(),
        limits=TurnLimits(max_turns=8, max_tokens_per_turn=200, max_tokens=limit),
        sampling=Sampling(max_tokens=8),
        run_environment=runner,
        tool_errors=tool_errors,
    )
    outcome = asyncio.run(asyncio.wait_for(run_episode(agent, environment, {}, id="g0.0", group_id="g0"), HUNG_S))
    segments = () if isinstance(outcome, Failure) else outcome.segments
    return SimpleNamespace(outcome=outcome, read=[chat.decode(s.token_ids) for s in segments if isinstance(s, Context)])


def rewarded(value):
    return play(type("Bare", (Bare,), {"reward": value})).outcome


@pytest.mark.parametrize(
    "value, reward",
    [
        (True, 1.0),
        (3, 3.0),
        (-2.5, -2.5),
        (1e8 + 1, 100000001.0),
        (np.float32(0.5), 0.5),
        (np.int64(7), 7.0),
        (np.bool_(True), 1.0),
        (np.array(0.25), 0.25),
        (torch.tensor(0.75), 0.75),
        (torch.tensor([2]), 2.0),
        (torch.tensor(True), 1.0),
        (Fraction(1, 4), 0.25),
        (10**15, 1e15),
    ],
)
def test_a_number_of_any_kind_is_a_reward(value, reward):
    assert rewarded(value).reward == reward


@pytest.mark.parametrize(
    "value, said",
    [
        (None, "NoneType None"),
        ("1.0", "str '1.0'"),
        (math.nan, "float nan"),
        (math.inf, "float inf"),
        (1e39, "float 1e+39"),
        (10**400, "int of 1329 bits"),
        (-(10**400), "int of 1329 bits"),
        (1j, "complex 1j"),
        (Decimal("0.5"), "Decimal Decimal('0.5')"),
        ([1.0], "list [1.0]"),
        (np.array([1.0, 2.0]), "ndarray array([1., 2.])"),
        (torch.tensor(math.nan), "Tensor tensor(nan)"),
        (torch.tensor([1.0, 2.0]), "Tensor tensor([1., 2.])"),
    ],
)
def test_anything_else_fails_the_episode_with_what_it_was(value, said):
    outcome = rewarded(value)
    assert isinstance(outcome, Failure)
    assert outcome.reason == f"get_reward returned {said}, not a number within +-1e+15"


def group(*rewards):
    members = [trajectory([1], sampled([2], 0), id=f"g0.{i}", group="g0", reward=r) for i, r in enumerate(rewards)]
    return TrajectoryGroup(id="g0", trajectories=tuple(members))


@pytest.mark.parametrize("base", [0.0, 1e8, -1e14])
def test_advantages_are_those_of_the_differences_however_large_the_rewards(base):
    found = advantages_of([group(base, base + 1)], "group-normalised")
    assert found == pytest.approx([-(0.5**0.5), 0.5**0.5], abs=2e-6)
    assert advantages_of([group(base, base + 1)], "mean-only") == [-0.5, 0.5]
    assert advantages_of([group(base, base + 1)], "leave-one-out") == [-1.0, 1.0]


def test_advantages_of_a_group_that_lost_members_are_those_of_the_members_left():
    found = advantages_of([group(0.0, 1.0, 1.0), group(2.0, 4.0)], "leave-one-out")
    assert found == pytest.approx([-1.0, 0.5, 0.5, -2.0, 2.0])


def test_advantages_of_the_largest_rewards_are_finite_in_float32():
    assert advantages_of([group(-1e15, 1e15)], "leave-one-out") == pytest.approx([-2e15, 2e15])
    assert np.isfinite(np.float32(advantages_of([group(-1e15, 1e15)], "group-normalised"))).all()


class Shop(Bare):
    """Tools that raise."""

    tool_errors = (ValueError,)

    def sell(self, what: str) -> str:
        """Sell."""
        raise {"tea": ValueError("no tea today"), "milk": KeyError("milk"), "air": ValueError()}[what]

    async def order(self, what: str) -> str:
        """Order."""
        await asyncio.sleep(0)
        return self.sell(what)

    def reply(self, message):
        return None


@pytest.mark.parametrize("runner", [run_inline, "threads"])
@pytest.mark.parametrize("tool", ["sell", "order"])
def test_a_declared_exception_is_an_answer_with_its_message_and_another_one_ends_the_episode(tool, runner):
    runner = ThreadRunner(timeout_s=HUNG_S, latency_s=0, seed=0) if runner == "threads" else runner
    found = play(Shop, f"<call> {tool} tea </call>", f"<call> {tool} air </call>", "bye", runner=runner)
    assert found.outcome.stop_reason == "done"
    assert "error : no tea today" in found.read[1]
    assert "error : ValueError" in found.read[2]
    failed = play(Shop, f"<call> {tool} milk </call>", runner=runner).outcome
    assert failed.reason == f"{tool}: KeyError: 'milk'"


def test_the_recipe_may_make_every_exception_an_answer_or_none():
    answered = play(Shop, "<call> sell milk </call>", "bye", tool_errors="answer")
    assert "error : 'milk'" in answered.read[1]
    assert play(Shop, "<call> sell tea </call>", tool_errors="fail").outcome.reason == "sell: ValueError: no tea today"


def test_a_reply_that_a_base_class_leaves_open_is_none():
    class Open(Bare):
        def reply(self, message):
            raise NotImplementedError

    assert play(Open, "hello").outcome.stop_reason == "done"


def test_without_tools_every_turn_is_a_message_also_one_that_looks_like_a_call():
    heard = []

    class Game(Bare):
        def reply(self, message):
            heard.append(message)
            return None if len(heard) == 2 else "go on"

    assert play(Game, "<call> sell tea </call>", "north").outcome.stop_reason == "done"
    assert heard == ["<call> sell tea </call>", "north"]


class OfItsRow(Bare):
    """The system prompt is set in reset."""

    system_prompt = "of the class"

    def reset(self):
        self.system_prompt = "of this <|im_end|> row"


class OfAProperty(Bare):
    @property
    def system_prompt(self):
        return "of a property"


class OfAMethod(Bare):
    def system_prompt(self):
        return "of a method"


@pytest.mark.parametrize(
    "environment, said",
    [(OfItsRow, "of this <|im_end|> row"), (OfAProperty, "of a property"), (OfAMethod, "of a method")],
)
def test_a_system_prompt_of_one_episode_is_what_the_agent_reads(environment, said):
    (first, *_) = play(environment).read
    assert first.startswith(f"<|im_start|>system\n{said}<|im_end|>")
    assert "object at" not in first
    assert "of the class" not in first


def test_a_system_prompt_that_a_base_class_leaves_open_is_none():
    def left_open(self):
        raise NotImplementedError

    assert play(type("Open", (Bare,), {"system_prompt": property(left_open)})).read[0].startswith("<|im_start|>user")


@pytest.mark.parametrize("value", [7, ["a"]])
def test_a_system_prompt_that_is_no_text_fails_the_episode(value):
    outcome = play(type("Odd", (Bare,), {"system_prompt": property(lambda self: value)})).outcome
    assert outcome.reason == f"system_prompt returned {type(value).__name__}, not text or None"


class Verbose(Bare):
    """Says too much."""

    said = "x" * 19_000_000

    def read(self) -> str:
        """Read."""
        return self.said

    def reply(self, message):
        return self.said


@pytest.mark.parametrize("turn", ["<call> read </call>", "hello"])
def test_a_text_that_cannot_fit_ends_the_episode_and_is_never_tokenised(turn, monkeypatch):
    longest, encode = [], type(TOKENIZER).encode

    def watched(self, text, **options):
        longest.append(len(text))
        return encode(self, text, **options)

    monkeypatch.setattr(type(TOKENIZER), "encode", watched)
    outcome = play(Verbose, turn).outcome
    assert (outcome.stop_reason, outcome.reward) == ("max_tokens", 1.0)
    assert max(longest) < 10_000


def test_a_first_prompt_that_cannot_fit_fails_with_its_bytes():
    outcome = play(type("Novel", (Bare,), {"reset": lambda self: "x" * 19_000_000})).outcome
    assert outcome.reason == "a prompt of 19,000,000 bytes fills the episode: raise env.max_episode_tokens (4000)"


def test_a_long_text_is_tokenised_where_environment_code_runs_and_a_short_one_is_not():
    calls = []

    async def runner(call, *, is_tool=False):
        calls.append(getattr(getattr(call, "func", call), "__name__", ""))
        return await run_inline(call)

    text = type("Text", (Verbose,), {"said": "word " * (LONG // 4)})
    play(text, "<call> read </call>", runner=runner, limit=100_000)
    assert calls.count("continuation_ids") == 8, "of every turn"
    calls.clear()
    play(type("Text", (Verbose,), {"said": "word"}), "<call> read </call>", runner=runner, limit=100_000)
    assert calls.count("continuation_ids") == 0


def test_the_most_bytes_of_a_token_are_known_where_nothing_of_a_text_is_lost():
    assert most_bytes(TOKENIZER) == max(len(token.encode()) for token in TOKENIZER.get_vocab())
    assert most_bytes(tiny_tokenizer(["hello"])) == math.inf, "a long unknown word is one token"


def held_up(monkeypatch, call, ended):
    """What a call returns when the event loop is held up from its start until long after it ended and its deadline."""

    async def main():
        loop, jumps = asyncio.get_running_loop(), []
        now = loop.time()
        monkeypatch.setattr(loop, "time", lambda: now + sum(jumps))
        running = asyncio.ensure_future(ThreadRunner(timeout_s=HUNG_S, latency_s=0, seed=0)(call))
        for _ in range(3):
            await asyncio.sleep(0)
        ended.wait(HUNG_S)
        jumps.append(10 * HUNG_S)
        return await running

    return asyncio.run(main())


def test_a_call_that_was_quick_is_no_time_out_when_the_event_loop_was_held_up(monkeypatch):
    ended = threading.Event()
    assert held_up(monkeypatch, lambda: ended.set() or 7, ended) == 7


def test_asynchronous_code_is_no_time_out_when_others_held_up_the_event_loop(monkeypatch):
    begun = threading.Event()

    async def step_by_step():
        for _ in range(20):
            await asyncio.sleep(0)
        return 7

    assert held_up(monkeypatch, lambda: begun.set() or step_by_step(), begun) == 7


def test_a_slow_constructor_is_named_and_counts_to_the_deadline():
    class Slow(Bare):
        def __init__(self):
            time.sleep(1.0)

    outcome = play(Slow, runner=ThreadRunner(timeout_s=0.05, latency_s=0, seed=0)).outcome
    assert outcome.reason == "the constructor: timed out after 0.05 s"
