"""Episodes of a run that was ended and goes on: from the tokens that they had, in an environment as it was."""

import asyncio
from dataclasses import replace

import pytest

from oldlogits.core.engine import Sampling
from oldlogits.core.trajectory import Sampled
from oldlogits.envs.parsers.plain import PlainParser
from oldlogits.rollout.turns import Agent, Failure, Known, run_episode

from .test_turns import DEFAULT, PLAYED, Counter, ScriptedEngine, chat_of, run_here

SCRIPT = ("<call> add 2 </call>", "hello", "<call> take 1 </call>", "bye", "bye")


class Saved(Counter):
    """A counter that can be saved."""

    def save_state(self):
        return {"total": self.total, "heard": self.heard}

    def load_state(self, state):
        self.total, self.heard = state["total"], state["heard"]


class Fickle(Counter):
    """A counter that never answers as before."""

    num_made = 0

    def reset(self, *, start, notes=()):
        Fickle.num_made += 1
        self.total = Fickle.num_made
        return super().reset(start=start)

    def add(self, amount: int):
        """Add a number."""
        return f"total is {Fickle.num_made}"


def play(script, environment, known=None):
    """Returns the outcome, what was asked of the engine, and the states that were saved."""
    engine, saved = ScriptedEngine(*script), []
    agent = Agent(
        engine=engine,
        chat=chat_of(environment),
        parser=PlainParser(),
        limits=DEFAULT,
        sampling=Sampling(max_tokens=1),
        run_environment=run_here,
        save=lambda id, num_segments, state: saved.append((num_segments, state)),
    )
    PLAYED.clear()
    outcome = asyncio.run(run_episode(agent, environment, {"start": 1}, id="g000007.2", group_id="g000007", known=known))
    return outcome, engine.requests, saved


def num_turns(segments):
    return sum(isinstance(segment, Sampled) for segment in segments)


def halved(segment):
    """The first part of a turn that a version change, or a kill, has cut in two."""
    middle = len(segment.token_ids) // 2
    return replace(segment, token_ids=segment.token_ids[:middle], logp_mu=segment.logp_mu[:middle])


@pytest.mark.parametrize("num_known", range(11))
@pytest.mark.parametrize("environment", [Counter, Saved])
def test_an_episode_goes_on_from_any_segment_with_nothing_sampled_again(environment, num_known):
    whole, _, saved = play(SCRIPT, environment)
    assert len(whole.segments) == 10
    segments = whole.segments[:num_known]
    states = [state for state in saved if state[0] <= num_known]
    known = Known(segments=segments) if not states else Known(segments=segments, num_saved=states[-1][0], state=states[-1][1])
    again, requests, _ = play(SCRIPT[num_turns(segments) :], environment, known)
    assert again == whole
    assert len(requests) == 5 - num_turns(segments)
    if states:
        assert not hasattr(PLAYED[-1], "notes"), "a saved environment is loaded, not reset"


@pytest.mark.parametrize("environment", [Counter, Saved])
def test_a_turn_that_was_cut_in_two_is_sampled_on_from_its_last_token(environment):
    whole, _, saved = play(SCRIPT, environment)
    first = halved(whole.segments[3])
    state = {"num_saved": saved[1][0], "state": saved[1][1]} if saved else {}
    rest = whole.segments[3].token_ids[len(first.token_ids) :]
    known = Known(segments=(*whole.segments[:3], first), **state)
    again, requests, _ = play([rest, *SCRIPT[2:]], environment, known)
    assert requests[0].prompt == tuple(t for segment in known.segments for t in segment.token_ids)
    assert requests[0].sampling.max_tokens == DEFAULT.max_tokens_per_turn - len(first.token_ids)
    tokens = [t for segment in whole.segments for t in segment.token_ids]
    assert [t for segment in again.segments for t in segment.token_ids] == tokens
    assert again.reward == whole.reward


def test_an_environment_that_answers_otherwise_makes_its_episode_begin_again_and_its_tokens_are_counted():
    whole, _, _ = play(SCRIPT, Fickle)
    again, requests, _ = play(SCRIPT, Fickle, Known(segments=whole.segments[:3]))
    assert isinstance(again, Failure)
    assert again.begins_again
    assert "answered otherwise" in again.reason
    assert again.num_tokens == len(whole.segments[1].token_ids)
    assert requests == []
