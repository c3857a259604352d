"""Whatever a client asks for: every trained token was sampled in exactly that context, and stands in one branch."""

import asyncio
import json
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oldlogits.core.engine import Generation, Sampling, Span
from oldlogits.core.errors import WorkerDiedError
from oldlogits.core.trajectory import Context, Sampled, episode_of
from oldlogits.engines.chat_api.completions import ChatCompletions
from oldlogits.engines.chat_api.formats import ChatFormats
from oldlogits.engines.chat_api.messages import ApiError, ChatRequest
from oldlogits.engines.chat_api.turn import read_turn
from oldlogits.engines.chat_api.wishes import Rules
from oldlogits.envs.parsers.hermes import HermesParser
from oldlogits.envs.parsers.plain import PlainParser
from oldlogits.envs.parsers.qwen_coder import QwenCoderParser
from oldlogits.models.chat.format import ChatFormat
from oldlogits.rollout.environment_errors import EnvironmentFailed
from oldlogits.rollout.environment_runner import run_inline
from oldlogits.rollout.gateway.conversations import Conversations
from oldlogits.rollout.gateway.counts import GatewayCounts
from oldlogits.rollout.turns import Agent, TurnLimits
from oldlogits.sources.in_flight import InFlightTokens

from ..models.tokenizers import WITH_TOOLS, byte_level

TOKENIZER = byte_level(WITH_TOOLS)
CHAT = ChatFormat(TOKENIZER)
END = CHAT.end_of_turn_id
START = TOKENIZER.convert_tokens_to_ids("<|im_start|>")
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
CALL = '<tool_call>{"name": "look", "arguments": {"at": "o17"}}</tool_call>'
PLAIN = [i for i in range(300) if i not in TOKENIZER.added_tokens_decoder]


def spell(text):
    return tuple(TOKENIZER.encode(text, add_special_tokens=False))


class Engine:
    """Samples what `says` tells it to, some tokens a step; a request waits at the gate, where it can be aborted."""

    def __init__(self, seed=0, says=None):
        self.rng, self.says, self.version = random.Random(seed), says, 0
        self.generations, self.running, self.most_running = [], {}, 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.error = None

    async def generate(self, prompt_ids, sampling, request_id):
        assert request_id not in self.running, "request ids are unique"
        end = self.running[request_id] = asyncio.Event()
        self.most_running = max(self.most_running, len(self.running))
        try:
            if self.error:
                raise self.error
            out = self.says(tuple(prompt_ids)) if self.says else (*self.rng.choices(PLAIN, k=self.rng.randint(1, 5)), END)
            out = tuple(out)[: sampling.max_tokens]
            first, cut = self.version, self.rng.randint(0, len(out))
            await asyncio.sleep(0)
            waits = [asyncio.ensure_future(self.gate.wait()), asyncio.ensure_future(end.wait())]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for wait in waits:
                wait.cancel()
            if end.is_set():
                out = out[:cut]
            spans = [(first, 0, cut), (self.version, cut, len(out))] if self.version > first else [(first, 0, len(out))]
            finish = "abort" if end.is_set() else "stop" if out[-1] == END else "length"
            generation = Generation(
                output_ids=out,
                logprobs=tuple(-0.001 * self.rng.randint(1, 4000) for _ in out),
                spans=tuple(Span(version=v, start=a, end=b) for v, a, b in spans if b > a),
                finish_reason=finish,
            )
            self.generations.append((tuple(prompt_ids), generation))
            return generation
        finally:
            del self.running[request_id]

    async def abort(self, request_id):
        if request_id in self.running:
            self.running[request_id].set()


