"""Whatever an agent samples, and whatever an environment says: an observation or an end, never an exception."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oldlogits.core.engine import Generation, Sampling, Span
from oldlogits.core.parser import PARSERS
from oldlogits.core.trajectory import Context, Trajectory
from oldlogits.envs.tools import tool_schemas
from oldlogits.models.chat.format import ChatFormat
from oldlogits.record.episodes import EpisodeRecorder, read_episodes
from oldlogits.record.event_log import EventLog, read_events
from oldlogits.record.events import Evaluated, TrajectoryFailed
from oldlogits.record.jsonl import LineFile
from oldlogits.rollout.environment_runner import run_inline
from oldlogits.rollout.turns import Agent, Failure, TurnLimits, run_episode

from ..models.tokenizers import CONTROL, WITH_TOOLS, byte_level, metaspace


class Echo:
    """Says what it is told."""

    def reset(self, said="hello"):
        self._said = said
        return said

    def get_reward(self):
        return 1.0

    def say(self, text: str, times: int = 1) -> str:
        """Say it."""
        return text * min(times, 3)

    def give(self, value: dict | list | float, kind: Literal["a", "b"] = "a") -> object:
        """Give it back."""
        return {"kind": kind, "value": value}

    def reply(self, message):
        return message or self._said


TOKENIZERS = {"byte-level": byte_level(WITH_TOOLS), "metaspace": metaspace("first", WITH_TOOLS)}
CHATS = {name: ChatFormat(tokenizer, tool_schemas(Echo), "be kind") for name, tokenizer in TOKENIZERS.items()}
NUM_TURNS = 4
NUM_RECORDED = 100

SCRAPS = st.sampled_from(
    [
        *CONTROL,
        *("<tool_call>", "</tool_call>", "<think>", "</think>", "<call>", "</call>", "say", "give", "nothing", " ", "\n"),
        *(
            '{"name": "say", "arguments": {"text": "',
            '{"name": "give", "arguments": {"value": ',
            '"}}',
            "}}",
            "{",
            "}",
            "[",
            "]",
        ),
        *('{"name": "say", "parameters": {"text": "x"}}', '{"name": "say"}', '{"name": 3}', '"', ",", ":", "null", "\\"),
        *("\\ud800", "\\udfff\\ud800", "\\u0000", "\ufeff", "\u2028", "NaN", "-Infinity", "1e999", "9" * 4400, "é", "🙂"),
        *("[" * 1200, "]" * 1200, '{"a":' * 1200, "}" * 1200, "[" * 60, "]" * 60, '{"value": ', "self", "__class__", "reset"),
    ]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=6) | SCRAPS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(), max_size=4), inner, max_size=2),
    max_leaves=6,
)
NAMES = st.sampled_from(["say", "give", "reset", "get_reward", "_said", "\ud800", ""])
CALLS = st.builds(
    lambda name, key, value, ascii: f"<tool_call>{json.dumps({'name': name, key: value}, ensure_ascii=ascii)}</tool_call>",
    NAMES,
    st.sampled_from(["arguments", "parameters", "args"]),
    st.dictionaries(st.sampled_from(["text", "times", "value", "kind", "\ud800"]), VALUES, max_size=3) | VALUES,
    st.booleans(),
)
TEXTS = st.lists(SCRAPS | CALLS, max_size=6).map("".join).map(lambda text: text.encode("utf-8", "replace").decode())
TURNS = st.lists(TEXTS | st.lists(st.integers(0, 500), max_size=12), min_size=NUM_TURNS, max_size=NUM_TURNS)
"""What is sampled: texts, or any ids, some of which no token has."""


class Sampler:
    """Samples a script; a turn ends with the end of turn unless it says otherwise itself."""

    def __init__(self, chat, turns):
        self._chat, self._turns = chat, iter(turns)

    async def generate(self, prompt_ids, sampling, request_id):
        turn = next(self._turns)
        ids = self._chat._encoder.encode(turn) if isinstance(turn, str) else turn
        end = next((i for i, id in enumerate(ids) if id in sampling.stop_token_ids), len(ids))
        ids = (*ids[:end], ids[end] if end < len(ids) else self._chat.end_of_turn_id)
        span = Span(version=0, start=0, end=len(ids))
        return Generation(output_ids=ids, logprobs=(-1.0,) * len(ids), spans=(span,), finish_reason="stop")


def play(chat, parser, turns, row=None, environment=Echo):
    agent = Agent(
        engine=Sampler(chat, turns),
        chat=chat,
        parser=PARSERS.find(parser)(),
        limits=TurnLimits(max_turns=NUM_TURNS, max_tokens_per_turn=10**6, max_tokens=10**6),
        sampling=Sampling(max_tokens=1, temperature=1.0),
        run_environment=run_inline,
    )
    playing = run_episode(agent, environment, row or {}, id="g.0", group_id="g")
    try:
        playing.send(None)
    except StopIteration as end:
        return end.value
    raise AssertionError("nothing here waits")


def check_agents_words(name, parser, turns):
    chat = CHATS[name]
    played = play(chat, parser, turns)
    assert isinstance(played, Trajectory), played
    assert played.stop_reason in ("done", "max_turns")
    allowed = [chat._between("user")[1], *(chat._between(*["tool"] * num)[1] for num in range(1, 40))]
    scaffold = {chat.end_of_turn_id, *allowed[0], *allowed[1]}
    for segment in played.segments[1:]:
        if isinstance(segment, Context):
            assert [i for i in segment.token_ids if i in scaffold] in allowed, "no turn is forged"
    return played


def check_records(folder, played):
    """What is written of episodes and failures is read back."""
    decode = CHATS["byte-level"].decode
    with LineFile(folder / "episodes.jsonl") as file, EventLog(folder / "events.jsonl") as log:
        recorder = EpisodeRecorder(file, decode, every=0)
        for outcome in played:
            if isinstance(outcome, Failure):
                log.emit(TrajectoryFailed(version=0, trajectory=outcome.id, stage="train", reason=outcome.reason))
            else:
                rewards = [outcome.reward]
                figures = {"mean": 1.0, "low": 0.0, "high": 1.0, "num_episodes": 1, "rewards": rewards, "seconds_s": 0.0}
                figures |= {"reward_mean": 1.0, "reward_low": 0.0, "reward_high": 1.0, "success_at": 1.0}
                recorder.emit(Evaluated(version=0, stage="before", mode="sampled", trajectories=[outcome], **figures))
    texts = [[s.text for s in episode.segments] for episode in read_episodes(folder / "episodes.jsonl")]
    assert texts == [[decode(s.token_ids) for s in p.segments] for p in played if isinstance(p, Trajectory)]
    reasons = [event.reason for event in read_events(folder / "events.jsonl")]
    assert reasons == [p.reason for p in played if isinstance(p, Failure)]


PARSERS_AND_TOKENIZERS = pytest.mark.parametrize(
    ("name", "parser"),
    [
        ("byte-level", "hermes"),
        ("byte-level", "plain"),
        ("metaspace", "hermes"),
        ("metaspace", "llama"),
        ("byte-level", "qwen-coder"),
    ],
)


@pytest.mark.slow
@PARSERS_AND_TOKENIZERS
@settings(max_examples=12)
@given(turns=TURNS)
def test_whatever_an_agent_samples_is_answered_or_ends_the_episode(name, parser, turns):
    check_agents_words(name, parser, turns)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@PARSERS_AND_TOKENIZERS
def test_whatever_an_agent_samples_is_answered_and_recorded_in_100_000_turns(name, parser, tmp_path):
    played = []

    @settings(max_examples=100_000 // NUM_TURNS // 3 + 1)
    @given(turns=TURNS)
    def check(turns):
        outcome = check_agents_words(name, parser, turns)
        if len(played) < NUM_RECORDED and sum(len(s.token_ids) for s in outcome.segments) < 1000:
            played.append(outcome)

    check()
    check_records(tmp_path, played)


ANY_TEXT = st.text(st.characters(), max_size=10) | st.sampled_from([*CONTROL, "\ud800", "<tool_call>", "nan"])


@settings(max_examples=10)
@given(
    said=ANY_TEXT | st.none(), given=VALUES, ends=st.sampled_from([ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
)
def test_whatever_an_environment_says_is_shown_or_ends_its_episode(said, given, ends):
    class Any(Echo):
        def say(self, text: str) -> object:
            """Say it."""
            if text == "raise":
                raise ends(said)
            return given

    with tempfile.TemporaryDirectory() as folder:
        calls = [f'<tool_call>{{"name": "say", "arguments": {{"text": "{text}"}}}}</tool_call>' for text in ("x", "raise")]
        played = [
            play(CHATS["byte-level"], "hermes", turns, {"said": said}, Any) for turns in ([calls[0], "a", "b", "c"], calls)
        ]
        assert [type(outcome) for outcome in played] == [Trajectory, Failure]
        check_records(Path(folder), played)


def observations(*turns, parser="hermes"):
    """What the agent is told after each turn."""
    chat = CHATS["byte-level"]
    played = play(chat, parser, [*turns, *["bye"] * (NUM_TURNS - len(turns))])
    said = [chat.decode(s.token_ids) for s in played.segments if isinstance(s, Context)][1 : len(turns) + 1]
    return [text.removeprefix("\n<|im_start|>").partition("<|im_end|>")[0].partition("\n")[::2] for text in said]


def call(body):
    return f"<tool_call>{body}</tool_call>"


def test_every_call_of_a_turn_is_run_in_its_order_and_answered_in_a_message_of_its_own():
    class Till(Echo):
        """A till."""

        def reset(self, said=None):
            self._taken = []
            return "hello"

        def take(self, cents: int) -> str:
            """Take money."""
            self._taken.append(cents)
            return f"{self._taken}"

        def get_reward(self):
            return sum(cents * 10**place for place, cents in enumerate(self._taken))

    chat = ChatFormat(TOKENIZERS["byte-level"], tool_schemas(Till))
    calls = [call(f'{{"name": "take", "arguments": {{"cents": {cents}}}}}') for cents in (1, 2, 3)]
    turn = " and ".join([calls[0], call("{"), calls[1], call('{"name": "fly"}'), calls[2]])
    played = play(chat, "hermes", [f"<think>{calls[1]}</think>{turn}", "bye", "bye", "bye"], environment=Till)
    told = [
        part.partition("<|im_end|>")[0] for part in chat.decode(played.segments[2].token_ids).split("<|im_start|>tool\n")[1:]
    ]
    assert (told[0], told[2], told[4]) == ("[1]", "[1, 2]", "[1, 2, 3]")
    assert "not JSON" in told[1]
    assert told[3].startswith("error : no tool fly")
    assert (len(told), played.reward) == (5, 321.0)


def test_a_call_nested_1200_deep_is_answered():
    [(role, text)] = observations(call('{"name": "give", "arguments": {"value": ' + "[" * 1200 + "]" * 1200 + "}}"))
    assert (role, text) == ("tool", "error : the call is not JSON ; it is nested more than 64 deep")


def test_half_of_a_surrogate_pair_is_answered_in_a_name_and_in_an_argument():
    told = observations(call('{"name": "\\ud800"}'), call('{"name": "say", "arguments": {"text": "\\ud800"}}'))
    assert told == [("tool", "error : the call is not JSON ; a text in it is no Unicode")] * 2


def test_arguments_under_another_name_are_no_call_without_arguments():
    told = observations(call('{"name": "say", "parameters": {"text": "x"}}'))
    assert told == [("tool", 'error : write {"name": tool, "arguments": {...}}')]


def test_a_call_inside_of_thoughts_is_not_run_and_a_partner_does_not_hear_thoughts():
    said = call('{"name": "say", "arguments": {"text": "x"}}')
    told = observations(f"<think>perhaps {said}?</think>good day", f"I could write {said}</think>well", f"<think>so {said}")
    assert told == [("user", "good day"), ("user", "well"), ("user", "hello")]


def test_a_parser_that_raises_ends_the_episode():
    played = play(CHATS["byte-level"], f"{__name__}:Raising", ["hello"])
    assert isinstance(played, Failure)
    assert played.reason == "reading a turn: IndexError: list index out of range"


class Raising:
    """Reads calls, and forgets that there may be none."""

    def parse(self, text):
        return [text.split("<tool>")[1]]


def test_a_result_is_read_as_it_is_and_not_as_escapes():
    [(_, text)] = observations(call('{"name": "give", "arguments": {"value": ["für", "東京"]}}'))
    assert text == '{"kind": "a", "value": ["für", "東京"]}'
