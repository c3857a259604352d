"""Agent programs behind the gateway, over real HTTP: functions, commands, streams, wrong keys, programs that die or hang."""

import asyncio
import gc
import json
import sys
import threading
import time
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest

from oldlogits.core.errors import RolloutError, WorkerDiedError
from oldlogits.core.trajectory import Context, Sampled
from oldlogits.engines.chat_api.formats import ChatFormats
from oldlogits.engines.chat_api.wishes import Rules
from oldlogits.rollout.environment_errors import EnvironmentFailed
from oldlogits.rollout.environment_runner import ThreadRunner
from oldlogits.rollout.gateway.conversations import Conversations
from oldlogits.rollout.gateway.counts import GatewayCounts
from oldlogits.rollout.gateway.listener import Gateway
from oldlogits.rollout.gateway.player import ProgramPlayer
from oldlogits.rollout.gateway.programs import Address, CommandRunner, FunctionRunner, Runner
from oldlogits.rollout.gateway.worker import SpreadRunner, WorkerRunner, shared_by
from oldlogits.rollout.player import Watch
from oldlogits.rollout.turns import Failure

from .test_conversations import CALL, CHAT, END, TOOL, Engine, Talk, spell

pytestmark = pytest.mark.filterwarnings("error")


class World:
    """A gateway that listens, and a player of a program."""

    def __init__(self, program, *, engine=None, rules=None, timeout_s=20.0, **limits):
        self.talk = Talk(engine, **limits)  # whose agent and source it has
        self.talk.num_left_late = 0
        self.program, self.timeout_s, self.rules = program, timeout_s, rules or Rules()
        self.dropped = []
        self.counts = GatewayCounts()

    async def play(self, num=1, row=None):
        runner = (
            FunctionRunner(self.program, timeout_s=self.timeout_s)
            if callable(self.program)
            else CommandRunner(self.program, timeout_s=self.timeout_s)
        )
        agent = self.talk.agent
        async with Gateway().listening() as gateway, shared_by(self.program):
            self.gateway = gateway
            player = ProgramPlayer(
                agent=agent, formats=ChatFormats(CHAT.for_tools), gateway=gateway, program=runner, rules=self.rules,
                counts=self.counts,
            ).watched(Watch(report=agent.report, withdraw=agent.withdraw, drop=self.dropped.extend))  # fmt: skip
            object.__setattr__(player.agent, "run_environment", ThreadRunner(timeout_s=20.0, latency_s=0.0, seed=0))
            plays = [player.play(row or {"n": i}, id=f"g000001.{i}", group_id="g000001") for i in range(num)]
            return await asyncio.gather(*plays)


def played(program, num=1, row=None, **options):
    async def main():
        world = World(program, **options)
        return await asyncio.wait_for(world.play(num, row), 60), world

    return asyncio.run(main())


async def post(url, key, body, route="chat/completions"):
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{url}/{route}", json=body, headers={"Authorization": f"Bearer {key}"}) as answer,
    ):
        return answer.status, await answer.json()


def asks(*words):
    return {"model": "policy", "messages": [{"role": "user", "content": text} for text in words]}


async def says_hello(base_url, api_key, row):
    status, answer = await post(base_url, api_key, asks("hello"))
    assert status == 200
    assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"] + answer["usage"]["completion_tokens"]
    return {"reward": float(row["n"]), "note": "fine"}


def test_an_asynchronous_function_plays_episodes_with_an_address_of_their_own():
    outcomes, world = played(says_hello, num=8)
    assert [o[0].reward for o in outcomes] == [float(i) for i in range(8)]
    assert [o[0].id for o in outcomes] == [f"g000001.{i}" for i in range(8)]
    assert [[type(s) for s in o[0].segments] for o in outcomes] == [[Context, Sampled]] * 8
    assert world.counts.requests["opened"] == 8


