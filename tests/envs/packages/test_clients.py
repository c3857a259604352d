"""The clients and the agent framework that people have, against the gateway: what they read, and that they go on by tokens."""

import json

import pytest

from oldlogits.core.trajectory import Sampled
from oldlogits.rollout.turns import Failure

from ...rollout.test_conversations import CHAT, END, Engine, spell
from ...rollout.test_gateway import played

pytestmark = [pytest.mark.envs, pytest.mark.filterwarnings("error")]

CALLS = [{"at": "o17"}, {"at": "o18", "far": True}]
TURNS = [
    "<think>which one ?</think>"
    + "\n".join(f"<tool_call>{json.dumps({'name': 'look', 'arguments': call})}</tool_call>" for call in CALLS),
    "a lamp and a door ☃",
    "<tool_call>{'not a call'</tool_call>",
    "",
]
SCHEMA = {
    "type": "object",
    "properties": {"at": {"type": "string"}, "far": {"type": "boolean"}},
    "required": ["at"],
    "additionalProperties": False,
}
SYSTEM, FIRST, MORE = "be brief", "what is there ?", ["and ?", "so ?", "well ?"]
SEEN = {"o17": "a lamp", "o18": "a door"}


def says(prompt):
    """The turn of the script that comes after as many as the prompt holds."""
    return (*spell(TURNS[CHAT.decode(prompt).count("<|im_start|>assistant") - 1]), END)


def straight(program):
    """Play a program of one conversation; it is one branch, every turn of which was sampled after all before it."""
    (outcome,), world = played(program, engine=Engine(says=says), per_turn=400)
    assert not isinstance(outcome, Failure), outcome.reason
    (branch,) = outcome
    assert dict(world.counts.requests) == {"opened": 1, "continued": len(TURNS) - 1}
    assert not world.counts.refused
    sampled = [s.token_ids for s in branch.segments if isinstance(s, Sampled)]
    assert sampled == [(*spell(text), END) for text in TURNS]
    prompt, last = world.talk.engine.generations[-1]
    assert tuple(i for s in branch.segments for i in s.token_ids) == (*prompt, *last.output_ids)
    assert branch.reward == 1.0
    return branch, world


def valid(found):
    """What a client read, as the type that it says it is: clients themselves check nothing."""
    return type(found).model_validate(found.to_dict(warnings=False))  # which are of their own types of parsed answers


TOOL = {"type": "function", "function": {"name": "look", "description": "Look.", "parameters": SCHEMA, "strict": True}}


def seen(written):
    return SEEN[json.loads(written)["at"]]


@pytest.mark.parametrize("is_streamed", [False, True])
def test_openai_chat_completions(is_streamed):
    import openai
    from openai.types.chat import ChatCompletionChunk

    asked, lengths = [], []

    def ask(client, messages):
        options = {"model": "policy", "messages": messages, "tools": [TOOL], "logprobs": True}
        if not is_streamed:
            return valid(client.chat.completions.create(**options, parallel_tool_calls=True))
        with client.chat.completions.stream(**options, stream_options={"include_usage": True}) as stream:
            for event in stream:
                if event.type == "chunk":
                    ChatCompletionChunk.model_validate(event.chunk.to_dict())
            return valid(stream.get_final_completion())

    def program(base_url, api_key, row):
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": FIRST}]
        with openai.OpenAI(base_url=base_url, api_key=api_key, max_retries=0) as client:
            assert [model.id for model in client.models.list()] == ["policy"]
            for more in (None, *MORE):
                completion = ask(client, messages)
                (choice,) = completion.choices
                asked.append(choice)
                lengths.append(completion.usage.completion_tokens)
                messages.append(choice.message.to_dict())
                messages += [
                    {"role": "tool", "tool_call_id": call.id, "content": seen(call.function.arguments)}
                    for call in choice.message.tool_calls or ()
                ]
                if more and not choice.message.tool_calls:
                    messages.append({"role": "user", "content": more})
        return 1.0

    branch, world = straight(program)
    first, *others = (choice.message for choice in asked)
    assert [json.loads(call.function.arguments) for call in first.tool_calls] == CALLS
    assert len({call.id for call in first.tool_calls}) == 2
    assert first.model_extra["reasoning_content"] == "which one ?"
    assert [message.content or "" for message in others] == TURNS[1:]
    assert [choice.finish_reason for choice in asked] == ["tool_calls", "stop", "stop", "stop"]
    turns = [s for s in branch.segments if isinstance(s, Sampled)]
    assert [tuple(token.logprob for token in choice.logprobs.content) for choice in asked] == [s.logp_mu for s in turns]
    assert lengths == [len(s.token_ids) for s in turns]
    assert not world.counts.overridden


