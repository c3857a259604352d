"""Environments of verifiers as they are: their tasks, conversations, tools and rewards, trained through the gateway."""

import asyncio
import json
import random
from pathlib import Path

import pytest
import tomli_w

from oldlogits.cli.main import run as command
from oldlogits.config.check import check
from oldlogits.config.load import config_from_table
from oldlogits.core.errors import ConfigError
from oldlogits.core.trajectory import Sampled
from oldlogits.engines.chat_api.formats import ChatFormats
from oldlogits.engines.chat_api.wishes import Rules
from oldlogits.models.chat.format import ChatFormat
from oldlogits.rollout.environment_runner import ThreadRunner
from oldlogits.rollout.gateway.counts import GatewayCounts
from oldlogits.rollout.gateway.listener import Gateway
from oldlogits.rollout.gateway.player import ProgramPlayer
from oldlogits.rollout.gateway.programs import FunctionRunner
from oldlogits.rollout.gateway.worker import shared_by
from oldlogits.rollout.player import ClassPlayer
from oldlogits.rollout.turns import Failure
from oldlogits.run.tasks import environment_of, load_tasks

from ...rollout.test_conversations import CHAT, END, TOKENIZER, Engine, Talk, spell
from ...runs import check_accounting, events_of, summary_of, tokens_of

pytestmark = [pytest.mark.envs, pytest.mark.timeout(240), pytest.mark.usefixtures("installed")]

FOLDER = Path(__file__).parent


def config_of(id, args=None, model="", **env):
    table = {"env": {"verifiers": id, "verifiers_args": json.dumps(args or {}), **env}, "runtime": {"type": "local"}}
    return config_from_table({**table, "model": {"path": str(model)}} if model else table)


async def play(agent, formats, config, rows, counts=None):
    """Play rows of a recipe through a gateway."""
    program = environment_of(config.env).program
    runner = FunctionRunner(program, timeout_s=100)
    async with Gateway().listening() as gateway, shared_by(program):
        player = ProgramPlayer(
            agent=agent, formats=formats, gateway=gateway, program=runner, rules=Rules(), counts=counts or GatewayCounts()
        ).evaluating(0.0)
        return await asyncio.gather(*(player.play(row, id=f"e.{i}", group_id="e") for i, row in enumerate(rows)))


def scripted(config, turns, num=1, **limits):
    """Play the first rows with an engine that says the turns one after the other."""

    def says(prompt):
        return (*spell(turns[CHAT.decode(prompt).count("<|im_start|>assistant") - 1]), END)

    async def main():
        talk = Talk(Engine(says=says), per_turn=200, **limits)
        object.__setattr__(talk.agent, "run_environment", ThreadRunner(timeout_s=60, latency_s=0, seed=0))
        rows = environment_of(config.env).rows["train"][:num]
        player_counts = GatewayCounts()
        return await play(talk.agent, ChatFormats(CHAT.for_tools), config, rows, player_counts), talk

    return asyncio.run(main())


def test_tasks_are_the_rows_and_every_fifth_is_held_out():
    _, rows = load_tasks(config_of("word_talk", model=FOLDER))
    heldout = [row["task"]["prompt"] for row in rows.heldout(100)]
    assert heldout == ["w4", "w9"]
    assert sorted(rows.train(i)["task"]["prompt"] for i in range(8)) == sorted({f"w{i}" for i in range(10)} - set(heldout))


def test_held_out_tasks_may_be_those_of_another_config():
    args = {"taskset": {"num": 4}, "select": {"limit": 3}, "eval": {"taskset": {"start": 7, "num": 5}, "select": {"skip": 1}}}
    _, rows = load_tasks(config_of("word_talk", args, model=FOLDER))
    assert [row["task"]["prompt"] for row in rows.heldout(9)] == ["w8", "w9", "w10", "w11"]
    assert {rows.train(i)["task"]["prompt"] for i in range(9)} == {"w0", "w1", "w2"}


@pytest.mark.parametrize(
    "id, args, said",
    [
        ("no_such_environment", "", "not found"),
        ("word_talk", "[1", "JSON"),
        ("word_talk", '{"taskset": {"nm": 4}}', "nm"),
        ("word_talk", '{"speaker": {"harness": {"id": "no_such_harness"}}}', "not found"),
    ],
)
def test_what_cannot_be_loaded_is_refused_at_the_start(id, args, said):
    with pytest.raises(ConfigError, match=said):
        environment_of(config_from_table({"env": {"verifiers": id, "verifiers_args": args}}).env)


def test_it_takes_the_place_of_other_programs_and_rewards():
    table = {"env": {"verifiers": "word_talk", "command": ["python"]}, "runtime": {"type": "local"}}
    with pytest.raises(ConfigError, match="several things"):
        check(config_from_table(table))
    with pytest.raises(ConfigError, match="no environment"):
        check(config_from_table({"env": {"verifiers_args": "{}"}}))