def test_a_plain_function_has_a_thread():
    def program(base_url, api_key, row):
        return asyncio.run(says_hello(base_url, api_key, row))["reward"]

    ((branch,),), _ = played(program, row={"n": 3})
    assert branch.reward == 3.0


SCRIPT = """
import json, os, sys, urllib.request
row = json.load(sys.stdin)
body = {"model": "m", "messages": [{"role": "user", "content": row["words"]}]}
def post(url, headers, body):
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json", **headers})
    return json.load(urllib.request.urlopen(request))
post(os.environ["OPENAI_BASE_URL"] + "/chat/completions", {"Authorization": "Bearer " + os.environ["OPENAI_API_KEY"]}, body)
body["max_tokens"] = 10
post(os.environ["ANTHROPIC_BASE_URL"] + "/v1/messages", {"x-api-key": os.environ["ANTHROPIC_API_KEY"]}, body)
print("a log line")
print(json.dumps({"reward": len(os.listdir("."))}))
"""


def command(script):
    return (sys.executable, "-c", script)


def test_a_command_finds_its_run_and_its_row_and_prints_its_reward():
    (branches,), _ = played(command(SCRIPT), row={"words": "schön"})
    assert [b.reward for b in branches] == [0.0, 0.0], "its working folder is empty"
    assert len(branches) == 2
    assert "schön" in CHAT.decode(branches[0].segments[0].token_ids)


class Served:
    """A program with something that all of its episodes share."""

    def __init__(self, error=None):
        self.error, self.tasks, self.is_open = error, [], False

    @asynccontextmanager
    async def serving(self):
        self.tasks.append(asyncio.current_task())
        if self.error:
            raise self.error
        self.is_open = True
        yield
        self.is_open = False
        self.tasks.append(asyncio.current_task())

    async def __call__(self, base_url, api_key, row):
        assert self.is_open
        return await says_hello(base_url, api_key, row)


def test_what_episodes_share_is_held_by_one_task_while_they_are_played():
    program = Served()
    outcomes, _ = played(program, num=2)
    assert [o[0].reward for o in outcomes] == [0.0, 1.0]
    assert not program.is_open
    assert program.tasks[0] is program.tasks[1]


@pytest.mark.slow
@pytest.mark.parametrize(("target", "said"), [("unopened", "no port is free"), ("nothing", "no nothing in")])
def test_a_worker_that_cannot_start_ends_the_run_and_quotes_what_it_said(target, said, tmp_path):
    async def main():
        await WorkerRunner(f"tests.rollout.agent_programs:{target}", log=tmp_path / "log", timeout_s=1.0).open()

    with pytest.raises(RolloutError, match=said):
        asyncio.run(main())


def test_the_last_line_of_what_a_command_said_comes_first():
    (failure,), _ = played(command("def ask():\n    raise KeyError('question')\nask()"))
    assert failure.reason.startswith("the program ended with status 1; it said: KeyError: 'question'; before that: Traceback")


FAILING = {
    "ended with status 3; it said: no shop": "import sys; print('no shop', file=sys.stderr); sys.exit(3)",
    "was ended by signal 9": "import os; os.kill(os.getpid(), 9)",
    "it printed nothing": "pass",
    "its last line is 'bye'": "print('{\"reward\": 1}'); print('bye')",
    "gave no reward": "print('{\"score\": 1}')",
    "not a number": 'print(\'{"reward": "high"}\')',
    "asked for no turn": "print('{\"reward\": 1}')",
}


@pytest.mark.parametrize("reason", FAILING)
def test_a_command_that_fails_is_a_failed_episode_with_its_reason(reason):
    (failure,), _ = played(command(FAILING[reason]))
    assert isinstance(failure, Failure)
    assert reason in failure.reason
    assert (failure.id, failure.group_id) == ("g000001.0", "g000001")


