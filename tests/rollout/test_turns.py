"""Episodes with an engine that plays a script."""

import asyncio
import dataclasses
import json
from types import SimpleNamespace

import pytest

from oldlogits.core.engine import Generation, Sampling, Span, trajectory_of
from oldlogits.core.errors import WorkerDiedError
from oldlogits.core.trajectory import Context, Sampled, Trajectory
from oldlogits.envs.base import system_prompt_of
from oldlogits.envs.parsers.plain import PlainParser
from oldlogits.envs.tools import tool_schemas
from oldlogits.models.chat.format import ChatFormat
from oldlogits.rollout.environment_errors import EnvironmentFailed
from oldlogits.rollout.turns import Agent, Failure, TurnLimits, run_episode, sampled_segments
from order_desk.tiny import tiny_tokenizer

WORDS = (
    "add take show hello bye more 1 2 3 now total is ; takes amount but got "
    "error write one call as tool argument no tools are wants int"
)
TOKENIZER = tiny_tokenizer(WORDS.split())
CHAT = ChatFormat(TOKENIZER)
END = CHAT.end_of_turn_id
DEFAULT = TurnLimits(max_turns=8, max_tokens_per_turn=16, max_tokens=200)


def ids(text):
    return tuple(TOKENIZER.encode(text, add_special_tokens=False))


PLAYED = []
"""The environments that were made, in order."""


class Counter:
    """Adds up; the customer says "more" twice and then leaves."""

    system_prompt = "hello total"

    def __init__(self):
        self.total, self.calls, self.heard = 0, [], []
        PLAYED.append(self)

    def reset(self, *, start, notes=()):
        self.total, self.notes = start, notes
        return f"hello {start}"

    def get_reward(self):
        return float(self.total)

    def add(self, amount: int):
        """Add a number."""
        self.calls.append(amount)
        self.total += amount
        return f"total is {self.total}"

    async def take(self, amount: int):
        """Take a number away, by and by."""
        await asyncio.sleep(0)
        self.total -= amount
        return {"total": self.total}

    def reply(self, message):
        self.heard.append(message)
        return "more" if len(self.heard) < 3 else None


class Mute:
    """An environment without `reply` or system prompt; the opening may be None."""

    def reset(self):
        return None

    def get_reward(self):
        return 1.0

    def show(self):
        """Show."""
        return "1"


class ScriptedEngine:
    """Answers each request with the next entry: token ids, or (token ids, spans); or raises it."""

    def __init__(self, *script):
        self.script, self.requests = list(script), []

    async def generate(self, prompt_ids, sampling, request_id):
        await asyncio.sleep(0)
        self.requests.append(SimpleNamespace(prompt=tuple(prompt_ids), sampling=sampling, id=request_id))
        answer = self.script.pop(0)
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, str):
            answer = (*ids(answer), END)
        out, spans = answer if isinstance(answer[-1], list) else (answer, [Span(version=0, start=0, end=len(answer))])
        finish = "stop" if out[-1] == END else "length"
        logps = tuple(-0.01 * (i + 1) for i in range(len(out)))
        return Generation(output_ids=tuple(out), logprobs=logps, spans=tuple(spans), finish_reason=finish)


async def run_here(call, *, is_tool=False):
    """As the inline runner: whatever is raised ends the episode."""
    try:
        result = call()
        return await result if asyncio.iscoroutine(result) else result
    except Exception as error:
        raise EnvironmentFailed(f"{type(error).__name__}: {error}") from error


def chat_of(environment):
    return ChatFormat(TOKENIZER, tool_schemas(environment), system_prompt_of(environment))


def play(
    engine,
    *,
    limits=DEFAULT,
    environment=Counter,
    row=None,
    temperature=1.0,
    runner=run_here,
    report=lambda trajectory_id, segments: None,
):
    agent = Agent(
        engine=engine,
        chat=chat_of(environment),
        parser=PlainParser(),
        limits=limits,
        sampling=Sampling(max_tokens=1, temperature=temperature),
        run_environment=runner,
        report=report,
    )
    row = {"start": 1} if row is None else row
    return asyncio.run(run_episode(agent, environment, row, id="g000007.2", group_id="g000007"))