@pytest.mark.parametrize("is_streamed", [False, True])
def test_openai_responses(is_streamed):
    import openai

    asked = []

    def ask(client, items):
        tool = {"type": "function", **TOOL["function"]}
        options = {"model": "policy", "input": items, "instructions": SYSTEM, "tools": [tool], "store": False}
        if not is_streamed:
            return valid(client.responses.create(**options))
        with client.responses.stream(**options) as stream:
            numbers = [valid(event).sequence_number for event in stream if not hasattr(event, "snapshot")]
            assert numbers == sorted(set(numbers))
            return stream.get_final_response()

    def program(base_url, api_key, row):
        items = [{"role": "user", "content": FIRST}]
        with openai.OpenAI(base_url=base_url, api_key=api_key, max_retries=0) as client:
            for more in (None, *MORE):
                response = ask(client, items)
                asked.append(response)
                items += [item.to_dict() for item in response.output]
                calls = [item for item in response.output if item.type == "function_call"]
                items += [
                    {"type": "function_call_output", "call_id": call.call_id, "output": seen(call.arguments)} for call in calls
                ]
                if more and not calls:
                    items.append({"role": "user", "content": [{"type": "input_text", "text": more}]})
        return 1.0

    straight(program)
    first, *others = asked
    assert [item.type for item in first.output] == ["reasoning", "function_call", "function_call"]
    assert [json.loads(item.arguments) for item in first.output[1:]] == CALLS
    assert [response.output_text for response in others] == TURNS[1:]
    assert {response.status for response in asked} == {"completed"}


@pytest.mark.parametrize("is_streamed", [False, True])
def test_anthropic_messages(is_streamed):
    import anthropic

    asked = []

    def ask(client, messages):
        tool = {"name": "look", "description": "Look.", "input_schema": SCHEMA}
        options = {"model": "policy", "max_tokens": 400, "system": SYSTEM, "messages": messages, "tools": [tool]}
        if not is_streamed:
            return valid(client.messages.create(**options))
        with client.messages.stream(**options) as stream:
            kinds = [event.type for event in stream]
            assert (kinds[0], kinds[-1]) == ("message_start", "message_stop")
            return valid(stream.get_final_message())

    def program(base_url, api_key, row):
        messages = [{"role": "user", "content": FIRST}]
        with anthropic.Anthropic(base_url=base_url.removesuffix("/v1"), api_key=api_key, max_retries=0) as client:
            assert [model.id for model in client.models.list()] == ["policy"]
            for more in (None, *MORE):
                message = ask(client, messages)
                asked.append(message)
                messages.append({"role": "assistant", "content": [block.to_dict() for block in message.content]})
                results = [
                    {"type": "tool_result", "tool_use_id": block.id, "content": SEEN[block.input["at"]]}
                    for block in message.content if block.type == "tool_use"
                ]  # fmt: skip
                messages.append({"role": "user", "content": results or [{"type": "text", "text": more or ""}]})
        return 1.0

    straight(program)
    first, *others = asked
    assert [block.type for block in first.content] == ["thinking", "tool_use", "tool_use"]
    assert [block.input for block in first.content[1:]] == CALLS
    assert [message.content[0].text for message in others] == TURNS[1:]
    assert [message.stop_reason for message in asked] == ["tool_use", "end_turn", "end_turn", "end_turn"]
    assert all(message.usage.input_tokens > 0 and message.usage.output_tokens > 0 for message in asked)


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("kind", ["chat", "responses"])
def test_openai_agents(kind, is_streamed):
    import agents
    import openai

    agents.set_tracing_disabled(True)
    models = {"chat": agents.OpenAIChatCompletionsModel, "responses": agents.OpenAIResponsesModel}
    looked, said = [], []

    @agents.function_tool
    def look(at: str, far: bool = False) -> str:
        """Look."""
        looked.append({"at": at, "far": far})
        return SEEN[at]

    async def run(agent, items):
        if not is_streamed:
            return await agents.Runner.run(agent, items)
        result = agents.Runner.run_streamed(agent, items)
        async for _ in result.stream_events():
            pass
        return result

    async def program(base_url, api_key, row):
        async with openai.AsyncOpenAI(base_url=base_url, api_key=api_key, max_retries=0) as client:
            model = models[kind](model="policy", openai_client=client)
            agent = agents.Agent(name="looker", instructions=SYSTEM, tools=[look], model=model)
            items = [{"role": "user", "content": FIRST}]
            for more in MORE:
                result = await run(agent, items)
                said.append(result.final_output)
                items = [*result.to_input_list(), {"role": "user", "content": more}]
        return 1.0

    straight(program)
    assert looked == [{"far": False, **call} for call in CALLS]
    assert said == TURNS[1:]


def test_a_refusal_is_an_error_of_the_client_that_says_why():
    import anthropic
    import openai

    told = []

    def program(base_url, api_key, row):
        with openai.OpenAI(base_url=base_url, api_key=api_key, max_retries=0) as client:
            message = {"role": "user", "content": FIRST}
            client.chat.completions.create(model="policy", messages=[message])
            with pytest.raises(openai.BadRequestError) as refusal:
                client.chat.completions.create(model="policy", messages=[{**message, "content": "x" * 100_000}])
            told.append(refusal.value.code)
        root = base_url.removesuffix("/v1")
        with (
            anthropic.Anthropic(base_url=root, api_key="sk-other", max_retries=0) as client,
            pytest.raises(anthropic.AuthenticationError),
        ):
            client.messages.create(model="policy", max_tokens=5, messages=[message])
        return 1.0

    played(program)
    assert told == ["context_length_exceeded"]
