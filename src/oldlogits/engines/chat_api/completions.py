"""OpenAI's chat completions: ``POST /v1/chat/completions``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, JsonValue

from oldlogits.engines.chat_api.messages import (
    ApiError,
    Body,
    Call,
    ChatAnswer,
    ChatMessage,
    ChatRequest,
    Dialect,
    Role,
    Wishes,
    arguments_of,
    event,
    function_tool,
    text_of,
)

Finite = Annotated[float, Field(allow_inf_nan=False)]
Parts = str | list[dict[str, JsonValue]] | None


class FunctionCall(Body):
    """A call's name, and its arguments as JSON text."""

    name: str
    arguments: str = "{}"


class ToolCallBody(Body):
    """A call of an assistant message."""

    id: str = ""
    function: FunctionCall


class MessageBody(Body):
    """A message of a request."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Parts = None
    tool_calls: list[ToolCallBody] | None = None

    def read(self) -> ChatMessage:
        """Return it as ours."""
        roles: dict[str, Role] = {"developer": "system", "function": "tool"}
        role: Role = roles.get(self.role, self.role)  # type: ignore[arg-type]
        calls = tuple(
            Call(id=call.id, name=call.function.name, arguments=arguments_of(call.function.arguments))
            for call in self.tool_calls or ()
        )
        return ChatMessage(role=role, content=text_of(self.content), calls=calls)


class FunctionBody(Body):
    """A tool's name, description and schema."""

    name: str
    description: str | None = None
    parameters: dict[str, JsonValue] | None = None


class ToolBody(Body):
    """A tool of a request."""

    type: Literal["function"] = "function"
    function: FunctionBody


class StreamOptions(Body):
    """What a stream is to contain."""

    include_usage: bool = False


class CompletionBody(Body):
    """A request; parameters that are not named here change nothing of what is sampled."""

    model: str = ""
    messages: list[MessageBody] = Field(min_length=1)
    tools: list[ToolBody] | None = None
    tool_choice: str | dict[str, JsonValue] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[Finite, Field(ge=0)] | None = None
    top_p: Annotated[Finite, Field(gt=0, le=1)] | None = None
    top_k: int | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    response_format: dict[str, JsonValue] | None = None
    presence_penalty: Finite | None = None
    frequency_penalty: Finite | None = None
    repetition_penalty: Finite | None = None
    min_p: Finite | None = None
    logit_bias: dict[str, Finite] | None = None
    logprobs: bool | None = None
    return_token_ids: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def others(self) -> tuple[str, ...]:
        """Name what would change the distribution, and is not at the value that changes nothing."""
        neutral: Mapping[str, object] = {
            "n": 1,
            "stop": [],
            "tool_choice": "auto",
            "presence_penalty": 0,
            "frequency_penalty": 0,
            "repetition_penalty": 1,
            "min_p": 0,
            "logit_bias": {},
            "response_format": {"type": "text"},
        }
        asked = ((name, getattr(self, name), value) for name, value in neutral.items())
        return tuple(name for name, value, same in asked if value is not None and value not in (same, [], ""))


class ChatCompletions(Dialect):
    """OpenAI's chat completions, as vLLM and most servers offer them."""

    path: ClassVar[str] = "/chat/completions"

    def read(self, body: object) -> ChatRequest:
        """Read a request."""
        asked = CompletionBody.model_validate(body)
        tools = [function_tool(t.function.name, t.function.description, t.function.parameters) for t in asked.tools or ()]
        has_none = asked.tool_choice == "none"
        return ChatRequest(
            model=asked.model,
            messages=tuple(message.read() for message in asked.messages),
            tools=() if has_none else tuple(tools),
            wishes=Wishes(
                max_tokens=asked.max_completion_tokens or asked.max_tokens,
                temperature=asked.temperature,
                top_p=asked.top_p,
                top_k=asked.top_k,
                others=tuple(name for name in asked.others() if not (has_none and name == "tool_choice")),
            ),
            logprobs=bool(asked.logprobs),
            token_ids=bool(asked.return_token_ids),
            stream=bool(asked.stream),
            usage_in_stream=asked.stream_options is not None and asked.stream_options.include_usage,
        )

    def write(self, answer: ChatAnswer, request: ChatRequest) -> dict[str, object]:
        """Write an answer."""
        turn = answer.turn
        message: dict[str, object] = {"role": "assistant", "content": turn.content or (None if turn.calls else "")}
        if turn.thoughts:
            message["reasoning_content"] = turn.thoughts
        if turn.calls:
            message["tool_calls"] = [_call(call) for call in turn.calls]
        choice = {"index": 0, "message": message, "logprobs": _logprobs(answer, request), "finish_reason": answer.finish_reason}
        ids: dict[str, object] = {}
        if request.token_ids:
            choice["token_ids"], ids["prompt_token_ids"] = list(answer.output_ids), list(answer.prompt_ids)
        return {**_head(answer, request, "chat.completion"), **ids, "choices": [choice], "usage": _usage(answer)}

    def events(self, answer: ChatAnswer, request: ChatRequest) -> Iterator[str]:
        """Write an answer as chunks: its role, its thoughts, its content, its calls, its end."""
        turn, head = answer.turn, _head(answer, request, "chat.completion.chunk")
        deltas: list[dict[str, object]] = [{"role": "assistant", "content": ""}]
        deltas += [{"reasoning_content": turn.thoughts}] if turn.thoughts else []
        deltas += [{"content": turn.content}] if turn.content else []
        deltas += [{"tool_calls": [{"index": index, **_call(call)}]} for index, call in enumerate(turn.calls)]
        logprobs = _logprobs(answer, request)
        for number, delta in enumerate(deltas, start=1):
            is_last = {"logprobs": logprobs} if number == len(deltas) else {}
            yield event({**head, "choices": [{"index": 0, "delta": delta, **is_last, "finish_reason": None}]})
        yield event({**head, "choices": [{"index": 0, "delta": {}, "finish_reason": answer.finish_reason}]})
        if request.usage_in_stream:
            yield event({**head, "choices": [], "usage": _usage(answer)})
        yield event("[DONE]")

    def error(self, status: int, code: str, message: str) -> dict[str, object]:
        """Write a refusal."""
        kind = "invalid_request_error" if status < 500 else "server_error"
        return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def _head(answer: ChatAnswer, request: ChatRequest, kind: str) -> dict[str, object]:
    return {"id": f"chatcmpl-{answer.id}", "object": kind, "created": answer.created, "model": request.model}


def _call(call: Call) -> dict[str, object]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.written}}


def _usage(answer: ChatAnswer) -> dict[str, int]:
    read, sampled = len(answer.prompt_ids), len(answer.output_ids)
    return {"prompt_tokens": read, "completion_tokens": sampled, "total_tokens": read + sampled}


def _logprobs(answer: ChatAnswer, request: ChatRequest) -> dict[str, object] | None:
    if not request.logprobs:
        return None
    pairs = zip(answer.texts, answer.logprobs, strict=True)
    return {"content": [{"token": t, "bytes": list(t.encode()), "logprob": p, "top_logprobs": []} for t, p in pairs]}


def only_functions(kinds: Iterator[str]) -> None:
    """Refuse tools that the server itself would have to run.

    Raises:
        ApiError: There is one.
    """
    for kind in kinds:
        if kind != "function":
            raise ApiError(
                "a tool is not a function", got=f"a tool of type {kind!r}", allowed="function", fix="offer it as a function"
            )
