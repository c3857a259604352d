"""The order desk as a plain program over the openai client: whole runs of it, and the same agent three other ways."""

import asyncio
from collections import Counter
from dataclasses import replace
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
from .over_http import free_port, serving

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
def test_class_program_server_and_environment_of_verifiers_have_the_same_tokens_and_rewards(model, installed):
    rows = [OrderDesk.make_row("heldout", i) for i in range(32)]
    config = config_from_table({"model": {"path": str(model)}})
    chat = chat_format(config, model, OrderDesk)
    with serving("desk_server.py", free_port()) as url:
        by_class, *others, by_server = asyncio.run(play_four_ways(config, chat, rows, url))
    alike, rewards = Counter(), {True: set(), False: set()}
    for i, one in enumerate(by_class):
        assert not isinstance(one, Failure), one.reason
        (mine,) = one
        turns = [chat.decode(s.token_ids) for s in mine.segments if isinstance(s, Sampled)]
        if mine.stop_reason != "done" or not all(is_well_formed(turn) for turn in turns):
            continue
        for outcomes in [*others, by_server] if ends_with_a_message(rows[i]) else others:
            assert not isinstance(outcomes[i], Failure), outcomes[i].reason
            (theirs,) = outcomes[i]
            assert [s.token_ids for s in theirs.segments] == [s.token_ids for s in mine.segments]
            assert logprobs_of(theirs) == pytest.approx(logprobs_of(mine), abs=1e-4)
            assert theirs.reward == mine.reward
            alike[outcomes is by_server] += 1
            rewards[outcomes is by_server].add(mine.reward)
        alike["calls"] += sum("<call>" in turn for turn in turns)
    assert alike[False] >= 2 * 8
    assert alike[True] >= 4
    assert alike["calls"] >= 8
    assert rewards == {True: {0.0, 1.0}, False: {0.0, 1.0}}, "the rows tell something"


def ends_with_a_message(row):
    """Whether the first message to this customer is the last: an episode with a server has nobody who answers one."""
    return len(row["wishes"]) == 1 and not row["wishes"][0]["withheld"]


async def play_four_ways(config, chat, rows, url):
    """Play the rows at temperature 0: class, program, environment of verifiers, MCP server; return the outcomes of each."""
    table = {"url": url, "reset_tool": "begin", "tools": list(program.DESCRIPTIONS)}
    of_server = environment_of(config_from_table({"env": {"mcp": [table], "reward": f"{__name__}:right"}}).env)
    of_verifiers = environment_of(config_from_table({"env": {"verifiers": "desk_talk"}}).env)
    tasks = sorted((row for part in of_verifiers.rows.values() for row in part), key=lambda row: row["task"]["idx"])
    assert [row["task"]["row"] for row in tasks] == rows
    model = config.model.path
    engine = EmbeddedEngine(EngineCore(EngineSpec(model_path=model, max_num_seqs=32, max_context=256)))
    driving = asyncio.create_task(drive(engine))
    agent = make_agent(config.env, engine, chat, ThreadRunner(timeout_s=60, latency_s=0, seed=0), temperature=1.0)
    behind_server = replace(agent, chat=chat_format(config, Path(model), of_server))
    runners = [FunctionRunner(function, timeout_s=200) for function in (program.agent, of_verifiers.program)]
    async with Gateway().listening() as gateway, shared_by(of_verifiers.program):
        behind = {"agent": agent, "formats": ChatFormats(chat.for_tools), "gateway": gateway, "rules": Rules()}
        by_program, by_verifiers = (ProgramPlayer(program=runner, **behind) for runner in runners)
        ways = [
            (ClassPlayer(agent=agent, environment_class=OrderDesk), rows),
            (by_program, rows),
            (by_verifiers, tasks),
            (ClassPlayer(agent=behind_server, environment_class=of_server), rows),
        ]
        plays = [
            player.evaluating(0.0).play(row, id=f"{way}.{i}", group_id=f"{way}")
            for way, (player, given) in enumerate(ways)
            for i, row in enumerate(given)
        ]
        outcomes = await asyncio.gather(*plays)
    driving.cancel()
    return [outcomes[at : at + len(rows)] for at in range(0, len(outcomes), len(rows))]


async def right(environment, **row):
    """Tell the server's customer what the model said last."""
    return float(await environment.ask("judge", {"message": environment.said[-1] if environment.said else ""}))


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
