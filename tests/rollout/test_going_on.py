"""Episodes that go on where a run was ended: wherever they were cut, they come to what they would have come to."""

import asyncio
from dataclasses import replace
from itertools import pairwise

import pytest

from oldlogits.core.engine import Generation, Sampling, Span
from oldlogits.core.trajectory import Context, Sampled, Trajectory
from oldlogits.envs.base import system_prompt_of
from oldlogits.envs.parsers.plain import PlainParser
from oldlogits.envs.tools import tool_schemas
from oldlogits.models.chat.format import ChatFormat
from oldlogits.rollout.turns import Agent, Failure, Known, TurnLimits, run_episode

from .test_turns import END, TOKENIZER, ids, run_here

LIMITS = TurnLimits(max_turns=8, max_tokens_per_turn=16, max_tokens=200)


class Shop:
    """Adds up, at once or by and by; the customer says "more" twice and then leaves."""

    system_prompt = "hello total"

    def __init__(self):
        self.total, self.heard = 0, 0

    def reset(self, *, start):
        self.total = start
        return f"hello {start}"

    def get_reward(self):
        return float(self.total)

    def add(self, amount: int):
        """Add a number."""
        self.total += amount
        return f"total is {self.total}"

    async def take(self, amount: int):
        """Take a number away, by and by."""
        await asyncio.sleep(0)
        self.total -= amount
        return {"total": self.total}

    def reply(self, message):
        self.heard += 1
        return "more" if self.heard < 3 else None


class Saved(Shop):
    """Is saved and restored, and cannot be played from its beginning again."""

    can_begin = True

    def reset(self, *, start):
        assert Saved.can_begin, "an environment that was saved is restored"
        return super().reset(start=start)

    def save_state(self):
        return {"total": self.total, "heard": self.heard, "note": "\ud800 \u2028"}

    def load_state(self, state):
        assert state["note"] == "\ud800 \u2028"
        self.total, self.heard = state["total"], state["heard"]


class Talk:
    """A conversation without tools."""

    def reset(self, *, start):
        self.heard = []
        return f"hello {start}"

    def reply(self, message):
        self.heard.append(message)
        return " ".join(self.heard) if len(self.heard) < 4 else None

    def get_reward(self):
        return float(len(self.heard))


class Quiet:
    """Tools only: a message ends the episode."""

    def reset(self, *, start):
        self.shown = start

    def show(self):
        """Show."""
        self.shown += 1
        return str(self.shown)

    def get_reward(self):
        return float(self.shown)


