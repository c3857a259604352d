"""What an episode costs: hand-overs to threads and their deadlines, prompts that are rendered, signatures that are read."""

import inspect
import threading

import pytest

from oldlogits.core.environment import ChatOptions
from oldlogits.core.trajectory import Trajectory
from oldlogits.envs import tools
from oldlogits.models.chat.format import ChatFormat
from oldlogits.rollout import environment_runner
from oldlogits.rollout.environment_runner import ThreadRunner
from oldlogits.rollout.turns import Failure

from ..waiting import HUNG_S
from .test_turns import CALL, TOKENIZER, Counter, ScriptedEngine, play

TURNS = (CALL, CALL, "bye", "bye", "bye")
"""Two calls, then three messages, to the last of which nobody replies."""


@pytest.fixture
def handed_over(monkeypatch):
    """How often a call was handed over to a thread."""
    calls, submit = [], environment_runner.DaemonThreads.submit

    def counted(self, call):
        calls.append(call)
        submit(self, call)

    monkeypatch.setattr(environment_runner.DaemonThreads, "submit", counted)
    return calls


def in_threads(**settings):
    return ThreadRunner(**{"timeout_s": HUNG_S, "latency_s": 0.0, "seed": 0, **settings})


def test_a_turn_is_handed_over_once_and_so_are_the_beginning_and_the_end_of_an_episode(handed_over):
    outcome = play(ScriptedEngine(*TURNS), runner=in_threads())
    assert (outcome.stop_reason, outcome.num_turns) == ("done", len(TURNS))
    assert len(handed_over) == 1 + len(TURNS) + 1


def test_a_turn_whose_answer_is_delayed_is_handed_over_twice(handed_over):
    outcome = play(ScriptedEngine(*TURNS), runner=in_threads(latency_s=1e-6))
    assert outcome.stop_reason == "done"
    assert len(handed_over) == 1 + 2 * len(TURNS) + 1


def hanging(name):
    """A `Counter` that hangs in one of its methods, or in the text of what a tool returned."""
    ends = threading.Event()

    class Hangs:
        def __str__(self):
            return str(ends.wait())

    class Hanging(Counter):
        def __init__(self):
            super().__init__()
            if name == "the constructor":
                ends.wait()

        def add(self, amount: int):
            """Add a number."""
            return Hangs() if name == "the result of add" else ends.wait() if name == "add" else super().add(amount)

        def reply(self, message):
            return ends.wait() if name == "reply" else super().reply(message)

        def get_reward(self):
            return ends.wait() if name == "get_reward" else super().get_reward()

        def reset(self, *, start):
            return ends.wait() if name == "reset" else super().reset(start=start)

    return Hanging, ends


@pytest.mark.parametrize("name", ["the constructor", "reset", "add", "the result of add", "reply", "get_reward"])
def test_a_call_that_hangs_fails_at_its_deadline_by_its_own_name_whatever_it_is_handed_over_with(name):
    environment, ends = hanging(name)
    try:
        outcome = play(ScriptedEngine(*TURNS), environment=environment, runner=in_threads(timeout_s=0.05))
    finally:
        ends.set()
    assert isinstance(outcome, Failure)
    assert outcome.reason == f"{name}: timed out after 0.05 s"


def test_calls_that_are_handed_over_together_have_the_whole_deadline_each(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(environment_runner.time, "monotonic", lambda: now[0])

    class Slow(Counter):
        def __init__(self):
            super().__init__()
            now[0] += 20

        def reset(self, *, start):
            now[0] += 20
            return super().reset(start=start)

        def add(self, amount: int):
            """Add a number."""
            now[0] += 20
            return super().add(amount)

    outcome = play(ScriptedEngine(*TURNS), environment=Slow, runner=in_threads(timeout_s=30.0))
    assert isinstance(outcome, Trajectory), outcome


def test_the_members_of_a_group_render_their_prompt_once(monkeypatch):
    chat, rendered = ChatFormat(TOKENIZER, options=ChatOptions()), []
    write = chat._template._render
    monkeypatch.setattr(chat._template, "_render", lambda *a, **k: rendered.append(a) or write(*a, **k))
    first = chat.prompt_ids([("user", "hello 1")], "hello total")
    num = len(rendered)
    assert num > 0
    assert all(chat.prompt_ids([("user", "hello 1")], "hello total") == first for _ in range(7))
    assert len(rendered) == num
    first.clear()
    assert chat.prompt_ids([("user", "hello 1")], "hello total"), "each has its own"
    assert chat.prompt_ids([("user", "hello 2")], "hello total") != chat.prompt_ids("hello 1", "hello total")
    assert len(rendered) > num


def test_the_signature_of_a_tool_is_looked_at_once(monkeypatch):
    looked, signature = [], inspect.signature
    monkeypatch.setattr(tools.inspect, "signature", lambda *a, **k: looked.append(a) or signature(*a, **k))
    own = type("Own", (Counter,), {})
    assert play(ScriptedEngine(*TURNS), environment=own).num_turns == len(TURNS)
    num = len(looked)
    assert play(ScriptedEngine(*TURNS), environment=own).num_turns == len(TURNS)
    assert len(looked) == num