def test_a_command_that_cannot_be_started_is_a_failed_episode():
    (failure,), _ = played(("/no/such/program",))
    assert "status 127" in failure.reason or "cannot be started" in failure.reason


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_a_command_is_killed_whole_at_its_deadline(tmp_path):
    pids = tmp_path / "pids"
    script = f"""
import os, subprocess, sys, time
inner = subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"])
open({str(pids)!r}, "w").write(f"{{os.getpid()}} {{inner.pid}}")
print("waiting", file=sys.stderr, flush=True)
time.sleep(600)
"""
    started = time.monotonic()
    (failure,), _ = played(command(script), timeout_s=2.0)
    assert failure.reason == "the program timed out after 2 s (env.program_timeout_s); it said: waiting"
    assert time.monotonic() - started < 30
    for pid in map(int, pids.read_text().split()):
        while is_alive(pid):
            assert time.monotonic() - started < 30
            time.sleep(0.05)


@pytest.mark.slow
def test_a_command_has_no_more_memory_than_it_is_given():
    async def main():
        runner = CommandRunner(command("x = bytearray(2**30)\nprint(1)"), timeout_s=30.0, memory_bytes=2**28)
        async with Gateway().listening() as gateway:
            with gateway.episode(Talk().conversations, {}) as address:
                return await runner.run(address)

    with pytest.raises(EnvironmentFailed, match="MemoryError"):
        asyncio.run(main())


@pytest.mark.parametrize("leaked", [ValueError("broken"), SystemExit(2), KeyboardInterrupt(), asyncio.CancelledError()])
def test_whatever_a_function_raises_fails_its_episode_alone(leaked):
    async def program(base_url, api_key, row):
        await post(base_url, api_key, asks("hello"))
        if row["n"] == 1:
            raise leaked
        return 1.0

    outcomes, world = played(program, num=3)
    assert [isinstance(o, Failure) for o in outcomes] == [False, True, False]
    assert type(leaked).__name__ in outcomes[1].reason
    assert outcomes[1].num_tokens > 0
    assert world.dropped == ["g000001.1"]


def test_a_function_that_hangs_is_a_failed_episode():
    async def program(base_url, api_key, row):
        await asyncio.sleep(600)

    (failure,), _ = played(program, timeout_s=0.2)
    assert failure.reason == "the program timed out after 0.2 s (env.program_timeout_s)"


def test_only_the_key_of_an_episode_opens_it():
    seen = []

    async def program(base_url, api_key, row):
        seen.append(await post(base_url, "sk-other", asks("hello")))
        seen.append(await post(base_url.replace("/v1", "x/v1"), api_key, asks("hello")))
        seen.append(await post(base_url, api_key, asks("hello")))
        return 1.0

    played(program)
    assert [status for status, _ in seen] == [401, 404, 200]
    assert seen[0][1]["error"]["code"] == "invalid_api_key"


@pytest.mark.slow
def test_a_connection_that_was_idle_for_longer_than_a_turn_is_answered():
    async def program(base_url, api_key, row):
        host, _, path = base_url.removeprefix("http://").partition("/")
        reader, writer = await asyncio.open_connection(*host.split(":"))
        body = json.dumps(asks("hello")).encode()
        head = f"POST /{path}/chat/completions HTTP/1.1\r\nhost: {host}\r\nauthorization: Bearer {api_key}\r\n"
        for pause_s in (6.0, 0.0):
            writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
            answer = await reader.readuntil(b"\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 200")
            await reader.readexactly(int(answer.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]))
            await asyncio.sleep(pause_s)
        writer.close()
        return 1.0

    ((branch, _),), _ = played(program)
    assert branch.reward == 1.0


BAD = [
    b"", b"{", b"[]", b"null", b'{"messages": []}', b'{"messages": [{"role": "king", "content": "x"}]}',
    b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}',
    b'{"messages": [{"role": "user", "content": 5}]}', b'{"messages": [{"role": "assistant", "content": "x"}]}',
    b'{"messages": [{"role": "user", "content": "x"}], "temperature": -1}',
    b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999}',
    b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 0}',
    b'{"messages": [{"role": "user", "content": "\\ud800"}]}', b"\xff\xfe", b"[" * 100_000,
    b'{"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "web_search"}]}',
    b'{"messages": [{"role": "user", "content": "x"}], "tools": 7}', b'{"input": []}', b'{"input": [{"type": "reasoning"}]}',
    b'{"input": [{"role": "user", "content": 5}]}', b'{"input": [{"role": "user", "content": ["x"]}]}',
    b'{"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": ["x"]}]}]}',
]  # fmt: skip