class Talk:
    """The conversations of one episode, and what a source would know of them."""

    def __init__(self, engine=None, *, max_tokens=4000, max_turns=1000, per_turn=64, rules=None):
        self.engine, self.counts, self.rewritten = engine or Engine(), GatewayCounts(), []
        self.in_flight = InFlightTokens()
        agent = Agent(
            engine=self.engine,
            chat=CHAT,
            parser=HermesParser(),
            limits=TurnLimits(max_turns=max_turns, max_tokens_per_turn=per_turn, max_tokens=max_tokens),
            sampling=Sampling(max_tokens=per_turn),
            run_environment=run_inline,
            report=self.in_flight.extend,
            withdraw=self._withdraw,
        )
        self.agent = agent
        self.conversations = Conversations(
            "g000001.2", agent, ChatFormats(CHAT.for_tools), rules or Rules(), self.counts, lambda *r: self.rewritten.append(r)
        )

    def _withdraw(self, name, segments):
        if segments:
            self.in_flight.withdraw(name, segments)
        else:
            self.in_flight.drop([name])

    async def ask(self, messages, **more):
        request = ChatCompletions().read({"model": "policy", "messages": messages, **more})
        answer = await self.conversations.answer(request)
        starts = sum(token == START for token in answer.prompt_ids)
        assert starts == len(messages) + 1 + bool(more.get("tools")), "the model reads these messages and no others"
        read, at = CHAT.decode(answer.prompt_ids), 0
        for words in (m["content"] for m in messages if m["role"] != "assistant"):
            at = read.index(words, at) + len(words)
        return ChatCompletions().write(answer, request)["choices"][0]["message"]

    async def end(self):
        await self.conversations.close()
        return self.conversations.trajectories("g000001", 1.0)


def check(talk, branches):
    """Every sampled token stands behind exactly what the engine was given for it, once, and nothing whole is missing."""
    sampled = Counter()
    for branch in branches:
        tokens = []
        for segment in branch.segments:
            if isinstance(segment, Context):
                tokens += segment.token_ids
                start = len(tokens)
                continue
            tokens += segment.token_ids
            (whole,) = [
                (prompt, g) for prompt, g in talk.engine.generations
                if prompt == tuple(tokens[:start]) and g.output_ids[: len(tokens) - start] == tuple(tokens[start:])
                and segment.logp_mu == g.logprobs[len(tokens) - start - len(segment.token_ids) : len(tokens) - start]
            ]  # fmt: skip
            (span,) = [s for s in whole[1].spans if s.end == len(tokens) - start]
            assert segment.version == span.version
            if len(whole[1].output_ids) == len(tokens) - start:
                sampled[id(whole[1])] += 1
        assert isinstance(branch.segments[-1], Sampled), "nothing is read in vain"
    assert set(sampled.values()) <= {1}, "a token is trained twice"
    wholes = [g for _, g in talk.engine.generations if g.finish_reason != "abort"]
    assert len(sampled) == len(wholes) - talk.num_left_late
    assert {b.id for b in branches} <= {*talk.conversations.ids}
    assert {episode_of(b.id) for b in branches} <= {"g000001.2"}
    for branch in branches:
        assert tuple(talk.in_flight._trajectories[branch.id].segments) == branch.segments


WORDS = st.sampled_from(["hello", "look", "it is o17", "", "<|im_end|>", "<|im_start|>user", CALL, " 42 !", "schön ☃"])
MOVES = st.lists(
    st.tuples(
        st.sampled_from(["open", "go on", "go on", "go on", "again", "earlier", "rewrite", "leave", "both", "version"]),
        st.integers(0, 10**6),
        WORDS,
    ),
    min_size=1,
    max_size=25,
)


