"""Anthropic's messages: ``POST /v1/messages``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field, JsonValue

from oldlogits.engines.chat_api.completions import Finite, Parts
from oldlogits.engines.chat_api.messages import (
    ApiError,
    Body,
    Call,
    ChatAnswer,
    ChatMessage,
    ChatRequest,
    Dialect,
    Wishes,
    event,
    function_tool,
    text_of,
)

_STOP_REASONS = {"stop": "end_turn", "tool_calls": "tool_use", "length": "max_tokens"}
_ERRORS = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 413: "request_too_large"}


class MessageBody(Body):
    """A message of a request: a text, or blocks."""

    role: Literal["user", "assistant"]
    content: Parts


class ToolBody(Body):
    """A tool of a request."""

    name: str
    description: str | None = None
    input_schema: dict[str, JsonValue] | None = None
    type: str | None = None


class MessagesBody(Body):
    """A request; parameters that are not named here change nothing of what is sampled."""

    model: str = ""
    messages: list[MessageBody] = Field(min_length=1)
    system: Parts = None
    tools: list[ToolBody] | None = None
    tool_choice: dict[str, JsonValue] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[Finite, Field(ge=0)] | None = None
    top_p: Annotated[Finite, Field(gt=0, le=1)] | None = None
    top_k: int | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None


class AnthropicMessages(Dialect):
    """Anthropic's messages."""

    path: ClassVar[str] = "/messages"

    def read(self, body: object) -> ChatRequest:
        """Read a request."""
        asked = MessagesBody.model_validate(body)
        for tool in asked.tools or ():
            if tool.type not in (None, "custom"):
                raise ApiError("a tool is run by nobody", got=f"type {tool.type!r}", allowed="custom", fix="offer your own")
        system = text_of(asked.system)
        messages = [ChatMessage(role="system", content=system)] if system else []
        choice = (asked.tool_choice or {}).get("type", "auto")
        others = [
            *(["stop_sequences"] if asked.stop_sequences else []),
            *(["tool_choice"] if choice in ("any", "tool") else []),
        ]
        tools = [function_tool(tool.name, tool.description, tool.input_schema) for tool in asked.tools or ()]
        return ChatRequest(
            model=asked.model,
            messages=(*messages, *(read for message in asked.messages for read in _read(message))),
            tools=() if choice == "none" else tuple(tools),
            wishes=Wishes(
                max_tokens=asked.max_tokens,
                temperature=asked.temperature,
                top_p=asked.top_p,
                top_k=asked.top_k,
                others=tuple(others),
            ),
            stream=bool(asked.stream),
        )

    def write(self, answer: ChatAnswer, request: ChatRequest) -> dict[str, object]:
        """Write an answer."""
        return {
            **_head(answer, request),
            "content": _blocks(answer),
            "stop_reason": _STOP_REASONS[answer.finish_reason],
            "stop_sequence": None,
            "usage": {"input_tokens": len(answer.prompt_ids), "output_tokens": len(answer.output_ids)},
        }

    def events(self, answer: ChatAnswer, request: ChatRequest) -> Iterator[str]:
        """Write an answer as the events of a stream, one delta for each block."""
        usage = {"input_tokens": len(answer.prompt_ids), "output_tokens": 0}
        empty = {**_head(answer, request), "content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}
        yield event({"type": "message_start", "message": empty}, "message_start")
        for index, block in enumerate(_blocks(answer)):
            start, delta = _as_delta(block, answer)
            yield event({"type": "content_block_start", "index": index, "content_block": start}, "content_block_start")
            yield event({"type": "content_block_delta", "index": index, "delta": delta}, "content_block_delta")
            yield event({"type": "content_block_stop", "index": index}, "content_block_stop")
        ended = {"stop_reason": _STOP_REASONS[answer.finish_reason], "stop_sequence": None}
        used = {"output_tokens": len(answer.output_ids)}
        yield event({"type": "message_delta", "delta": ended, "usage": used}, "message_delta")
        yield event({"type": "message_stop"}, "message_stop")

    def error(self, status: int, code: str, message: str) -> dict[str, object]:
        """Write a refusal."""
        return {"type": "error", "error": {"type": _ERRORS.get(status, "api_error"), "message": f"{message} ({code})"}}


def _read(message: MessageBody) -> list[ChatMessage]:
    """One message of theirs as ours: results of tools are messages of their own."""
    if message.content is None or isinstance(message.content, str):
        return [ChatMessage(role=message.role, content=message.content or "")]
    found: list[ChatMessage] = []
    texts: list[str] = []
    calls: list[Call] = []
    for block in message.content:
        match block:
            case {"type": "text", "text": str(text)}:
                texts.append(text)
            case {"type": "thinking" | "redacted_thinking"}:
                pass
            case {"type": "tool_use", "id": str(id), "name": str(name), "input": dict(arguments)}:
                calls.append(Call(id=id, name=name, arguments=arguments))
            case {"type": "tool_result"}:
                found.append(ChatMessage(role="tool", content=_result(block.get("content"))))
            case _:
                got = f"a block of type {block.get('type')!r}"
                raise ApiError("a block cannot be read", got=got, allowed="text, tool_use, tool_result", fix="leave it out")
    if texts or calls or not found:
        found.append(ChatMessage(role=message.role, content="".join(texts), calls=tuple(calls)))
    return found


def _result(content: object) -> str:
    return text_of(content if isinstance(content, list) else str(content or ""))


def _head(answer: ChatAnswer, request: ChatRequest) -> dict[str, object]:
    return {"id": f"msg_{answer.id}", "type": "message", "role": "assistant", "model": request.model}


def _blocks(answer: ChatAnswer) -> Sequence[dict[str, object]]:
    turn = answer.turn
    blocks: list[dict[str, object]] = []
    if turn.thoughts:
        blocks.append({"type": "thinking", "thinking": turn.thoughts, "signature": ""})
    if turn.content or not turn.calls:
        blocks.append({"type": "text", "text": turn.content})
    for call in turn.calls:
        arguments = {} if isinstance(call.arguments, str) else dict(call.arguments)
        blocks.append({"type": "tool_use", "id": call.id, "name": call.name, "input": arguments})
    return blocks


def _as_delta(block: dict[str, object], answer: ChatAnswer) -> tuple[dict[str, object], dict[str, object]]:
    """A block as it starts, and what is added to it."""
    if block["type"] == "tool_use":
        call = next(call for call in answer.turn.calls if call.id == block["id"])
        return {**block, "input": {}}, {"type": "input_json_delta", "partial_json": call.written}
    kind = str(block["type"])
    return {**block, kind if kind == "thinking" else "text": ""}, (
        {"type": "thinking_delta", "thinking": block["thinking"]}
        if kind == "thinking"
        else {"type": "text_delta", "text": block["text"]}
    )