def test_a_bad_request_is_a_4xx_with_a_reason_and_harms_nobody():
    seen = []

    async def program(base_url, api_key, row):
        headers = {"Authorization": f"Bearer {api_key}", "content-type": "application/json"}
        async with aiohttp.ClientSession(headers=headers) as session:
            for route in ("chat/completions", "responses", "messages"):
                for body in BAD:
                    async with session.post(f"{base_url}/{route}", data=body) as answer:
                        seen.append((route, body, answer.status, await answer.json()))
        return (await says_hello(base_url, api_key, {"n": 1}))["reward"]

    ((branch,),), _ = played(program)
    assert branch.reward == 1.0
    assert [s for s in seen if not 400 <= s[2] < 500] == []
    assert all(s[3]["error"]["message"] for s in seen)


async def events_of(url, key, body, route):
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{url}/{route}", json={**body, "stream": True}, headers={"Authorization": f"Bearer {key}"}) as answer,
    ):
        assert answer.headers["content-type"].startswith("text/event-stream")
        text = (await answer.read()).decode()
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ") and "[DONE]" not in line]


def test_a_stream_says_what_a_plain_answer_says():
    told = {}

    async def program(base_url, api_key, row):
        for name, body in (("call", {**asks("hello"), "tools": [TOOL]}), ("text", asks("hello"))):
            told[name] = await events_of(base_url, api_key, body, "chat/completions")
        return 1.0

    played(program, engine=Engine(says=lambda prompt: (*spell(CALL), END)))
    (call,) = [d["tool_calls"][0] for e in told["call"] for d in [e["choices"][0]["delta"]] if "tool_calls" in d]
    assert json.loads(call["function"]["arguments"]) == {"at": "o17"}
    assert told["call"][-1]["choices"][0]["finish_reason"] == "tool_calls"
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in told["text"]) == CALL


def test_all_interfaces_go_on_from_the_same_tokens():
    async def program(base_url, api_key, row):
        tools = [dict(TOOL["function"], type="function")]
        _, one = await post(base_url, api_key, {"input": "hello", "tools": tools}, "responses")
        (item,) = [i for i in one["output"] if i["type"] == "function_call"]
        result = {"type": "function_call_output", "call_id": item["call_id"], "output": "a lamp"}
        history = [{"role": "user", "content": "hello"}, *one["output"], result]
        await post(base_url, api_key, {"input": history, "tools": tools}, "responses")
        use = {"type": "tool_use", "id": "t", "name": "look", "input": {"at": "o17"}}
        blocks = [
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": [use]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "a lamp"}]},
            {"role": "assistant", "content": [use]},
            {
                "role": "user",
                "content": [{"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": "ok"}]}],
            },
        ]
        tool = {"name": "look", "input_schema": TOOL["function"]["parameters"]}
        _, three = await post(base_url, api_key, {"messages": blocks, "tools": [tool], "max_tokens": 64}, "messages")
        assert three["stop_reason"] == "tool_use"
        return 1.0

    (branches,), world = played(program, engine=Engine(says=lambda prompt: (*spell(CALL), END)))
    assert not isinstance(branches, Failure), branches
    assert len(branches) == 1
    assert dict(world.counts.requests) == {"opened": 1, "continued": 2}