def test_a_conversation_is_one_branch_and_its_reward_that_of_the_task():
    ((branch,),), _ = scripted(config_of("word_talk"), ["w1 w2", "w3 w15", "w4 w16"])
    sampled = [CHAT.decode(s.token_ids[:-1]) for s in branch.segments if isinstance(s, Sampled)]
    assert sampled == ["w1 w2", "w3 w15", "w4 w16"]
    assert branch.reward == pytest.approx(4 / 6)


def test_an_agent_has_the_turns_of_the_recipe():
    ((branch,),), _ = scripted(config_of("word_talk", max_turns=2), ["w1", "w15", "w16"])
    assert sum(isinstance(s, Sampled) for s in branch.segments) == 2
    assert branch.reward == 0.5


def test_an_agent_that_is_not_to_be_trained_needs_a_model_of_its_own():
    (failure,), _ = scripted(config_of("word_talk", {"is_fixed": True}), ["w1"] * 3)
    assert isinstance(failure, Failure)
    assert "another model plays speaker" in failure.reason


def test_an_error_of_the_environment_fails_the_episode_with_its_reason():
    (failure,), _ = scripted(config_of("word_talk"), ["w1"] * 3, max_tokens=20)
    assert isinstance(failure, Failure)
    assert "fills the context" in failure.reason


class Words:
    """The same as `word_talk`, as an environment class."""

    system_prompt = "w0 w1 w2"

    def reset(self, start):
        self._said, self._turns = [], 0
        return start

    def reply(self, message):
        self._said += message.split()
        self._turns += 1
        return None if self._turns == 3 else "w3 w4"

    def get_reward(self):
        low = {f"w{i}" for i in range(10)}
        return sum(word in low for word in self._said) / max(len(self._said), 1)


def test_the_class_and_the_environment_of_verifiers_have_the_same_tokens_and_rewards():
    def says(prompt):
        """What is likeliest after a prompt: the same for the same tokens."""
        rng = random.Random(f"{prompt}")
        return (*spell(" ".join(f"w{rng.randrange(20)}" for _ in range(rng.randint(1, 5)))), END)

    config = config_of("word_talk")
    rows = environment_of(config.env).rows["train"]

    async def main():
        agent = Talk(Engine(says=says)).agent
        object.__setattr__(agent, "chat", ChatFormat(TOKENIZER, (), Words.system_prompt))
        object.__setattr__(agent, "run_environment", ThreadRunner(timeout_s=60, latency_s=0, seed=0))
        by_class = ClassPlayer(agent=agent, environment_class=Words)
        starts = [{"start": row["task"]["prompt"]} for row in rows]
        one = await asyncio.gather(*(by_class.play(row, id=f"c.{i}", group_id="c") for i, row in enumerate(starts)))
        return one, await play(agent, ChatFormats(CHAT.for_tools), config, rows)

    rewards = set()
    for one, other in zip(*asyncio.run(main()), strict=True):
        assert not isinstance(other, Failure), other.reason
        ((mine,), (theirs,)) = one, other
        assert [s.token_ids for s in theirs.segments] == [s.token_ids for s in mine.segments]
        assert len(mine.segments) == 6
        assert theirs.reward == pytest.approx(mine.reward)
        rewards.add(mine.reward)
    assert len(rewards) > 3


@pytest.mark.slow
def test_a_run_trains_an_environment_of_verifiers(tmp_path, tiny_folder):
    table = {
        "num_updates": 2,
        "model": {"path": str(tiny_folder)},
        "env": {"verifiers": "word_talk", "max_tokens_per_turn": 12, "max_episode_tokens": 96},
        "rollout": {"group_size": 4, "prompts_per_update": 2},
        "eval": {"num_episodes": 8, "every": 0},
        "runtime": {"type": "local"},
    }
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(table))
    run = tmp_path / "run"
    assert command(["train", str(tmp_path / "recipe.toml"), "--out", str(run)]) == 0
    account = check_accounting(run)
    assert (account["trained"], account["failed"]) == (2 * 2 * 4, 0)
    assert set(summary_of(run)["provenance"]) == {"exact"} == set(tokens_of(run, "provenance")["provenance"])
    asked = [update.metrics for update in events_of(run, "update")]
    assert sum(metrics["gateway/continued"] for metrics in asked) > 0
    assert sum(metrics["gateway/forked"] + metrics["gateway/rewritten"] for metrics in asked) == 0
    assert [event.num_episodes for event in events_of(run, "evaluation")] == [2] * 4, "as many as are held out"


@pytest.mark.slow
def test_a_plain_taskset_with_tools_is_played_by_verifiers_own_program():
    """The program that it starts for an agent installs what it needs with uv."""
    call = '<tool_call>{"name": "shop_price", "arguments": {"item": "lamp"}}</tool_call>'
    ((branch,),), _ = scripted(config_of("shop_prices"), [call, "7"])
    assert branch.reward == 2.0
    sampled = [CHAT.decode(s.token_ids[:-1]) for s in branch.segments if isinstance(s, Sampled)]
    assert sampled == [call, "7"]