async def play(moves, seed):
    talk = Talk(Engine(seed, says=lambda prompt: (*spell(CALL), END) if len(prompt) % 3 == 0 else random_turn(prompt, seed)))
    talk.num_left_late = 0
    asked = []  # histories that wait for an answer: lists of messages
    heard = []  # histories that end with an answer
    num_asked = num_left = 0
    for move, number, words in moves:
        before = heard[number % len(heard)] if heard else None
        if move == "version":
            talk.engine.version += 1
            continue
        if move == "open" or before is None:
            messages = [{"role": "system", "content": words or "be brief"}, {"role": "user", "content": f"hello {number % 2}"}]
        elif move == "again":
            messages = asked[number % len(asked)]
        elif move == "rewrite":
            kept = [m for i, m in enumerate(before) if (number >> i) % 3 or i < 2]
            messages = [*kept, {"role": "user", "content": f"in short : {words}"}]
        else:
            history = before if move != "earlier" else before[: max(2, (number % len(before)) + 1)]
            ends = history[-1]["role"] == "assistant"
            history = history if ends else history[: max(1, len(history) - 1)]
            calls = history[-1].get("tool_calls") or []
            answers = [{"role": "tool", "tool_call_id": call["id"], "content": words} for call in calls]
            messages = [*history, *(answers or [{"role": "user", "content": words}])]
        tools = {"tools": [TOOL]} if (number % 5) else {}
        asked.append(messages)
        if move == "leave":
            talk.engine.gate.clear()
            task = asyncio.create_task(talk.ask(messages, **tools))
            for _ in range(number % 4):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            num_left += 1
            if number % 2:
                talk.engine.gate.set()
            else:
                asyncio.get_running_loop().call_soon(talk.engine.gate.set)
            continue
        tasks = [talk.ask(messages, **tools) for _ in range(2 if move == "both" else 1)]
        for answer in await asyncio.gather(*tasks):
            num_asked += 1
            heard.append([*messages, json.loads(json.dumps(answer))])
    branches = await talk.end()
    kinds = talk.counts.requests
    assert kinds.total() == num_asked
    assert talk.counts.dropped_answers <= num_left
    talk.num_left_late = (
        sum(g.finish_reason != "abort" for _, g in talk.engine.generations) - num_asked
    )  # whole before their client left, and dropped all the same
    assert talk.num_left_late <= num_left
    check(talk, branches)


def random_turn(prompt, seed):
    rng = random.Random(hash((prompt, seed)))
    return (*rng.choices(PLAIN, k=rng.randint(1, 6)), *((END,) if rng.random() < 0.8 else ()))


@settings(max_examples=60, deadline=None)
@given(moves=MOVES, seed=st.integers(0, 99))
def test_every_token_was_sampled_in_its_context_and_stands_in_one_branch(moves, seed):
    asyncio.run(play(moves, seed))


@pytest.mark.slow
@settings(max_examples=1500, deadline=None)
@given(moves=MOVES, seed=st.integers(0, 99))
def test_every_token_was_sampled_in_its_context_and_stands_in_one_branch_in_many_episodes(moves, seed):
    asyncio.run(play(moves, seed))


def user(words):
    return {"role": "user", "content": words}


def in_talk(scenario, **options):
    async def main():
        talk = Talk(**options)
        talk.num_left_late = 0
        return await scenario(talk)

    return asyncio.run(main())


def kinds(talk):
    return dict(talk.counts.requests)


def test_a_straight_conversation_is_one_branch_of_the_tokens_of_turns():
    async def scenario(talk):
        first = [{"role": "system", "content": "be brief"}, user("hello")]
        one = await talk.ask(first)
        two = await talk.ask([*first, one, user("and ?")])
        await talk.ask([*first, one, user("and ?"), two, user("so")])
        (branch,) = await talk.end()
        assert branch.id == "g000001.2"
        assert branch.segments[0].token_ids == tuple(ChatFormat(TOKENIZER, (), "be brief").prompt_ids("hello"))
        contexts = [s.token_ids for s in branch.segments if isinstance(s, Context)]
        assert contexts[1:] == [tuple(CHAT.continuation_ids([("user", words)])) for words in ("and ?", "so")]
        assert kinds(talk) == {"opened": 1, "continued": 2}

    in_talk(scenario)


