"""A conversation partner that is a language model behind an endpoint: asked again where it helps, bounded, never trained."""

from __future__ import annotations

import asyncio
import json

import pytest
from aiohttp import web

from oldlogits.core.engine import Sampling
from oldlogits.core.trajectory import Context, Trajectory
from oldlogits.envs.chat_user import ChatUser, ChatUserError
from oldlogits.envs.parsers.hermes import HermesParser
from oldlogits.models.chat.format import ChatFormat
from oldlogits.rollout.environment_runner import ThreadRunner
from oldlogits.rollout.turns import Agent, Failure, TurnLimits, run_episode

from ..models.tokenizers import byte_level
from ..rollout.test_agents_words import Sampler


class Endpoint:
    """Answers as it is told: a text, a status, a JSON body, "dies" for a lost connection, None for what never comes."""

    def __init__(self, *answers):
        self.answers, self.asked, self.tokens = list(answers), [], []
        self.gone = asyncio.Event()

    async def answer(self, request):
        self.asked.append(await request.json())
        self.tokens.append(request.headers.get("authorization"))
        answer = self.answers.pop(0)
        if answer is None:
            await self.gone.wait()
            return web.Response(status=500)
        if answer == "dies":
            request.transport.abort()
            return web.Response()
        if isinstance(answer, int):
            return web.Response(status=answer, text="not now, key-7 is wrong")
        if isinstance(answer, dict):
            return web.json_response(answer)
        return web.json_response({"choices": [{"message": {"role": "assistant", "content": answer}}]})


def with_endpoint(endpoint, talk):
    async def serve():
        app = web.Application()
        app.router.add_post("/v1/chat/completions", endpoint.answer)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = site._server.sockets[0].getsockname()[1]
        try:
            return await talk(f"http://127.0.0.1:{port}/v1")
        finally:
            endpoint.gone.set()
            await runner.cleanup()

    return asyncio.run(serve())


def user_at(url, **knobs):
    return ChatUser(url, "m", "be rude", **{"api_key": "key-7", "backoff_s": 0.0, **knobs})


def test_it_sees_the_conversation_from_the_users_side_and_ends_it_with_its_word():
    endpoint = Endpoint("a lamp", "<think>no</think> the red one ", "###STOP### bye")

    async def talk(url):
        user = user_at(url, sampling={"temperature": 0.5})
        return [await user.open(), await user.reply("which?"), await user.reply("done")], user.messages

    said, messages = with_endpoint(endpoint, talk)
    assert said == ["a lamp", "the red one", None]
    first, _, last = endpoint.asked
    assert first == {
        "model": "m",
        "temperature": 0.5,
        "messages": [{"role": "system", "content": "be rude"}, {"role": "user", "content": "Hello, how can I help you?"}],
    }
    assert [m["role"] for m in last["messages"]] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert [m["content"] for m in last["messages"][1:]] == [
        "Hello, how can I help you?",
        "a lamp",
        "which?",
        "the red one",
        "done",
    ]
    assert json.loads(json.dumps(messages))[-1] == {"role": "assistant", "content": "###STOP### bye"}
    assert endpoint.tokens == ["Bearer key-7"] * 3


def test_a_busy_or_lost_endpoint_is_asked_again_with_the_same_words():
    endpoint = Endpoint(503, 429, None, 500, "hello")
    assert with_endpoint(endpoint, lambda url: user_at(url, timeout_s=0.2).reply("hi")) == "hello"
    assert endpoint.asked == [endpoint.asked[0]] * 5


@pytest.mark.parametrize(
    ("answers", "knobs", "reason", "num_asked"),
    [
        ([503] * 3, {"retries": 2}, "503: not now", 3),
        ([401], {}, "401: not now", 1),
        ([None], {"retries": 0, "timeout_s": 0.1}, "no answer: TimeoutError", 1),
        ([{"choices": []}], {}, "said nothing", 1),
        ([{"choices": [{"message": {"content": None}}]}], {}, "said nothing", 1),
        ([" "], {}, "said nothing", 1),
        (["x" * (1 << 23)], {"retries": 0}, "more than 4,194,304 bytes", 1),
    ],
)
def test_an_endpoint_that_refuses_or_says_nothing_is_an_error_and_the_conversation_stays(answers, knobs, reason, num_asked):
    endpoint, users = Endpoint(*answers), []

    async def talk(url):
        users.append(user_at(url, **knobs))
        return await users[0].reply("hi")

    with pytest.raises(ChatUserError, match=reason):
        with_endpoint(endpoint, talk)
    assert (len(endpoint.asked), users[0].messages) == (num_asked, [])
    assert "key-7" not in repr(users[0])


def test_nobody_at_the_address_is_an_error():
    user = ChatUser(base_url="http://127.0.0.1:9/v1", model="m", instructions="", retries=1, backoff_s=0.0)
    with pytest.raises(ChatUserError, match="no answer"):
        asyncio.run(user.reply("hi"))


def test_a_conversation_is_bounded():
    async def talk(url):
        user = user_at(url, max_replies=2)
        return [await user.reply("hi") for _ in range(4)]

    assert with_endpoint(Endpoint("a", "b"), talk) == ["a", "b", None, None]


def conversed(endpoint, chat, *, timeout_s=60.0, **knobs):
    """What comes of an episode whose partner is at an endpoint."""

    async def talk(url):
        class Conversation:
            def __init__(self):
                self.user = user_at(url, **knobs)

            async def reset(self):
                return await self.user.open()

            async def reply(self, message):
                return await self.user.reply(message)

            def get_reward(self):
                return float(len(self.user.messages))

        agent = Agent(
            engine=Sampler(chat, ["which?", "done"]),
            chat=chat,
            parser=HermesParser(),
            limits=TurnLimits(max_turns=4, max_tokens_per_turn=1000, max_tokens=10_000),
            sampling=Sampling(max_tokens=1, temperature=1.0),
            run_environment=ThreadRunner(timeout_s=timeout_s, latency_s=0, seed=0),
        )
        return await run_episode(agent, Conversation, {}, id="g.0", group_id="g")

    return with_endpoint(endpoint, talk)


@pytest.mark.parametrize("last", ["dies", 503])
def test_an_endpoint_that_dies_in_mid_episode_fails_that_episode_and_is_named(last):
    outcome = conversed(Endpoint("a lamp", *[last] * 3), ChatFormat(byte_level()), retries=2)
    assert isinstance(outcome, Failure)
    assert outcome.reason.startswith("reply: ChatUserError: the conversation partner did not answer; got: http://127.0.0.1:")
    assert ("503" if last == 503 else "no answer: Server") in outcome.reason


def test_an_endpoint_that_hangs_in_mid_episode_ends_with_the_deadline_of_the_call():
    outcome = conversed(Endpoint("a lamp", None), ChatFormat(byte_level()), timeout_s=0.3)
    assert isinstance(outcome, Failure)
    assert outcome.reason == "reply: timed out after 0.3 s"


def test_what_the_partner_says_is_context_of_the_episode():
    chat = ChatFormat(byte_level())
    played = conversed(Endpoint("a lamp", "the red one", "###STOP###"), chat)
    assert isinstance(played, Trajectory)
    contexts = [chat.decode(s.token_ids) for s in played.segments if isinstance(s, Context)]
    assert "<|im_start|>user\na lamp<|im_end|>" in contexts[0]
    assert "<|im_start|>user\nthe red one<|im_end|>" in contexts[1]
    assert [chat.decode(s.token_ids) for s in played.sampled] == ["which?", "done"]
    assert (played.reward, played.stop_reason) == (6.0, "done")
