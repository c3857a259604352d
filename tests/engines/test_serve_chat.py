"""The chat interfaces of `oldlogits serve`, spoken to over HTTP."""

import asyncio
from contextlib import asynccontextmanager

import httpx
import pytest

from oldlogits.config.schema import RunConfig
from oldlogits.core.engine import EngineSpec
from oldlogits.engines.embedded.process import EngineProcess
from oldlogits.engines.server.app import make_app
from oldlogits.engines.server.chat import ServedChat
from oldlogits.engines.server.limits import Limits
from oldlogits.engines.server.served import Served
from oldlogits.envs.parsers.plain import PlainParser
from oldlogits.run.chat import model_chat

from ..waiting import HUNG_S

pytestmark = pytest.mark.slow

CONTEXT = 96
CHAT, MESSAGES = "/v1/chat/completions", "/v1/messages"
ASKED = {"messages": [{"role": "user", "content": "please cancel my lamp order"}], "temperature": 0}


@pytest.fixture(scope="module")
def served(tiny_folder):
    spec = EngineSpec(model_path=str(tiny_folder), max_num_seqs=8, max_context=CONTEXT)
    engine = EngineProcess(spec)
    yield Served(engine, spec, "tiny")
    engine.close()


@asynccontextmanager
async def client_of(served, folder, *, token="", unmet="override", notes=None, **headers):
    await served.engine.ready()
    note = notes.append if notes is not None else print
    chat = ServedChat(served, model_chat(RunConfig(), folder), PlainParser(), unmet=unmet, note=note)
    app = make_app(served, Limits(max_body_bytes=2**16), token=token, chat=chat)
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", headers=headers, timeout=HUNG_S) as client:
        yield client


@pytest.fixture
def talk(served, tiny_folder):
    """Have one exchange with a client, and return what it returns."""

    def talk(exchange, **options):
        async def go():
            async with client_of(served, tiny_folder, **options) as client:
                return await exchange(client)

        return asyncio.run(go())

    return talk


def test_a_turn_is_what_the_engine_samples_after_the_conversations_own_tokens(talk, tiny_folder):
    async def exchange(client):
        answer = (await client.post(CHAT, json={**ASKED, "return_token_ids": True, "logprobs": True})).json()
        prompt, [choice] = answer["prompt_token_ids"], answer["choices"]
        sampling = {"max_tokens": len(choice["token_ids"]), "temperature": 0, "logprobs": 0}
        body = {"request_id": "a", "token_ids": prompt, "sampling_params": sampling}
        return prompt, choice, (await client.post("/inference/v1/generate", json=body)).json()["choices"][0]

    prompt, choice, sampled = talk(exchange)
    assert prompt == model_chat(RunConfig(), tiny_folder).prompt_ids("please cancel my lamp order", "")
    assert choice["token_ids"] == sampled["token_ids"]
    said, drawn = (one["logprobs"]["content"] for one in (choice, sampled))
    assert [entry["logprob"] for entry in said] == pytest.approx([entry["logprob"] for entry in drawn], abs=1e-5)


def test_temperature_top_k_and_the_most_tokens_are_the_requests(talk):
    async def exchange(client):
        greedy = (await client.post(CHAT, json={**ASKED, "max_tokens": 6})).json()
        likeliest = (await client.post(CHAT, json={**ASKED, "max_tokens": 6, "temperature": 5.0, "top_k": 1})).json()
        drawn = [(await client.post(CHAT, json={**ASKED, "max_tokens": 6, "temperature": 5.0})).json() for _ in range(4)]
        return greedy, likeliest, drawn

    greedy, likeliest, drawn = talk(exchange)
    assert (greedy["usage"]["completion_tokens"], greedy["choices"][0]["finish_reason"]) == (6, "length")
    words = [one["choices"][0]["message"]["content"] for one in (greedy, likeliest, *drawn)]
    assert words[0] == words[1]
    assert len(set(words)) > 2


def test_what_cannot_be_honoured_is_counted_and_told_once_or_refused(talk):
    asked, notes = {**ASKED, "stop": ["x"], "n": 3, "max_tokens": 2}, []

    async def overridden(client):
        for _ in range(2):
            assert (await client.post(CHAT, json=asked)).status_code == 200
        return (await client.get("/metrics")).text

    metrics = talk(overridden, notes=notes)
    assert 'oldlogits:overridden_parameters_total{parameter="n"} 2' in metrics
    assert 'oldlogits:overridden_parameters_total{parameter="stop"} 2' in metrics
    assert sorted(note.split("'")[1] for note in notes) == ["n", "stop"]

    async def refused(client):
        return await client.post(CHAT, json=asked)

    answer = talk(refused, unmet="refuse")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unsupported_parameter")
    assert "--unmet-wishes override" in answer.json()["error"]["message"]


@pytest.mark.parametrize("path", [CHAT, MESSAGES, "/v1/responses"])
def test_a_conversation_that_fills_the_context_and_a_body_beyond_the_limit_are_refused(talk, path):
    async def exchange(client):
        key = "input" if path == "/v1/responses" else "messages"
        bodies = [{key: [{"role": "user", "content": "lamp " * num}]} for num in (CONTEXT, 20_000)]
        return [await client.post(path, json=body) for body in bodies]

    long, large = talk(exchange)
    assert (long.status_code, large.status_code) == (400, 413)
    assert "fewer than 96 tokens (--max-context)" in long.text


def test_the_token_is_taken_as_a_bearer_token_or_as_anthropics_key(talk):
    async def exchange(client):
        given = ({}, {"authorization": "Bearer sk"}, {"x-api-key": "sk"}, {"x-api-key": "other"}, {"authorization": "Bearer o"})
        return [(await client.post(CHAT, json={**ASKED, "max_tokens": 1}, headers=one)).status_code for one in given]

    assert talk(exchange, token="sk") == [401, 200, 200, 401, 401]


def test_a_turn_that_is_given_up_is_an_error_and_no_answer(talk):
    async def exchange(client):
        await client.post("/pause?mode=keep")
        asking = asyncio.create_task(client.post(CHAT, json=ASKED))
        while (await client.get("/load")).json()["server_load"] == 0:
            await asyncio.sleep(0)
        await client.post("/abort_requests", json={})
        await client.post("/resume")
        return await asking

    answer = talk(exchange)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "aborted")


def test_a_stream_ends_with_what_the_plain_answer_says(talk):
    async def exchange(client):
        plain = (await client.post(CHAT, json=ASKED)).json()
        return plain, (await client.post(CHAT, json={**ASKED, "stream": True})).text

    plain, stream = talk(exchange)
    assert stream.endswith("data: [DONE]\n\n")
    assert plain["choices"][0]["message"]["content"].split()[0] in stream