def test_a_retry_goes_on_from_the_same_tokens_in_a_branch_of_its_own():
    async def scenario(talk):
        one = await talk.ask([user("hello")])
        history = [user("hello"), one, user("and ?")]
        await talk.ask(history)
        await talk.ask(history)
        first, second = await talk.end()
        assert [b.id for b in (first, second)] == ["g000001.2", "g000001.2#1"]
        before = [i for s in first.segments[:3] for i in s.token_ids]
        assert second.segments[0] == Context(token_ids=tuple(before)), "all that was sampled before is context"
        assert len(second.segments) == 2
        assert kinds(talk) == {"opened": 1, "continued": 1, "forked": 1}

    in_talk(scenario)


def test_a_request_whose_client_left_leaves_no_trace_and_its_tokens_are_counted():
    async def scenario(talk):
        one = await talk.ask([user("hello")])
        talk.engine.gate.clear()
        leaving = asyncio.create_task(talk.ask([user("hello"), one, user("and ?")]))
        while not talk.engine.running:
            await asyncio.sleep(0)
        for _ in range(5):
            await asyncio.sleep(0)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        while talk.engine.running or talk.conversations._given_up:
            await asyncio.sleep(0)
        talk.engine.gate.set()
        await talk.ask([user("hello"), one, user("and ?")])
        (branch,) = await talk.end()
        assert len(branch.segments) == 4
        assert kinds(talk) == {"opened": 1, "continued": 1}, "the branch goes on as if nobody had asked"
        dropped = [g for _, g in talk.engine.generations if g.finish_reason == "abort"]
        assert talk.counts.dropped_answers == 1
        assert talk.counts.dropped_tokens == len(dropped[0].output_ids)

    in_talk(scenario)


def test_a_retry_that_is_sooner_than_the_end_of_what_it_retries_has_a_branch_of_its_own():
    async def scenario(talk):
        one = await talk.ask([user("hello")])
        talk.engine.gate.clear()
        leaving = asyncio.create_task(talk.ask([user("hello"), one, user("and ?")]))
        while not talk.engine.running:
            await asyncio.sleep(0)
        leaving.cancel()
        retry = asyncio.create_task(talk.ask([user("hello"), one, user("and ?")]))
        while talk.conversations._given_up or not leaving.done():
            await asyncio.sleep(0)
        for branch in talk.conversations._branches:
            assert list(talk.in_flight._trajectories[branch.id].segments) == branch.segments
        talk.engine.gate.set()
        await retry
        assert [len(branch.segments) for branch in await talk.end()] == [2, 2]

    in_talk(scenario)


def test_a_rewritten_history_is_a_branch_that_says_which_message_differs():
    async def scenario(talk):
        first = [{"role": "system", "content": "be brief"}, user("hello")]
        one = await talk.ask(first)
        two = await talk.ask([*first, one, user("and ?")])
        await talk.ask([*first, {**one, "content": "something else"}, user("and ?"), two, user("so")])
        _, second = await talk.end()
        ((name, message, role, num_tokens),) = talk.rewritten
        assert (name, message, role) == ("g000001.2#1", 2, "assistant")
        assert num_tokens == len(second.segments[0].token_ids) == talk.counts.encoded_anew
        assert kinds(talk) == {"opened": 1, "continued": 1, "rewritten": 1}

    in_talk(scenario)


def test_a_sub_agent_is_a_conversation_of_its_own():
    async def scenario(talk):
        await talk.ask([{"role": "system", "content": "plan"}, user("hello")])
        await talk.ask([{"role": "system", "content": "search"}, user("look for it")])
        assert len(await talk.end()) == 2
        assert kinds(talk) == {"opened": 2}
        assert not talk.rewritten

    in_talk(scenario)


def test_a_turn_that_was_cut_off_is_ended_in_what_is_read_next():
    async def scenario(talk):
        one = await talk.ask([user("hello")], max_tokens=2)
        await talk.ask([user("hello"), one, user("go on")])
        (branch,) = await talk.end()
        assert branch.segments[1].token_ids == spell("hello world")[:2]
        assert branch.segments[2].token_ids == (END, *CHAT.continuation_ids([("user", "go on")]))

    in_talk(scenario, engine=Engine(says=lambda prompt: (*spell("hello world"), END)))


