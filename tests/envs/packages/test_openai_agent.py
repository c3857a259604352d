"""The order desk as a plain program over the openai client: whole runs of it, and the same agent as an environment class."""

import asyncio
from pathlib import Path

import pytest
import tomli_w

from oldlogits.cli.main import run as command
from oldlogits.config.load import config_from_table
from oldlogits.core.engine import EngineSpec
from oldlogits.core.parser import ToolCall
from oldlogits.core.trajectory import Sampled
from oldlogits.engines.chat_api.formats import ChatFormats
from oldlogits.engines.chat_api.wishes import Rules
from oldlogits.engines.embedded.engine import EngineCore
from oldlogits.engines.embedded.stepwise import EmbeddedEngine
from oldlogits.envs.parsers.plain import PlainParser
from oldlogits.rollout.environment_runner import ThreadRunner
from oldlogits.rollout.gateway.listener import Gateway
from oldlogits.rollout.gateway.player import ProgramPlayer
from oldlogits.rollout.gateway.programs import FunctionRunner
from oldlogits.rollout.gateway.worker import shared_by
from oldlogits.rollout.player import ClassPlayer
from oldlogits.rollout.turns import Failure
from oldlogits.run.chat import chat_format
from oldlogits.run.start import prepare_model
from oldlogits.run.tasks import environment_of, make_agent
from openai_agent import agent as program
from order_desk.environment import OrderDesk

from ...runs import check_accounting, events_of, summary_of, tokens_of

pytestmark = [pytest.mark.envs, pytest.mark.slow, pytest.mark.timeout(300)]

ROOT = Path(__file__).parents[3]
STEPS = 400
"""Of the warm start: the model writes calls and outcomes, although often not the right ones."""
GATEWAY = ("opened", "continued", "forked", "rewritten", "encoded_anew_tokens", "dropped_answers", "overridden", "refused")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OLDLOGITS_CACHE", str(tmp_path_factory.mktemp("cache")))
        config = config_from_table({"model": {"warm_start_steps": STEPS}})
        yield prepare_model(config, OrderDesk, lambda text: None).model


@pytest.fixture(autouse=True)
def without_latency(monkeypatch):
    monkeypatch.setattr(program, "LATENCY_S", 1e-3)


def train(recipe, out, *words):
    assert command(["train", str(recipe), "--out", str(out), *words]) == 0
    return out


def check_exact(run, num_updates, num_episodes):
    """Everything that was asked for is trained exactly or counted; returns the sums of the gateway's metrics."""
    account = check_accounting(run)
    assert (account["trained"], account["failed"]) == (num_episodes, 0)
    summary = summary_of(run)
    assert (summary["ended"], summary["num_updates"]) == ("done", num_updates)
    assert set(summary["provenance"]) == {"exact"}
    assert set(tokens_of(run, "provenance")["provenance"]) <= {"exact"}
    updates = events_of(run, "update")
    return {name: sum(update.metrics[f"gateway/{name}"] for update in updates) for name in GATEWAY}


def test_the_program_is_trained_by_its_recipe(tmp_path, model):
    words = "--num-updates 2 --rollout.prompts_per_update 3 --rollout.group_size 4 --rollout.max_running_groups 6"
    words += " --eval.num_episodes 12 --eval.every 0 --model.path"
    run = train(ROOT / "examples/openai_agent/openai_agent.toml", tmp_path / "run", *words.split(), str(model))
    asked = check_exact(run, 2, 2 * 3 * 4)
    assert asked["continued"] > asked["opened"] >= 2 * 3 * 4
    assert {asked[name] for name in GATEWAY[2:]} == {0}
    assert [event.num_episodes for event in events_of(run, "evaluation")] == [12] * 4