def test_a_client_that_leaves_in_mid_turn_drops_it():
    engine, controller = Engine(), []

    async def program(base_url, api_key, row):
        controller[0].call_soon_threadsafe(engine.gate.clear)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(post(base_url, api_key, asks("hello")), 0.5)
        controller[0].call_soon_threadsafe(engine.gate.set)
        await post(base_url, api_key, asks("hello"))
        return 1.0

    async def main():
        controller.append(asyncio.get_running_loop())
        world = World(program, engine=engine)
        return await world.play(), world

    ((branch,),), world = asyncio.run(main())
    assert len(branch.segments) == 2
    assert world.counts.dropped_answers == 1


def test_an_engine_that_ends_ends_the_run_and_not_the_episode():
    engine = Engine()
    engine.error = WorkerDiedError("the engine is gone", got="", allowed="", fix="")
    with pytest.raises(WorkerDiedError):
        played(says_hello, engine=engine)


def test_64_programs_at_a_time_that_retry_rewrite_branch_and_die_train_every_token_once():
    async def program(base_url, api_key, row):
        n = row["n"]
        messages = [{"role": "system", "content": "plan"}, {"role": "user", "content": f"task {n}"}]
        for turn in range(6):
            if n % 4 == 0 and turn == 3:  # compacts
                messages = [*messages[:2], {"role": "user", "content": "in short"}]
            if n % 4 == 1 and turn == 2:  # a sub-agent
                sub = [{"role": "system", "content": "search"}, {"role": "user", "content": f"part {n}"}]
                await asyncio.gather(*(post(base_url, api_key, {"messages": sub}) for _ in range(2)))
            if n % 4 == 2 and turn == 1:  # retries
                await post(base_url, api_key, {"messages": messages})
            if n % 4 == 3 and turn == 4:
                raise RuntimeError("died")
            _, answer = await post(base_url, api_key, {"messages": messages})
            messages += [answer["choices"][0]["message"], {"role": "user", "content": f"turn {turn}"}]
        return 1.0

    outcomes, world = played(program, num=64)
    assert [isinstance(o, Failure) for o in outcomes] == [n % 4 == 3 for n in range(64)]
    branches = [b for o in outcomes if not isinstance(o, Failure) for b in o]
    num = [len(o) for o in outcomes if not isinstance(o, Failure)]
    assert num == [{0: 2, 1: 3, 2: 2}[n % 4] for n in range(64) if n % 4 != 3]
    sampled = sum(len(s.token_ids) for b in branches for s in b.segments if isinstance(s, Sampled))
    whole = sum(len(g.output_ids) for _, g in world.talk.engine.generations)
    assert sampled + sum(o.num_tokens for o in outcomes if isinstance(o, Failure)) == whole
    assert world.counts.requests["rewritten"] == 16
    assert sorted(world.dropped) == sorted(f"g000001.{n}" for n in range(64) if n % 4 == 3)


def worked(rows, *, function="plays", timeout_s=20.0, log="/dev/null"):
    """Plays rows in a worker, those of a list at the same time; returns the outcomes and the worker's process."""

    async def main():
        world = World(())
        runner = WorkerRunner(f"tests.rollout.agent_programs:{function}", log=Path(log), timeout_s=timeout_s)
        found = []
        async with Gateway().listening() as gateway:
            player = ProgramPlayer(
                agent=world.talk.agent, formats=ChatFormats(CHAT.for_tools), gateway=gateway, program=runner, rules=Rules()
            )
            for n, together in enumerate(rows):
                plays = [player.play({"n": n, **row}, id=f"g{n}.{m}", group_id="g") for m, row in enumerate(together)]
                found += await asyncio.gather(*plays)
            pid = runner._worker._process.pid
            await runner.close()
        return found, pid

    return asyncio.run(asyncio.wait_for(main(), 60))


@pytest.mark.slow
@pytest.mark.parametrize("function", ["plays", "plain"])
def test_a_worker_plays_episodes_and_ends_with_the_run(function, tmp_path):
    log = tmp_path / "program.log"
    outcomes, pid = worked([[{"does": ""}] * 4, [{"does": ""}]], function=function, log=log)
    assert [o[0].reward for o in outcomes] == [0.0] * 4 + [1.0]
    assert not is_alive(pid)
    assert log.read_text().count("printed by a program") == (5 if function == "plays" else 0)


