"""The real clients of OpenAI and Anthropic, and a whole agent program, against `oldlogits serve`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import anthropic
import openai
import pytest

from order_desk.environment import OrderDesk

from ...servers import serving

pytestmark = pytest.mark.envs

ROOT = Path(__file__).parents[3]
KEY = "sk-of-this-server"
SYSTEM = OrderDesk.system_prompt
ASKED = "anna here : please cancel my lamp order"


@pytest.fixture(scope="module")
def server():
    with serving("tiny", token=KEY) as server:
        yield server


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)


@pytest.fixture
def claude(server):
    return anthropic.Anthropic(base_url=server.url, api_key=KEY, max_retries=0)


def ask(client, **params):
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": ASKED}]
    return client.chat.completions.create(**{"model": "tiny", "messages": messages, "temperature": 0, **params})


def test_an_agent_program_earns_its_reward_against_the_served_clerk(server):
    environment = {**os.environ, "OPENAI_BASE_URL": f"{server.url}/v1", "OPENAI_API_KEY": KEY}
    words = [sys.executable, str(ROOT / "examples/openai_agent/agent.py")]
    rewards = []
    for index in range(4):
        row = json.dumps(OrderDesk.make_row("heldout", index))
        done = subprocess.run(words, input=row, env=environment, capture_output=True, text=True, check=True)
        rewards.append(json.loads(done.stdout)["reward"])
    assert set(rewards) <= {0.0, 1.0}
    assert len(rewards) == 4


def test_a_stream_says_what_the_plain_answer_says(client):
    said = ask(client).choices[0].message.content
    deltas = [chunk.choices[0].delta.content or "" for chunk in ask(client, stream=True)]
    assert said
    assert "".join(deltas) == said


def test_the_same_conversation_is_the_same_text_through_all_three_interfaces(client, claude):
    said = ask(client).choices[0].message.content
    responded = client.responses.create(model="tiny", instructions=SYSTEM, input=ASKED, temperature=0)
    message = claude.messages.create(
        model="tiny",
        max_tokens=64,
        system=SYSTEM,
        messages=[{"role": "user", "content": ASKED}],
        extra_body={"temperature": 0},
    )
    assert responded.output_text == said
    assert [block.text for block in message.content] == [said]
    assert message.stop_reason == "end_turn"


def test_log_probs_are_those_of_the_tokens_that_are_counted(client):
    answer = ask(client, logprobs=True)
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    assert all(entry.logprob <= 0 for entry in content)


def test_a_wrong_key_and_a_turn_that_is_begun_are_refused_with_the_clients_own_errors(server, client, claude):
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="another", max_retries=0).models.list()
    with pytest.raises(anthropic.AuthenticationError):
        anthropic.Anthropic(base_url=server.url, api_key="another", max_retries=0).models.list()
    with pytest.raises(openai.BadRequestError, match="begun by the client"):
        ask(client, messages=[{"role": "assistant", "content": "which"}])
    begun = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "which"}]
    with pytest.raises(anthropic.BadRequestError, match="begun by the client"):
        claude.messages.create(model="tiny", max_tokens=8, messages=begun)


def test_both_clients_list_the_model(client, claude):
    listed = [model.id for model in client.models.list()]
    assert len(listed) == 1
    assert listed == [model.id for model in claude.models.list()]