def test_the_program_is_trained_as_a_command(tmp_path, model):
    table = {
        "num_updates": 1,
        "model": {"path": str(model)},
        "env": {"command": ["python", str(ROOT / "examples/openai_agent/agent.py")]},
        "rollout": {"group_size": 2, "prompts_per_update": 2, "max_running_groups": 2},
        "trainer": {"minibatches_per_update": 1},
        "eval": {"num_episodes": 0, "every": 0},
        "runtime": {"type": "local"},
    }
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(table))
    asked = check_exact(train(tmp_path / "recipe.toml", tmp_path / "run"), 1, 4)
    assert asked["opened"] >= 4
    assert (asked["forked"], asked["rewritten"]) == (0, 0)


@pytest.mark.filterwarnings("ignore:The 'initial' parameter is deprecated:DeprecationWarning")  # verifiers calls tenacity so
def test_class_program_and_environment_of_verifiers_have_the_same_tokens_and_rewards(model, installed):
    config = config_from_table({"model": {"path": str(model)}})
    chat = chat_format(config, model, OrderDesk)
    rows = [OrderDesk.make_row("heldout", i) for i in range(20)]
    of_verifiers = environment_of(config_from_table({"env": {"verifiers": "desk_talk"}}).env)
    tasks = sorted((row for part in of_verifiers.rows.values() for row in part), key=lambda row: row["task"]["idx"])
    assert [row["task"]["row"] for row in tasks] == rows

    async def play():
        engine = EmbeddedEngine(EngineCore(EngineSpec(model_path=str(model), max_num_seqs=32, max_context=256)))
        driving = asyncio.create_task(drive(engine))
        agent = make_agent(config.env, engine, chat, ThreadRunner(timeout_s=60, latency_s=0, seed=0), temperature=1.0)
        runners = [FunctionRunner(function, timeout_s=200) for function in (program.agent, of_verifiers.program)]
        async with Gateway().listening() as gateway, shared_by(of_verifiers.program):
            behind = {"agent": agent, "formats": ChatFormats(chat.for_tools), "gateway": gateway, "rules": Rules()}
            players = [ClassPlayer(agent=agent, environment_class=OrderDesk)]
            players += [ProgramPlayer(program=runner, **behind) for runner in runners]
            plays = [
                player.evaluating(0.0).play(row, id=f"{k}.{i}", group_id=f"{k}")
                for k, (player, of) in enumerate(zip(players, (rows, rows, tasks), strict=True))
                for i, row in enumerate(of)
            ]
            outcomes = await asyncio.gather(*plays)
        driving.cancel()
        return [outcomes[at : at + len(rows)] for at in range(0, len(outcomes), len(rows))]

    by_class, *others = asyncio.run(play())
    alike, rewards, num_calls = 0, set(), 0
    for i, one in enumerate(by_class):
        assert not isinstance(one, Failure), one.reason
        (mine,) = one
        turns = [chat.decode(s.token_ids) for s in mine.segments if isinstance(s, Sampled)]
        if mine.stop_reason != "done" or not all(is_well_formed(turn) for turn in turns):
            continue
        for outcomes in others:
            assert not isinstance(outcomes[i], Failure), outcomes[i].reason
            (theirs,) = outcomes[i]
            assert [s.token_ids for s in theirs.segments] == [s.token_ids for s in mine.segments]
            assert logprobs_of(theirs) == pytest.approx(logprobs_of(mine), abs=1e-4)
            assert theirs.reward == mine.reward
        alike += 1
        num_calls += sum("<call>" in turn for turn in turns)
        rewards.add(mine.reward)
    assert alike >= 8
    assert num_calls >= 8
    assert rewards == {0.0, 1.0}, "the rows tell something"


async def drive(engine):
    while True:
        await asyncio.sleep(0 if engine.drive_once() else 1e-3)


def logprobs_of(trajectory):
    return [p for s in trajectory.segments if isinstance(s, Sampled) for p in s.logp_mu]


def is_well_formed(turn):
    """Whether the class answers a turn as the program does: a message, or a call that a tool takes."""
    return all(
        isinstance(call, ToolCall) and call.name in program.DESCRIPTIONS and len(call.positional) == 1
        for call in PlainParser().parse(turn)
    )