@pytest.mark.slow
def test_several_workers_share_the_episodes_and_all_end_with_the_run(tmp_path):
    async def main():
        world = World(())
        made = [WorkerRunner("tests.rollout.agent_programs:plays", log=tmp_path / "log", timeout_s=20.0) for _ in range(2)]
        runner = SpreadRunner(made)
        async with Gateway().listening() as gateway:
            player = ProgramPlayer(
                agent=world.talk.agent, formats=ChatFormats(CHAT.for_tools), gateway=gateway, program=runner, rules=Rules()
            )
            await runner.open()
            pids = {worker._worker._process.pid for worker in made}
            rows = [{"n": n, "does": ""} for n in range(4)]
            found = await asyncio.gather(*(player.play(row, id=f"g.{row['n']}", group_id="g") for row in rows))
            await runner.close()
        return found, pids

    found, pids = asyncio.run(asyncio.wait_for(main(), 60))
    assert len(pids) == 2
    assert not any(map(is_alive, pids))
    assert sorted(branches[0].reward for branches in found) == [0.0, 1.0, 2.0, 3.0]


def test_an_episode_goes_to_the_worker_that_plays_the_fewest():
    class Counting(Runner):
        def __init__(self):
            self.notes, self.rows = [], []

        async def run(self, address):
            self.rows.append(address.row["n"])
            await asyncio.sleep(0.001 if address.row["n"] == 1 else 0.1)
            return 0.0

    async def main():
        workers = [Counting(), Counting()]
        runner = SpreadRunner(workers)
        play = [asyncio.create_task(runner.run(Address(root="", key="", row={"n": n}))) for n in range(2)]
        await play[1]
        await runner.run(Address(root="", key="", row={"n": 2}))
        await play[0]
        workers[1].notes.append("told")
        return [worker.rows for worker in workers], runner.notes

    assert asyncio.run(main()) == ([[0], [1, 2]], ["told"])


@pytest.mark.slow
def test_a_worker_that_dies_or_is_blocked_fails_its_episodes_alone_and_another_one_takes_over(tmp_path):
    log = tmp_path / "program.log"
    does = [[{"does": "raises"}], [{"does": "dies"}, {"does": "waits"}], [{"does": ""}]]
    raised, died, waited, well = worked(does, log=log)[0]
    assert raised.reason == "ValueError: broken"
    assert "in plays" in log.read_text(), "the traceback"
    assert died.reason == waited.reason == "the process of agent programs ended with status -9"
    assert well[0].reward == 2.0
    blocked, other, after = worked([[{"does": "blocks"}, {"does": "waits"}], [{"does": ""}]], timeout_s=1.0)[0]
    assert "timed out after 1 s" in blocked.reason
    assert other.begins_again
    assert after[0].reward == 1.0


@pytest.mark.slow
def test_a_function_that_holds_the_event_loop_of_all_is_told_of_once_by_name():
    told = []

    async def main():
        world = World(())
        runner = WorkerRunner("tests.rollout.agent_programs:plays", log=Path("/dev/null"), timeout_s=20.0)
        async with Gateway().listening() as gateway:
            player = ProgramPlayer(
                agent=world.talk.agent, formats=ChatFormats(CHAT.for_tools), gateway=gateway, program=runner, rules=Rules()
            ).watched(Watch(tell=lambda made: told.append(made(3))))  # fmt: skip
            rows = [{"n": n, "does": "holds"} for n in range(2)]
            found = await asyncio.gather(*(player.play(row, id=f"g.{row['n']}", group_id="g") for row in rows))
            found += await asyncio.gather(player.play({"n": 2, "does": ""}, id="g.2", group_id="g"))
            await runner.close()
        return found

    outcomes = asyncio.run(asyncio.wait_for(main(), 60))
    assert [o[0].reward for o in outcomes] == [0.0, 1.0, 2.0]
    (warned,) = told
    assert warned.name == "agent_program"
    assert warned.message.startswith("plays (agent_programs.py, line ")
    assert "asyncio.to_thread" in warned.message


