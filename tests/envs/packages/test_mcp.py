"""MCP servers as environments: the package's own server over stdio and HTTP, and what goes wrong with one."""

import asyncio
import gc
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tomli_w
from transformers import AutoTokenizer

from oldlogits.cli.main import run as command
from oldlogits.config.load import config_from_table
from oldlogits.core.engine import Generation, Sampling, Span
from oldlogits.core.environment import McpServer
from oldlogits.core.errors import ConfigError, EnvironmentShapeError, McpServerError
from oldlogits.core.parser import ToolCall
from oldlogits.envs.base import system_prompt_of
from oldlogits.envs.mcp.session import Sessions
from oldlogits.envs.parsers.hermes import HermesParser
from oldlogits.envs.tools import tool_names, tool_schemas
from oldlogits.models.chat.format import ChatFormat
from oldlogits.rollout.environment_runner import ThreadRunner
from oldlogits.rollout.turns import Agent, Failure, TurnLimits, run_episode
from oldlogits.run.tasks import environment_of

from ...runs import summary_of
from ...waiting import wait_until
from .over_http import free_port, serving

pytestmark = pytest.mark.envs

SERVER = [sys.executable, str(Path(__file__).with_name("mcp_server.py"))]
REWARD = "tests.envs.packages.test_mcp:seven"
MODEL = ["add", "refuse", "die", "hang", "shout"]


async def seven(environment, start, **row):
    """Ask the server for the total, which the model cannot."""
    total = int(await environment.ask("total", {}))
    assert start + sum(call.arguments["amount"] for call in environment.calls if call.name == "add") == total
    return float(total == 7)


def environment(reward=REWARD, **server):
    table = {"command": SERVER, "reset_tool": "begin", "tools": MODEL} | server
    table = {key: value for key, value in table.items() if value}
    return environment_of(config_from_table({"env": {"mcp": [table], "reward": reward}}).env)


@pytest.fixture(scope="module")
def over_stdio():
    return environment()


@pytest.fixture
def url():
    with serving("mcp_server.py", free_port()) as address:
        yield address


async def count(made, start, *amounts):
    told = [await made.reset(start=start)]
    for amount in amounts:
        told.append(await made.call_tool("add", {"amount": amount}))
        await asyncio.sleep(0.01)
    return told, await made.get_reward(messages=[])


def children():
    found = subprocess.run(["ps", "-o", "args=", "--ppid", str(os.getpid())], capture_output=True, text=True, check=False)
    return found.stdout.count(SERVER[1])


@pytest.mark.parametrize("transport", ["stdio", "http"])
def test_every_episode_has_a_session_of_its_own(transport, over_stdio, url):
    made = over_stdio if transport == "stdio" else environment(command=None, url=url)

    async def play():
        return await asyncio.gather(count(made(), 1, 2, 4), count(made(), 10, 20))

    (first, reward), (second, other) = asyncio.run(play())
    assert (first, reward) == (["you have 1", "total is 3", "total is 7"], 1.0)
    assert (second, other) == (["you have 10", "total is 30"], 0.0)


def test_the_model_is_offered_the_named_tools_and_the_servers_instructions(over_stdio):
    assert sorted(tool_names(over_stdio)) == sorted(MODEL)
    assert system_prompt_of(over_stdio) == "Count to seven."
    add = next(s["function"] for s in tool_schemas(over_stdio) if s["function"]["name"] == "add")
    assert add["description"] == "Add a number."
    assert add["parameters"]["properties"]["amount"]["type"] == "integer"


def test_an_error_result_and_arguments_that_do_not_fit_are_answers_to_the_model(over_stdio):
    async def play():
        made = over_stdio()
        await made.reset(start=0)
        return await made.call_tool("refuse", {}), await made.call_tool("add", {"amount": "many"})

    refused, misfit = asyncio.run(play())
    assert refused.startswith("error : ")
    assert "not today" in refused
    assert misfit.startswith("error : ")
    assert "amount" in misfit


class Reader:
    """An engine that samples the turns of a script."""

    def __init__(self, tokenizer, chat, turns):
        self._turns = [(*tokenizer.encode(turn, add_special_tokens=False), chat.end_of_turn_id) for turn in turns]

    async def generate(self, prompt_ids, sampling, request_id):
        ids = self._turns[int(request_id.rpartition("/")[2])]
        spans = (Span(version=0, start=0, end=len(ids)),)
        return Generation(output_ids=ids, logprobs=(-0.5,) * len(ids), spans=spans, finish_reason="stop")


def play(made, folder, *calls, timeout_s=60.0):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = ChatFormat(tokenizer, tool_schemas(made), system_prompt_of(made))
    turns = [*(HermesParser().write(ToolCall(name=name, named=named)) for name, named in calls), "done"]

    async def episode():
        agent = Agent(
            engine=Reader(tokenizer, chat, turns),
            chat=chat,
            parser=HermesParser(),
            limits=TurnLimits(max_turns=9, max_tokens_per_turn=500, max_tokens=4000),
            sampling=Sampling(max_tokens=1, temperature=1.0),
            run_environment=ThreadRunner(timeout_s=timeout_s, latency_s=0.0, seed=0),
        )
        return await run_episode(agent, made, {"start": 3}, id="e.0", group_id="e")

    return asyncio.run(episode())


def test_an_episode_is_played_by_the_projects_own_turns(over_stdio, chatml_llama):
    played = play(over_stdio, chatml_llama, ("add", {"amount": 4}))
    assert (played.reward, played.stop_reason, played.num_turns) == (1.0, "done", 2)