@pytest.mark.parametrize("rewrite", [lambda c: json.dumps(json.loads(c), indent=1), lambda c: c.replace('": "', '":"')])
def test_calls_are_the_same_however_their_arguments_are_spaced(rewrite):
    async def scenario(talk):
        one = await talk.ask([user("hello")], tools=[TOOL])
        (call,) = one["tool_calls"]
        assert one["content"] is None
        assert json.loads(call["function"]["arguments"]) == {"at": "o17"}
        sent = {**one, "content": "", "tool_calls": [{**call, "id": "x", "function": {
            "name": "look", "arguments": rewrite(call["function"]["arguments"])}}]}  # fmt: skip
        await talk.ask([user("hello"), sent, {"role": "tool", "tool_call_id": "x", "content": "a lamp"}], tools=[TOOL])
        assert kinds(talk) == {"opened": 1, "continued": 1}

    in_talk(scenario, engine=Engine(says=lambda prompt: (*spell(CALL), END)))


CODER = (
    "<tool_call>\n<function=look>\n<parameter=at>\no17\n</parameter>\n"
    "<parameter=num>\n3\n</parameter>\n</function>\n</tool_call>"
)


@pytest.mark.parametrize(
    ("parser", "text", "content", "arguments"),
    [
        (HermesParser(), f"let me see {CALL}", "let me see", {"at": "o17"}),
        (QwenCoderParser(), f"so\n{CODER}", "so", {"at": "o17", "num": 3}),
        (PlainParser(), "<call> look o17 3 </call>", "", {"at": "o17", "num": 3}),
        (PlainParser(), "<call> look </call>", "", {}),
    ],
)
def test_a_turn_is_read_with_its_words_and_all_arguments_as_their_types(parser, text, content, arguments):
    schema = {"type": "object", "properties": {"at": {"type": "string"}, "num": {"type": "integer"}}}
    turn = read_turn(text, parser, [{"type": "function", "function": {"name": "look", "parameters": schema}}])
    assert (turn.content.strip(), [(call.name, call.arguments) for call in turn.calls]) == (content, [("look", arguments)])


WISHES = {
    "temperature": 0.3, "top_p": 0.5, "top_k": 5, "n": 2, "stop": ["."], "tool_choice": "required",
    "response_format": {"type": "json_object"}, "presence_penalty": 1.0, "logit_bias": {"5": 1.0},
}  # fmt: skip


@pytest.mark.parametrize("name", WISHES)
def test_what_training_cannot_honour_is_overridden_and_counted_or_refused(name):
    async def overridden(talk):
        await talk.ask([user("hello")], **{name: WISHES[name]})
        assert dict(talk.counts.overridden) == {name: 1}
        await talk.end()

    async def refused(talk):
        with pytest.raises(ApiError, match=name):
            await talk.ask([user("hello")], **{name: WISHES[name]})
        assert dict(talk.counts.refused) == {"unsupported_parameter": 1}
        assert await talk.end() == ()

    in_talk(overridden)
    in_talk(refused, rules=Rules(unmet="refuse"))


def test_what_changes_nothing_is_not_counted():
    same = {"temperature": 1.0, "top_p": 1.0, "n": 1, "stop": [], "tool_choice": "auto", "presence_penalty": 0, "user": "me"}

    async def scenario(talk):
        await talk.ask([user("hello")], **same)
        assert not talk.counts.overridden
        await talk.end()

    in_talk(scenario, rules=Rules(unmet="refuse"))


def test_an_evaluation_honours_temperature_and_support():
    async def scenario(talk):
        asked = []
        sample = talk.engine.generate
        talk.engine.generate = lambda p, s, r: (asked.append(s), sample(p, s, r))[1]
        await talk.ask([user("hello")], temperature=0.3, top_p=0.5, top_k=7)
        assert [(s.temperature, s.top_p, s.top_k) for s in asked] == [(0.3, 0.5, 7)]
        assert not talk.counts.overridden
        await talk.end()

    in_talk(scenario, rules=Rules(honours=True))