def tokens_of(trajectory):
    return tuple(i for segment in trajectory.segments for i in segment.token_ids)


CALL = "<call> add 2 </call>"


def test_whoever_watches_is_told_of_every_segment_as_soon_as_it_is_closed_before_the_next_request():
    told = []
    engine = ScriptedEngine((*ids("<call> add 2 </call>"), END), "bye", "bye", "bye")
    trajectory = play(engine, report=lambda name, segments: told.append((name, tuple(segments), len(engine.requests))))
    assert {name for name, _, _ in told} == {"g000007.2"}
    assert [segments for _, segments, _ in told] == [trajectory.segments[: i + 1] for i in range(8)]
    assert [requests for _, _, requests in told] == [0, 1, 1, 2, 2, 3, 3, 4], "the prompt before its request, a turn after it"
    assert {trajectory_of(request.id) for request in engine.requests} == {"g000007.2"}


def test_the_prompt_of_every_turn_is_every_earlier_token_as_it_was_sampled_or_read():
    odd = (*ids("<call>"), *ids("add"), *ids("2"), *ids("</call>"), END)  # tokenised by hand
    unknown = (ids("never-seen-word")[0], TOKENIZER.pad_token_id, END)  # decodes to text that reads differently
    engine = ScriptedEngine(odd, unknown, "bye", "bye")
    trajectory = play(engine)
    prompts = [request.prompt for request in engine.requests]
    outputs = [odd, unknown, (*ids("bye"), END), (*ids("bye"), END)]
    between = [CHAT.continuation_ids([("tool", "total is 3")]), *[CHAT.continuation_ids([("user", "more")])] * 2]
    for k in range(3):
        assert prompts[k + 1] == prompts[k] + outputs[k] + tuple(between[k])
    assert tokens_of(trajectory) == prompts[3] + outputs[3]
    assert [s.token_ids for s in trajectory.sampled] == outputs
    assert [type(s) for s in trajectory.segments] == [Context, Sampled] * 4


def test_the_first_prompt_is_the_chat_templates_with_system_prompt_opening_and_tools():
    engine = ScriptedEngine(CALL, "bye", "bye", "bye")
    play(engine, row={"start": 3})
    assert TOKENIZER.decode(engine.requests[0].prompt) == (
        "<system> hello total tools : add take <end> <user> hello 3 <end> <assistant>"
    )


def test_an_environment_without_system_prompt_opening_or_partner_works():
    engine = ScriptedEngine("<call> show </call>", "hello")
    trajectory = play(engine, environment=Mute, row={})
    assert TOKENIZER.decode(engine.requests[0].prompt) == "<user> tools : show <end> <assistant>"
    assert (trajectory.stop_reason, trajectory.reward, trajectory.num_turns) == ("done", 1.0, 2)


def test_tools_change_the_environment_and_async_ones_are_awaited():
    engine = ScriptedEngine(CALL, "<call> take 1 </call>", "bye", "bye", "bye")
    trajectory = play(engine)
    assert trajectory.reward == 1 + 2 - 1
    assert TOKENIZER.decode(trajectory.segments[2].token_ids) == "<tool> total is 3 <end> <assistant>"
    assert tuple(CHAT.continuation_ids([("tool", json.dumps({"total": 2}))])) == trajectory.segments[4].token_ids


def test_an_episode_ends_when_the_partner_leaves():
    engine = ScriptedEngine("hello", "hello", "bye")
    trajectory = play(engine)
    assert (trajectory.stop_reason, trajectory.num_turns) == ("done", 3)
    assert PLAYED[-1].heard == ["hello", "hello", "bye"]
    assert (trajectory.id, trajectory.group_id) == ("g000007.2", "g000007")
    assert [request.id for request in engine.requests] == ["g000007.2/0", "g000007.2/1", "g000007.2/2"]