@pytest.mark.slow
def test_an_episode_that_has_ended_leaves_nothing_in_the_gateway():
    """Many requests against one gateway: what is kept of them is bounded, and no conversation outlives its episode."""

    async def program(base_url, api_key, row):
        messages = [{"role": "user", "content": f"task {row['n']}"}]
        for turn in range(4):
            _, answer = await post(base_url, api_key, {"messages": messages, "tools": [TOOL]})
            messages += [answer["choices"][0]["message"], {"role": "user", "content": f"turn {turn}"}]
        raise RuntimeError("died") if row["n"] % 2 else SystemExit(1)

    async def main():
        gc.collect()
        others = [id(one) for one in gc.get_objects() if type(one) is Conversations]  # of other tests
        world = World(program)
        for _ in range(4):
            await world.play(32)
            gc.collect()
            alive = [one for one in gc.get_objects() if type(one) is Conversations and id(one) not in others]
            assert alive == [world.talk.conversations], "but for the one that the test holds"
            assert world.gateway._episodes == {}
        return world.counts.requests

    assert asyncio.run(asyncio.wait_for(main(), 300)) == {"opened": 128, "continued": 3 * 128}


OUTLIVES = """
import json, subprocess, sys, time
subprocess.Popen(["sleep", "100"], start_new_session=True)  # with the pipes of this one
print(json.dumps({"reward": 0.5}), flush=True)
time.sleep(float(sys.argv[1]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sleep_s", "expected"), [("0", 0.5), ("100", "the program timed out after 3 s (env.program_timeout_s)")]
)
def test_a_process_that_outlives_its_command_and_holds_its_pipes_holds_up_no_episode(sleep_s, expected, monkeypatch):
    monkeypatch.setattr("oldlogits.rollout.gateway.programs._LAST_WORDS_S", 0.2)
    script = "import urllib.request\n" + OUTLIVES
    if sleep_s == "0":
        script = SCRIPT.replace('print(json.dumps({"reward": len(os.listdir("."))}))', "") + OUTLIVES
    (outcome,), _ = played((*command(script), sleep_s), row={"words": "hi"}, timeout_s=3.0)
    assert (outcome.reason if isinstance(outcome, Failure) else outcome[0].reward) == expected


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the loop that is given up has tasks
def test_a_function_that_blocks_the_event_loop_of_all_fails_and_the_others_begin_again():
    block = threading.Event()
    running = []

    async def program(base_url, api_key, row):
        if row["n"] == 0:
            while len(running) < 3:
                await asyncio.sleep(0)
            block.wait(60)
        running.append(row["n"])
        await asyncio.sleep(0.1 if row["n"] == 0 else 0.5)
        return (await says_hello(base_url, api_key, row))["reward"]

    async def main():
        world = World(program, timeout_s=2.0)
        outcomes = await asyncio.wait_for(asyncio.gather(world.play(4)), 60)
        return outcomes[0]

    outcomes = asyncio.run(main())
    block.set()
    place = f"in {program.__qualname__} (test_gateway.py, line {program.__code__.co_firstlineno + 4})"
    late = "the program timed out after 2 s (env.program_timeout_s)"
    assert [(o.reason, o.begins_again) for o in outcomes] == [
        (f"{late}: it blocked the event loop of all episodes {place}", False),
        *[(f"asynchronous code of another episode blocked the event loop of all {place}", True)] * 3,
    ]
    ((branch,),), _ = played(says_hello, row={"n": 5})
    assert branch.reward == 5.0, "another event loop has taken over"


def test_a_plain_function_may_return_what_is_awaited():
    ((branch,),), _ = played(lambda base_url, api_key, row: says_hello(base_url, api_key, row), row={"n": 2})
    assert branch.reward == 2.0