def test_a_full_context_and_used_up_turns_are_refused_with_their_code():
    async def full(talk):
        with pytest.raises(ApiError) as refusal:
            await talk.ask([user("hello " * 100)])
        assert refusal.value.code == "context_length_exceeded"

    async def used_up(talk):
        one = await talk.ask([user("hello")])
        with pytest.raises(ApiError) as refusal:
            await talk.ask([user("hello"), one, user("more")])
        assert (refusal.value.code, refusal.value.status) == ("max_turns", 403)
        (branch,) = await talk.end()
        assert branch.stop_reason == "max_turns"

    in_talk(full, max_tokens=50)
    in_talk(used_up, max_turns=1)


def test_many_requests_at_once_have_no_more_turns_and_only_answers_count():
    async def elsewhere(call, *, is_tool=False):
        await asyncio.sleep(0)  # whoever runs beside the event loop lets others go first
        return call()

    async def scenario(talk):
        object.__setattr__(talk.agent, "run_environment", elsewhere)
        gone = asyncio.create_task(talk.ask([user("gone")], tools=[TOOL]))
        while not talk.engine.running:
            await asyncio.sleep(0)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        outcomes = await asyncio.gather(
            *(talk.ask([user(f"hello {i}")], tools=[TOOL]) for i in range(50)), return_exceptions=True
        )
        refused = [outcome for outcome in outcomes if isinstance(outcome, ApiError)]
        assert {refusal.code for refusal in refused} == {"max_turns"}
        assert len(outcomes) - len(refused) == len(await talk.end()) == 3

    in_talk(scenario, max_turns=3)


@pytest.mark.parametrize("arguments", ['{"at": "\\ud83d"}', '{"at": NaN}', '{"at": ' + "[" * 900 + "]" * 900 + "}"])
def test_arguments_of_a_call_that_are_no_json_that_others_can_read_stay_text_and_end_no_run(arguments):
    async def scenario(talk):
        call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": arguments}}
        messages = [user("hello"), {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "ok"}]
        request = ChatCompletions().read({"model": "policy", "messages": messages})
        assert request.messages[1].calls[0].arguments == arguments
        await talk.conversations.answer(request)
        assert not talk.conversations.failure.done()

    in_talk(scenario)


def test_after_its_end_an_episode_answers_nothing_and_what_runs_is_dropped():
    async def scenario(talk):
        await talk.ask([user("hello")])
        talk.engine.gate.clear()
        late = asyncio.create_task(talk.ask([user("late")]))
        while not talk.engine.running:
            await asyncio.sleep(0)
        (branch,) = await talk.end()
        with pytest.raises(ApiError, match="over"):
            await late
        with pytest.raises(ApiError, match="over"):
            await talk.ask([user("later")])
        assert len(branch.segments) == 2
        assert talk.counts.dropped_answers == 1

    in_talk(scenario)


def test_an_engine_that_ends_is_no_matter_of_the_program():
    async def scenario(talk):
        talk.engine.error = WorkerDiedError("the engine is gone", got="", allowed="", fix="")
        with pytest.raises(ApiError) as refusal:
            await talk.ask([user("hello")])
        assert refusal.value.status == 500
        with pytest.raises(WorkerDiedError):
            talk.conversations.failure.result()
        await talk.end()

    in_talk(scenario)


def test_a_request_that_nobody_foresaw_fails_its_episode_and_not_the_run():
    async def scenario(talk):
        with pytest.raises(ApiError, match="the turn could not be sampled"):
            await talk.conversations.answer(ChatRequest(model="m", messages=()))
        with pytest.raises(EnvironmentFailed, match="a request could not be read: IndexError"):
            talk.conversations.failure.result()

    in_talk(scenario)


