"""Rewards of turns, of whole groups, and what the end of an episode tells besides its tokens."""

from __future__ import annotations

import asyncio
import dataclasses

import numpy as np
import pytest

from oldlogits.core.engine import Sampling
from oldlogits.core.errors import ConfigError, EnvironmentShapeError
from oldlogits.envs.parsers.plain import PlainParser
from oldlogits.envs.rewards import load_group_reward
from oldlogits.rollout.answers import MAX_REWARD, rewards_of_group
from oldlogits.rollout.environment_errors import EnvironmentFailed
from oldlogits.rollout.turns import Agent, Failure, run_episode

from .test_turns import CALL, DEFAULT, Counter, ScriptedEngine, chat_of, ids, run_here


class Scored(Counter):
    """Each turn is worth its number; what is said without a call is worth as much."""

    def __init__(self):
        super().__init__()
        self.turns = 0

    async def get_turn_reward(self):
        self.turns += 1
        return self.turns


async def ended(environment, *script, saved=None, **changes):
    agent = Agent(
        engine=ScriptedEngine(*script),
        chat=chat_of(environment),
        parser=PlainParser(),
        limits=dataclasses.replace(DEFAULT, **changes),
        sampling=Sampling(max_tokens=1, temperature=1.0),
        run_environment=run_here,
        keeps_messages=True,
        save=None if saved is None else lambda *state: saved.append(state),
    )
    return await run_episode(agent, environment, {"start": 1}, id="g.0", group_id="g")


def played(environment, *script, **changes):
    return asyncio.run(ended(environment, *script, **changes))


def test_the_rewards_of_turns_are_added_to_that_of_the_episode_and_told_one_by_one():
    trajectory = played(Scored, CALL, "hello", "hello", "bye")
    assert trajectory.turn_rewards == (1.0, 2.0, 3.0, 4.0)
    assert trajectory.reward == 3 + 10
    plain = played(Counter, CALL, "hello", "hello", "bye")
    assert (plain.reward, plain.turn_rewards) == (3.0, ())


def test_a_turn_that_is_cut_off_is_not_answered_and_has_no_reward():
    trajectory = played(Scored, ids("hello hello"), max_tokens_per_turn=2)
    assert (trajectory.stop_reason, trajectory.turn_rewards, trajectory.reward) == ("turn_too_long", (), 1.0)
    trajectory = played(Scored, CALL, CALL, max_turns=2)
    assert (trajectory.stop_reason, trajectory.turn_rewards) == ("max_turns", (1.0, 2.0))


@pytest.mark.parametrize("reward", [None, float("nan"), "1", MAX_REWARD])
def test_a_reward_of_a_turn_that_is_no_number_fails_the_episode(reward):
    wrong = type("Wrong", (Counter,), {"get_turn_reward": lambda self: reward})
    outcome = played(wrong, CALL, CALL, "bye", "bye", "bye")
    assert isinstance(outcome, Failure)
    assert "get_turn_reward returned" in outcome.reason or "the rewards of the turns returned" in outcome.reason


def test_the_messages_after_the_prompt_are_told_and_given_to_a_reward_that_wants_them():
    class Reading(Counter):
        def get_reward(self, messages):
            return float(len(messages))

    trajectory = played(Reading, CALL, "hello", "hello", "bye")
    assert trajectory.messages == (
        {"role": "assistant", "content": "<call> add 2 </call>"},
        {"role": "tool", "content": "total is 3"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "more"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "more"},
        {"role": "assistant", "content": "bye"},
    )
    assert trajectory.reward == 7.0


def test_an_environment_is_saved_only_where_its_state_is_all_that_its_reward_depends_on():
    state = {"save_state": lambda self: {}, "load_state": lambda self, state: None}
    for changes, num in (({}, 4), ({"get_turn_reward": lambda self: 1}, 0), ({"get_reward": lambda self, messages: 1}, 0)):
        saved = []
        played(type("Saved", (Counter,), state | changes), CALL, "hello", "hello", "bye", saved=saved)
        assert len(saved) == num


class Compared(Counter):
    @staticmethod
    def get_group_rewards(*, row, messages, rewards):
        best = max(rewards)
        return [float(reward == best) for reward in rewards]


def shortest(*, row, messages, rewards):
    return [-len(said) for said in messages]


def test_the_rewards_of_a_group_are_those_of_the_recipes_function_else_of_the_class():
    assert load_group_reward(Counter, "") is None
    assert load_group_reward(Compared, "")(row={}, messages=[[], []], rewards=[1, 2]) == [0.0, 1.0]
    assert load_group_reward(Compared, f"{__name__}:shortest") is shortest
    with pytest.raises(ConfigError, match=r"group reward .* does not exist"):
        load_group_reward(Counter, f"{__name__}:nothing")
    with pytest.raises(EnvironmentShapeError, match="is no static method"):
        load_group_reward(type("Wrong", (Counter,), {"get_group_rewards": lambda self: []}), "")


def test_a_groups_rewards_are_one_number_for_each_episode():
    assert rewards_of_group([1, True, np.float32(0.5)], 3) == [1.0, 1.0, 0.5]
    assert rewards_of_group(np.array([1.0, 2.0]), 2) == [1.0, 2.0]
    for wrong in ([1], [1, 2, 3], None, 3.0, [1, None], [1, float("inf")], "ab", np.array(3.0)):
        with pytest.raises(EnvironmentFailed, match="the group reward returned"):
            rewards_of_group(wrong, 2)
