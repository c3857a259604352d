"""The routes of the embedded engine, spoken to by a client that knows only vLLM's documents."""

import asyncio
import copy
import json
import os
import signal
import subprocess
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest

from oldlogits.cli.main import run as command
from oldlogits.core.engine import EngineSpec, Sampling
from oldlogits.core.errors import ConfigError, MissingLogprobError
from oldlogits.core.server import GenerateRequest
from oldlogits.core.weights import FullWeights
from oldlogits.engines.embedded.process import EngineProcess
from oldlogits.engines.protocols import vllm_messages as wire
from oldlogits.engines.server.app import check_host, make_app
from oldlogits.engines.server.limits import Limits
from oldlogits.engines.server.served import Served
from oldlogits.engines.shared_memory import HostWeights

from ..waiting import HUNG_S
from .reference import VOCAB, load, logp_of, make_model, perturbed, save, weights_of

pytestmark = pytest.mark.slow

CONTEXT = 600


@pytest.fixture(scope="module")
def model():
    return make_model("qwen3")


@pytest.fixture(scope="module")
def spec(model, tmp_path_factory):
    return EngineSpec(model_path=save(model, tmp_path_factory.mktemp("model")), max_num_seqs=8, max_context=CONTEXT)


@pytest.fixture(scope="module")
def served(spec):
    engine = EngineProcess(spec)
    yield Served(engine, spec, "tiny")
    engine.close()


@asynccontextmanager
async def client_of(served, *, token="", host="127.0.0.1", **headers):
    await served.engine.ready()
    app = make_app(served, Limits(max_body_bytes=2**20), token=token)
    transport = httpx.ASGITransport(app=app)
    url = f"http://{host}:8000"
    async with httpx.AsyncClient(transport=transport, base_url=url, headers=headers, timeout=HUNG_S) as client:
        yield client


def ask(max_tokens=20, **params):
    return {"request_id": "a", "token_ids": [3, 1, 4], "sampling_params": {"max_tokens": max_tokens, "logprobs": 0, **params}}


async def post(client, path, body=None, status=200):
    answer = await client.post(path, json=body)
    assert answer.status_code == status, answer.text
    return answer.json()


async def until_sampling(client, served):
    """Wait until every request has some tokens; leaves the engine paused."""
    while True:
        await post(client, "/pause?mode=keep&clear_cache=true")
        partials = await served.engine.partials()
        if partials and all(partial.output_ids for partial in partials.values()):
            return
        await post(client, "/resume")


async def update(client, weights, label):
    host = HostWeights()
    path = host.take(FullWeights(tensors=weights), 7)
    try:
        await post(client, "/pause?mode=keep&clear_cache=true")
        await post(client, "/start_weight_update")
        await post(client, "/update_weights", {"update_info": {"path": str(path), "version": 7}})
        await post(client, "/finish_weight_update", {"weight_version": label})
        await post(client, "/resume")
    finally:
        host.close()


def test_tokens_come_out_with_the_log_probs_of_the_distribution_that_they_were_sampled_from(served, model):
    async def play():
        async with client_of(served) as client:
            return await post(client, "/inference/v1/generate", ask(temperature=0.7, prompt_logprobs=0))

    body = asyncio.run(play())
    [choice] = body["choices"]
    tokens = choice["token_ids"]
    assert len(tokens) == 20
    assert body["request_id"] == "generate-tokens-a"
    assert choice["finish_reason"] == "length"
    assert choice["weight_versions"] == [{"version": "default", "start": 0, "end": 20}]
    content = choice["logprobs"]["content"]
    assert [entry["token_id"] for entry in content] == tokens
    expected = logp_of(model, [3, 1, 4, *tokens], 0.7)[2:]
    np.testing.assert_allclose([entry["logprob"] for entry in content], expected, atol=1e-5)
    assert body["prompt_logprobs"][0] is None
    of_prompt = [entry[str(token)]["logprob"] for entry, token in zip(body["prompt_logprobs"][1:], [1, 4], strict=True)]
    np.testing.assert_allclose(of_prompt, logp_of(model, [3, 1, 4]), atol=1e-5)
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 20, "total_tokens": 23}