@pytest.mark.parametrize(
    "text, observation",
    [
        ("<call> add 2", "error : write one call as <call> tool argument </call>"),
        ("now <call> add 2 </call>", "error : write one call as <call> tool argument </call>"),
        ("<call> total </call>", "error : no tool total ; tools are add take"),
        ("<call> reset 2 </call>", "error : no tool reset ; tools are add take"),
        ("<call> add hello </call>", 'error : add wants amount as int but got "hello"'),
        ("<call> add </call>", "error : add takes amount but got nothing"),
    ],
)
def test_a_malformed_call_is_answered_with_an_error_and_runs_nothing(text, observation):
    trajectory = play(ScriptedEngine(text, "bye", "bye", "bye"))
    assert trajectory.segments[2].token_ids == tuple(CHAT.continuation_ids([("tool", observation)]))
    assert PLAYED[-1].calls == []
    assert (trajectory.stop_reason, trajectory.reward) == ("done", 1.0)


def test_a_turn_count_limit_ends_the_episode_after_that_many_turns():
    trajectory = play(ScriptedEngine(*[CALL] * 3), limits=dataclasses.replace(DEFAULT, max_turns=3))
    assert (trajectory.stop_reason, trajectory.num_turns, trajectory.reward) == ("max_turns", 3, 7.0)


def test_a_turn_without_end_of_turn_ends_the_episode_and_is_trained_as_sampled():
    limits = dataclasses.replace(DEFAULT, max_tokens_per_turn=4)
    trajectory = play(ScriptedEngine("hello", ids("hello hello hello hello")), limits=limits)
    assert (trajectory.stop_reason, trajectory.num_turns) == ("turn_too_long", 2)
    assert trajectory.segments[-1].token_ids == ids("hello hello hello hello")


def test_every_turn_may_sample_as_much_as_is_left_but_no_more_than_a_turn_may():
    engine = ScriptedEngine(CALL, CALL, CALL, CALL)
    first = play(ScriptedEngine("bye", "bye", "bye"))
    prompt = len(first.segments[0].token_ids)
    answer = len(CHAT.continuation_ids([("tool", "total is 3")]))
    limits = TurnLimits(max_turns=8, max_tokens_per_turn=16, max_tokens=prompt + 2 * (5 + answer) + 7)
    trajectory = play(engine, limits=limits)
    assert [request.sampling.max_tokens for request in engine.requests] == [16, 16, 7]
    assert all(request.sampling.stop_token_ids == CHAT.stop_ids for request in engine.requests)
    assert trajectory.stop_reason == "max_tokens"


def test_an_episode_that_fills_up_in_mid_turn_stops_for_the_tokens_not_the_turn():
    first = play(ScriptedEngine("bye", "bye", "bye"))
    limits = TurnLimits(max_turns=8, max_tokens_per_turn=16, max_tokens=len(first.segments[0].token_ids) + 3)
    trajectory = play(ScriptedEngine(ids("hello hello hello")), limits=limits)
    assert (trajectory.stop_reason, trajectory.num_tokens) == ("max_tokens", limits.max_tokens)


def test_no_episode_is_longer_than_its_limit():
    first = play(ScriptedEngine("bye", "bye", "bye"))
    limits = TurnLimits(max_turns=8, max_tokens_per_turn=16, max_tokens=len(first.segments[0].token_ids) + 7)
    trajectory = play(ScriptedEngine(CALL), limits=limits)
    assert trajectory.stop_reason == "max_tokens"
    assert trajectory.num_tokens <= limits.max_tokens


def test_a_prompt_that_fills_the_episode_ends_that_episode_only():
    first = play(ScriptedEngine("bye", "bye", "bye"))
    limits = dataclasses.replace(DEFAULT, max_tokens=len(first.segments[0].token_ids))
    outcome = play(ScriptedEngine("bye"), limits=limits)
    assert isinstance(outcome, Failure)
    assert "fills the episode: raise env.max_episode_tokens" in outcome.reason


def test_a_switch_of_versions_in_mid_turn_begins_a_new_segment():
    spans = [Span(version=3, start=0, end=2), Span(version=4, start=2, end=4, kv="mixed"), Span(version=6, start=4, end=5)]
    out = (*ids(CALL), END)
    later = [((END,), [Span(version=version, start=0, end=1)]) for version in (6, 7)]
    limits = dataclasses.replace(DEFAULT, max_turns=3)
    trajectory = play(ScriptedEngine((out, spans), *later), limits=limits, temperature=0.7)
    first, second, third = list(trajectory.sampled)[:3]
    assert (first.token_ids, second.token_ids, third.token_ids) == (out[:2], out[2:4], out[4:])
    assert [s.version for s in trajectory.sampled] == [3, 4, 6, 6, 7]
    assert [s.kv for s in (first, second, third)] == ["fresh", "mixed", "fresh"]
    assert [s.logp_mu for s in (first, second, third)] == [(-0.01, -0.02), (-0.03, -0.04), (-0.05,)]
    assert {s.temperature for s in trajectory.sampled} == {0.7}
    assert (trajectory.versions, trajectory.num_turns) == ((3, 4, 6, 7), 3)