class Phrases:
    """Says one phrase a turn, and takes it up where the prompt leaves off; every third token is of another version."""

    def __init__(self, phrases, starts=None):
        self.phrases, self.requests = phrases, []
        self.starts = {} if starts is None else starts
        self.is_first = starts is None

    async def generate(self, prompt_ids, sampling, request_id):
        await asyncio.sleep(0)
        turn = int(request_id.rpartition("/")[2])
        self.requests.append(turn)
        if self.is_first:
            self.starts[turn] = len(prompt_ids)
        said = len(prompt_ids) - self.starts[turn]
        words = self.phrases[turn % len(self.phrases)]
        assert list(prompt_ids[len(prompt_ids) - said :]) == list(words[:said]), "it is asked to go on with what it said"
        out = tuple(words[said : said + sampling.max_tokens])
        at = range(len(prompt_ids), len(prompt_ids) + len(out))
        versions = [i // 3 for i in at]
        edges = [i for i in range(len(out)) if not i or versions[i] != versions[i - 1]] + [len(out)]
        spans = tuple(Span(version=versions[a], start=a, end=b) for a, b in pairwise(edges))
        return Generation(
            output_ids=out,
            logprobs=tuple(-0.01 * i for i in at),
            spans=spans,
            finish_reason="stop" if out[-1:] == (END,) else "length",
        )


def phrase(text):
    return (*ids(text), END)


def play(engine, environment=Shop, *, limits=LIMITS, known=None, save=None):
    chat = ChatFormat(TOKENIZER, tool_schemas(environment), system_prompt_of(environment))
    agent = Agent(
        engine=engine,
        chat=chat,
        parser=PlainParser(),
        limits=limits,
        sampling=Sampling(max_tokens=4),
        run_environment=run_here,
        save=save,
    )
    return asyncio.run(run_episode(agent, environment, {"start": 2}, id="g0.0", group_id="g0", known=known))


def tokens(segments):
    """Every token with all that is known of it."""
    found = []
    for s in segments:
        is_sampled = isinstance(s, Sampled)
        found += zip(
            s.token_ids,
            s.logp_mu if is_sampled else [None] * len(s.token_ids),
            [s.version if is_sampled else None] * len(s.token_ids),
            strict=True,
        )
    return found


def cuts(segments):
    """What is known after every segment, and after every token that was sampled."""
    for number, last in enumerate(segments):
        if isinstance(last, Sampled):
            for size in range(1, len(last.token_ids)):
                part = replace(last, token_ids=last.token_ids[:size], logp_mu=last.logp_mu[:size])
                yield (*segments[:number], part)
        yield tuple(segments[: number + 1])


TALES = {
    "tools and replies": (
        Shop,
        [
            "<call> add 1 </call>",
            "hello",
            "<call> take 3 </call>",
            "<call> add now </call>",
            "hello",
            "<call> show add 2 2 </call>",
            "bye",
        ],
        LIMITS,
    ),
    "saved": (
        Saved,
        ["<call> add 1 </call>", "hello", "<call> take 3 </call>", "<call> add now </call>", "hello", "bye"],
        LIMITS,
    ),
    "a conversation": (Talk, ["hello", "bye bye", "more", "1 2 3"], LIMITS),
    "tools only": (Quiet, ["<call> show </call>", "<call> show </call>", "<call> show </call>", "bye"], LIMITS),
    "a turn too long": (
        Shop,
        ["<call> add 1 </call>", "hello hello hello hello hello hello"],
        replace(LIMITS, max_tokens_per_turn=5),
    ),
    "as many turns": (Shop, ["<call> add 1 </call>", "<call> take 2 </call>"], replace(LIMITS, max_turns=3)),
    "as many tokens": (
        Shop,
        ["<call> add 1 </call>", "hello hello hello hello hello hello", "<call> take 2 </call>"],
        replace(LIMITS, max_tokens=70),
    ),
}
"""The environment, what the agent says, and the limits."""


@pytest.mark.slow
@pytest.mark.parametrize("name", TALES)
def test_an_episode_that_was_cut_anywhere_goes_on_to_the_same_tokens_and_reward(name, monkeypatch):
    environment, words, limits = TALES[name]
    states = {}
    first = Phrases([phrase(text) for text in words])
    whole = play(first, environment, limits=limits, save=lambda _, num, state: states.__setitem__(num, state))
    assert isinstance(whole, Trajectory)
    assert len(whole.segments) >= 4
    num_cuts = 0
    for known in cuts(whole.segments):
        saved = [num for num in states if num <= len(known)]
        monkeypatch.setattr(Saved, "can_begin", not saved)
        engine = Phrases(first.phrases, first.starts)
        went_on = Known(segments=known, num_saved=max(saved), state=states[max(saved)]) if saved else Known(segments=known)
        again = play(engine, environment, limits=limits, known=went_on)
        assert isinstance(again, Trajectory), again
        assert tokens(again.segments) == tokens(whole.segments)
        assert (again.reward, again.stop_reason) == (whole.reward, whole.stop_reason)
        assert sum(isinstance(s, Context) for s in known) - 1 <= min(engine.requests, default=99), "no known turn is sampled"
        num_cuts += 1
    assert num_cuts >= 8
    assert bool(states) == (environment is Saved)
    monkeypatch.setattr(Saved, "can_begin", True)


@pytest.mark.parametrize("name, first_reply", [("tools and replies", 2), ("a conversation", 1)])
@pytest.mark.parametrize("reply", ["now", "1 " * 150, None])
def test_where_an_environment_answers_otherwise_the_episode_begins_again_and_all_its_tokens_are_counted(
    name, first_reply, reply, monkeypatch
):
    environment, words, limits = TALES[name]
    first = Phrases([phrase(text) for text in words])
    whole = play(first, environment, limits=limits)
    monkeypatch.setattr(environment, "reply", lambda self, message: reply)
    answered = [known for known in cuts(whole.segments) if sum(isinstance(s, Context) for s in known) > first_reply]
    assert len(answered) > 5
    for known in answered:
        outcome = play(Phrases(first.phrases, first.starts), environment, limits=limits, known=Known(segments=known))
        assert isinstance(outcome, Failure)
        assert outcome.begins_again
        assert outcome.num_tokens == sum(len(s.token_ids) for s in known if isinstance(s, Sampled))


def test_what_fails_before_it_goes_on_counts_all_that_was_known():
    known = [Context(token_ids=(1,)), Sampled(token_ids=(2, 3), logp_mu=(-1.0, -1.0), version=0)]

    class Broken(Shop):
        def reset(self, *, start):
            raise RuntimeError("no shop")

    outcome = play(Phrases([phrase("bye")]), Broken, known=Known(segments=known))
    assert isinstance(outcome, Failure)
    assert (outcome.begins_again, outcome.num_tokens) == (False, 2)