def test_a_request_that_meets_an_update_says_which_weights_sampled_what(served, model):
    weights = perturbed(weights_of(model), seed=1)

    async def play():
        async with client_of(served) as client:
            await update(client, weights_of(model), "default")
            running = asyncio.create_task(post(client, "/inference/v1/generate", ask(500)))
            await until_sampling(client, served)
            await update(client, weights, "run/7")
            assert (await client.get("/weight_info")).json() == {"weight_version": "run/7"}
            return await running

    body = asyncio.run(play())
    [choice] = body["choices"]
    spans = choice["weight_versions"]
    assert [span["version"] for span in spans] == ["default", "run/7"]
    assert [spans[0]["start"], spans[0]["end"], spans[1]["end"]] == [0, spans[1]["start"], 500]
    split, tokens = spans[1]["start"], choice["token_ids"]
    values = [entry["logprob"] for entry in choice["logprobs"]["content"]]
    before = logp_of(model, [3, 1, 4, *tokens[:split]])[2:]
    after = logp_of(load(copy.deepcopy(model), weights), [3, 1, 4, *tokens])[2 + split :]
    np.testing.assert_allclose(values, [*before, *after], atol=2e-5)


def test_an_aborted_request_returns_what_it_has(served):
    async def play():
        async with client_of(served) as client:
            running = asyncio.create_task(post(client, "/inference/v1/generate", ask(590)))
            await until_sampling(client, served)
            assert (await client.get("/is_paused")).json() == {"is_paused": True}
            assert (await client.get("/load")).json() == {"server_load": 1}
            assert (await post(client, "/inference/v1/abort_requests", {"request_ids": ["a"]}))["aborted"] == 0
            assert (await post(client, "/inference/v1/abort_requests", {"request_ids": ["generate-tokens-a"]}))["aborted"] == 1
            body = await running
            await post(client, "/resume")
            return body

    [choice] = asyncio.run(play())["choices"]
    assert choice["finish_reason"] == "abort"
    assert 0 < len(choice["token_ids"]) < 590
    assert choice["weight_versions"][-1]["end"] == len(choice["token_ids"])


def test_what_is_out_of_order_or_unknown_is_refused_and_changes_nothing(served, model, tmp_path):
    foreign = tmp_path / "weights.safetensors"
    foreign.write_bytes(b"")

    async def play():
        async with client_of(served) as client:
            refusals = [
                ("/start_weight_update", None, "pause"),
                ("/update_weights", {"update_info": {"path": "/dev/shm/x", "version": 1}}, "start"),
                ("/finish_weight_update", {}, "start"),
                ("/pause?mode=wait", None, "'keep' or 'abort'"),
                ("/inference/v1/generate", ask(min_p=0.1), "min_p"),
                ("/inference/v1/generate", ask(logprobs=0) | {"stream": True}, "stream"),
                ("/inference/v1/generate", ask() | {"token_ids": []}, "tokens"),
                ("/inference/v1/generate", ask() | {"token_ids": [VOCAB]}, "vocabulary"),
                ("/inference/v1/generate", [], "body"),
            ]
            for path, body, word in refusals:
                assert word in (await post(client, path, body, status=400))["error"]["message"]
            await post(client, "/pause?mode=keep")
            await post(client, "/start_weight_update")
            await post(client, "/start_weight_update", status=400)
            await post(client, "/resume", status=400)
            await post(client, "/update_weights", {"update_info": {"path": str(foreign), "version": 1}}, status=400)
            await post(client, "/finish_weight_update", {})
            await post(client, "/resume")
            return await post(client, "/inference/v1/generate", ask(5))

    label = served.label
    assert asyncio.run(play())["choices"][0]["weight_versions"][0]["version"] == label


def test_a_token_opens_everything_and_without_it_only_health_answers(served):
    async def status(method, path, **headers):
        async with client_of(served, token="secret", host="elsewhere", **headers) as client:
            return (await client.request(method, path)).status_code

    async def play():
        assert await status("GET", "/health") == 200
        for method, path in [("GET", "/weight_info"), ("POST", "/pause"), ("POST", "/inference/v1/generate")]:
            assert await status(method, path) == 401
            assert await status(method, path, authorization="Bearer wrong") == 401
        assert await status("GET", "/weight_info", authorization="Bearer secret") == 200

    asyncio.run(play())


def test_without_a_token_only_this_machine_and_no_page_of_a_browser_gets_in(served):
    async def status(**arguments):
        async with client_of(served, **arguments) as client:
            return (await client.post("/pause?mode=keep")).status_code

    assert asyncio.run(status(host="evil.example")) == 401
    assert asyncio.run(status(origin="http://evil.example")) == 401
    assert asyncio.run(status(host="localhost")) == 200