def test_a_server_that_dies_fails_its_episode_and_no_other(over_stdio, chatml_llama):
    failed = play(over_stdio, chatml_llama, ("die", {}))
    assert isinstance(failed, Failure)
    assert "did not answer die" in failed.reason
    assert "it wrote: out of coins" in failed.reason
    assert play(over_stdio, chatml_llama, ("add", {"amount": 4})).reward == 1


def test_a_server_over_http_that_dies_fails_its_episode_and_the_next_one_has_the_new_server(chatml_llama):
    port = free_port()
    with serving("mcp_server.py", port) as url:
        made = environment(command=None, url=url)
        failed = play(made, chatml_llama, ("add", {"amount": 4}), ("die", {}))
        assert isinstance(failed, Failure)
        assert "did not answer die" in failed.reason
        gone = play(made, chatml_llama, ("add", {"amount": 4}))
        assert isinstance(gone, Failure)
        assert f"an MCP server cannot be used; got: {url}" in gone.reason
    with serving("mcp_server.py", port):
        assert play(made, chatml_llama, ("add", {"amount": 4})).reward == 1


def test_a_session_opened_ahead_whose_server_is_gone_is_not_given_to_an_episode(tmp_path, chatml_llama):
    port = free_port()
    starts = tmp_path / "starts"
    over_stdio = environment(env={"STARTS": str(starts)}, spare=2)
    assert play(over_stdio, chatml_llama, ("add", {"amount": 4})).reward == 1
    wait_until(lambda: len(starts.read_text().split()) == 4, "asked for tools, played, and two ahead")
    for pid in starts.read_text().split()[-2:]:
        os.kill(int(pid), signal.SIGKILL)
    assert play(over_stdio, chatml_llama, ("add", {"amount": 4})).reward == 1
    with serving("mcp_server.py", port) as url:
        over_http = environment(command=None, url=url, spare=2)
        assert play(over_http, chatml_llama, ("add", {"amount": 4})).reward == 1
    with serving("mcp_server.py", port):
        assert play(over_http, chatml_llama, ("add", {"amount": 4})).reward == 1


def test_a_server_that_hangs_fails_its_episode_at_the_deadline_and_is_ended(over_stdio, chatml_llama):
    failed = play(over_stdio, chatml_llama, ("hang", {}), timeout_s=15.0)
    assert isinstance(failed, Failure)
    assert "timed out after 15 s" in failed.reason

    def all_gone():
        gc.collect()
        return children() == 0

    wait_until(all_gone, "the server has ended")


def test_a_result_that_does_not_fit_ends_the_episode(over_stdio, chatml_llama):
    played = play(over_stdio, chatml_llama, ("add", {"amount": 4}), ("shout", {"size": 3_000_000}))
    assert (played.reward, played.stop_reason) == (1.0, "max_tokens")


def test_sessions_are_opened_ahead_where_the_recipe_asks_for_it(tmp_path):
    starts = tmp_path / "starts"
    sessions = Sessions(McpServer(command=tuple(SERVER), env={"STARTS": str(starts)}, spare=2))
    first = asyncio.run(sessions.take())
    wait_until(lambda: starts.exists() and len(starts.read_text().split()) == 3, "three servers started")
    second = asyncio.run(sessions.take())
    wait_until(lambda: len(starts.read_text().split()) == 4, "a fourth one started")
    assert first is not second
    del sessions, first, second
    gc.collect()
    wait_until(lambda: children() == 0, "the servers have ended")


@pytest.mark.parametrize(
    "server, error, said",
    [
        ({"command": [*SERVER, "broken"]}, McpServerError, "it wrote: no coins at all"),
        ({"command": ["/nowhere/at/all"]}, McpServerError, "FileNotFoundError"),
        ({"command": None, "url": "http://127.0.0.1:9/mcp"}, McpServerError, "http://127.0.0.1:9/mcp"),
        ({"command": [*SERVER, "shapeless"], "tools": None, "reset_tool": None}, McpServerError, "inputSchema.type"),
        ({"tools": ["fly"]}, ConfigError, "fly"),
        ({"command": None}, ConfigError, "a command or an address"),
        ({"reward": ""}, EnvironmentShapeError, "env.reward"),
    ],
)
def test_what_cannot_be_an_environment_is_refused_at_the_start(server, error, said):
    with pytest.raises(error, match=said):
        environment(**server)


@pytest.mark.timeout(300)
def test_a_run_trains_with_a_server(tmp_path, chatml_llama):
    (tmp_path / "rows.jsonl").write_text('{"start": 3}\n{"start": 5}\n')
    table = {
        "num_updates": 1,
        "model": {"path": str(chatml_llama)},
        "env": {
            "mcp": [{"command": SERVER, "reset_tool": "begin", "tools": ["add"], "spare": 2}],
            "reward": REWARD,
            "train_data": str(tmp_path / "rows.jsonl"),
            "parser": "hermes",
            "max_tokens_per_turn": 8,
            "max_turns": 2,
        },
        "rollout": {"group_size": 2, "prompts_per_update": 2},
        "eval": {"num_episodes": 0, "every": 0},
        "runtime": {"type": "local"},
    }
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(table))
    assert command(["train", str(tmp_path / "recipe.toml"), "--out", str(tmp_path / "run")]) == 0
    assert summary_of(tmp_path / "run")["num_updates"] == 1