def test_greedy_tokens_count_as_temperature_1_as_their_log_probs_do():
    generation = Generation(output_ids=(5,), logprobs=(-1.0,), spans=(Span(version=0, start=0, end=1),), finish_reason="length")
    assert sampled_segments(generation, 0.0)[0].temperature == 1.0
    engine = ScriptedEngine("bye", "bye", "bye")
    assert {s.temperature for s in play(engine, temperature=0.0).sampled} == {1.0}
    assert {request.sampling.temperature for request in engine.requests} == {0.0}


def broken(name, result=None):
    """A `Counter` whose method `name` raises, or returns `result`."""

    def method(self, amount=None, *, start=None):
        if result is None:
            raise LookupError(f"{name} broke")
        return result

    method.__doc__ = "Broken."
    return type("Broken", (Counter,), {name: method})


@pytest.mark.parametrize("name", ["__init__", "reset", "add", "reply", "get_reward"])
def test_an_exception_of_the_environment_ends_its_episode_as_a_failure_with_the_reason(name):
    outcome = play(ScriptedEngine(CALL, "bye", "bye", "bye"), environment=broken(name))
    assert isinstance(outcome, Failure)
    called = "the constructor" if name == "__init__" else name
    assert (outcome.id, outcome.group_id, outcome.reason) == ("g000007.2", "g000007", f"{called}: LookupError: {name} broke")
    assert not outcome.begins_again
    assert (outcome.num_tokens > 0) == (name not in ("__init__", "reset")), "what it had sampled"


@pytest.mark.parametrize("row", [{}, {"start": 1, "unknown": 2}])
def test_a_row_that_does_not_fit_reset_is_a_failure(row):
    outcome = play(ScriptedEngine(), row=row)
    assert isinstance(outcome, Failure)
    assert outcome.reason.startswith("reset: TypeError")


@pytest.mark.parametrize(
    "name, result",
    [("get_reward", float("nan")), ("get_reward", "high"), ("add", {"set": {1}}), ("reset", 3), ("reply", 4)],
)
def test_a_value_that_no_environment_may_return_ends_its_episode_not_the_run(name, result):
    outcome = play(ScriptedEngine(CALL, "bye", "bye", "bye"), environment=broken(name, result))
    assert isinstance(outcome, Failure)


def test_an_environment_that_changes_its_row_does_not_change_that_of_others():
    row = {"start": 1, "notes": [1]}
    eager = type("Eager", (Counter,), {"get_reward": lambda self: float(self.notes.pop())})
    assert isinstance(play(ScriptedEngine("bye", "bye", "bye"), environment=eager, row=row), Trajectory)
    assert row == {"start": 1, "notes": [1]}


def test_a_dead_engine_ends_more_than_the_episode():
    with pytest.raises(WorkerDiedError, match="gone"):
        play(ScriptedEngine(CALL, WorkerDiedError("gone")))


def test_every_call_into_the_environment_goes_through_the_runner_and_only_tools_and_replies_may_be_delayed():
    seen = []

    async def runner(call, *, is_tool=False):
        seen.append(is_tool)
        return await run_here(call)

    play(ScriptedEngine(CALL, "<call> nothing </call>", "bye", "bye", "bye"), runner=runner)
    made, call, unreadable, message, reward = [False], [False, True], [False], [False, True], [False]
    assert seen == made + call + unreadable + message * 3 + reward, "what is not delayed reads a turn"


def test_every_episode_has_an_environment_of_its_own():
    PLAYED.clear()
    engine = ScriptedEngine(*[CALL, "bye", "bye", "bye"] * 2)
    assert [play(engine).reward for _ in range(2)] == [3.0, 3.0]
    assert len(PLAYED) == 2