@pytest.mark.parametrize("host, token, refused", [("0.0.0.0", "", True), ("0.0.0.0", "t", False), ("::1", "", False)])
def test_other_machines_need_a_token(host, token, refused):
    if refused:
        with pytest.raises(ConfigError, match="OLDLOGITS_TOKEN"):
            check_host(host, token)
    else:
        check_host(host, token)


def test_the_command_refuses_another_host_before_it_loads_anything(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("OLDLOGITS_TOKEN", raising=False)
    assert command(["serve", str(tmp_path), "--host", "0.0.0.0"]) == 2
    assert "need a token" in capsys.readouterr().err


def test_the_command_serves_and_ends_with_its_engine(tiny_folder):
    process = subprocess.Popen(
        [sys.executable, "-m", "oldlogits", "serve", str(tiny_folder), "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OLDLOGITS_TOKEN": "secret"},
    )
    try:
        line = process.stdout.readline()
        url = line.split(" on ")[1].split()[0]
        assert line.rstrip().endswith(f"(with a token); base URL of chat clients: {url}/v1")
        with httpx.Client(base_url=url, headers={"authorization": "Bearer secret"}, trust_env=False) as client:
            assert client.get("/health").status_code == 200
            assert client.get("/version").json()["version"].startswith("0.32")
            assert client.get("/v1/models").json()["data"][0]["max_model_len"] == 128
            assert client.get("/metrics").text.splitlines()[-1] == "vllm:generation_tokens_total 0"
            info = client.get("/server_info?config_format=json").json()["vllm_config"]
            assert info["model_config"]["logprobs_mode"] == "processed_logprobs"
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        engine = [pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        os.kill(int(engine[0]), signal.SIGKILL)
        _, error = process.communicate(timeout=HUNG_S)
    except BaseException:
        process.kill()
        process.communicate()
        raise
    assert process.returncode == 1
    assert "engine process ended" in error
    assert "Traceback" not in error


REQUEST = GenerateRequest(request_id="a", token_ids=(3, 1), sampling=Sampling(max_tokens=2, prompt_logprobs=True))


def answer_of(body):
    return wire.read(wire.AnswerBody, json.dumps(body).encode()).answer(REQUEST, int)


def vllm_answer(**changes):
    """An answer as vLLM 0.32 writes it."""
    choice = {
        "index": 0,
        "finish_reason": "stop",
        "stop_reason": 9,
        "token_ids": [7, 9],
        "routed_experts": None,
        "weight_versions": [{"version": "4", "start": 0, "end": 1}, {"version": "5", "start": 1, "end": 2}],
        "logprobs": {
            "content": [
                {"token_id": 7, "logprob": -0.5, "rank": 1, "top_logprobs": [{"token_id": 7, "logprob": -0.5, "rank": 1}]},
                {"token_id": 9, "logprob": -1.5, "rank": 3, "top_logprobs": []},
            ]
        },
    }
    top = {"1": {"logprob": -2.0, "rank": 5, "decoded_token": None}, "6": {"logprob": -0.1, "rank": 1, "decoded_token": None}}
    return {
        "request_id": "generate-tokens-a",
        "choices": [choice | changes],
        "prompt_logprobs": [None, top],
        "output_mode": "tokens",
    }


def test_an_answer_of_vllm_is_read_value_by_value():
    answer = answer_of(vllm_answer())
    assert answer.output_ids == (7, 9)
    assert answer.logprobs == (-0.5, -1.5)
    assert [(s.version, s.start, s.end) for s in answer.spans] == [(4, 0, 1), (5, 1, 2)]
    assert answer.finish_reason == "stop"
    assert answer.prompt_logprobs == (-2.0,)


def test_tokens_without_log_probs_or_versions_are_refused():
    for changes in ({"logprobs": None}, {"weight_versions": None}, {"token_ids": [7, 8]}):
        with pytest.raises(MissingLogprobError):
            answer_of(vllm_answer(**changes))
    with pytest.raises(ConfigError, match="finish_reason"):
        answer_of(vllm_answer(finish_reason="error"))


def test_requests_and_answers_survive_their_json():
    asked = wire.read(wire.GenerateBody, wire.GenerateBody.of(REQUEST).model_dump_json().encode())
    assert asked.request(default_id="x", default_max_tokens=1) == REQUEST
    answer = answer_of(vllm_answer())
    body = wire.AnswerBody.of(answer, REQUEST, model="m", labels={4: "4", 5: "5"})
    assert answer_of(json.loads(body.model_dump_json())) == answer