@pytest.mark.parametrize("where", ["content", "arguments", "tools"])
def test_a_long_text_anywhere_in_a_request_is_encoded_beside_the_event_loop(where):
    elsewhere = []

    async def run(call, *, is_tool=False):
        elsewhere.append(call)
        return call()

    async def scenario(talk):
        object.__setattr__(talk.agent, "run_environment", run)
        counts = []
        for words in ("short", "long " * 20_000):
            said = {name: words if name == where else "short" for name in ("content", "arguments", "tools")}
            call = {"id": "1", "function": {"name": "look", "arguments": json.dumps({"at": [said["arguments"]]})}}
            tool = {"type": "function", "function": {**TOOL["function"], "description": said["tools"]}}
            messages = [user(said["content"]), {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "ok"}]
            request = ChatCompletions().read({"model": "policy", "messages": messages, "tools": [tool]})
            elsewhere.clear()
            await talk.conversations.answer(request)
            counts.append(len(elsewhere))
        format_of_tools, encoding = 1, 1
        assert counts == [format_of_tools, (where == "tools") * format_of_tools + encoding]

    in_talk(scenario, max_tokens=200_000)


@pytest.mark.parametrize("parser", [HermesParser(), PlainParser()])
@pytest.mark.parametrize("written", ["go left", "[1, 2]", '{"at": ', "7", "null", '"at"'])
def test_arguments_in_the_history_that_are_no_object_stay_as_they_are_or_are_refused(written, parser):
    call = {"id": "c", "type": "function", "function": {"name": "look", "arguments": written}}
    history = [user("hello"), {"role": "assistant", "content": "", "tool_calls": [call]}, user("and ?")]

    async def kept(talk):
        await talk.ask(history, tools=[TOOL])
        ((context, _),) = [branch.segments for branch in await talk.end()]
        assert f'<tool_call>{{"name": "look", "arguments": {written}}}</tool_call>' in CHAT.decode(context.token_ids)

    async def refused(talk):
        object.__setattr__(talk.agent, "parser", parser)
        with pytest.raises(ApiError, match="arguments of a call of look in the history are no JSON object") as found:
            await talk.ask(history, tools=[TOOL])
        assert repr(written) in found.value.got
        assert talk.counts.refused == {"invalid_request": 1}
        await talk.ask([user("hello")])
        assert [branch.id for branch in await talk.end()] == ["g000001.2"], "a refused request leaves no branch"

    in_talk(kept if isinstance(parser, HermesParser) else refused)


def test_arguments_that_are_empty_are_those_of_a_call_without_any():
    call = {"id": "c", "type": "function", "function": {"name": "look", "arguments": ""}}
    history = [user("hello"), {"role": "assistant", "content": "", "tool_calls": [call]}, user("and ?")]

    async def scenario(talk):
        await talk.ask(history, tools=[TOOL])
        ((context, _),) = [branch.segments for branch in await talk.end()]
        assert '<tool_call>{"name": "look", "arguments": {}}</tool_call>' in CHAT.decode(context.token_ids)

    in_talk(scenario)


def test_a_turn_whose_client_left_while_it_was_read_is_trained_and_counted():
    reading, go_on = asyncio.Event(), asyncio.Event()

    async def elsewhere(call, *, is_tool=False):
        reading.set()
        await go_on.wait()
        return call()

    async def scenario(talk):
        object.__setattr__(talk.agent, "run_environment", elsewhere)
        leaving = asyncio.create_task(talk.ask([user("hello")], tools=[TOOL]))
        for _ in range(2):  # the tools are told first
            await reading.wait()
            reading.clear()
            if talk.engine.generations:
                break
            go_on.set()
        go_on.clear()
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        (branch,) = await talk.end()
        assert [type(segment) for segment in branch.segments] == [Context, Sampled]
        assert kinds(talk) == {"opened": 1}
        assert talk.conversations._num_turns == 1

    in_talk(scenario, engine=Engine(says=lambda prompt: (*spell("x" * 20_000), END)), max_tokens=10**6, per_turn=10**6)
