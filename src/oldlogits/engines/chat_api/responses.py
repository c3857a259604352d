"""OpenAI's responses: ``POST /v1/responses``, without state on the server: the whole conversation comes with each request."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar

from pydantic import Field, JsonValue

from oldlogits.engines.chat_api.completions import ChatCompletions, Finite, only_functions
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


class ToolBody(Body):
    """A tool of a request."""

    type: str
    name: str = ""
    description: str | None = None
    parameters: dict[str, JsonValue] | None = None


class TextBody(Body):
    """The form of the text that is wanted."""

    format: dict[str, JsonValue] | None = None


class ResponseBody(Body):
    """A request; parameters that are not named here change nothing of what is sampled."""

    model: str = ""
    input: str | list[dict[str, JsonValue]]
    instructions: str | None = None
    tools: list[ToolBody] | None = None
    tool_choice: str | dict[str, JsonValue] | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[Finite, Field(ge=0)] | None = None
    top_p: Annotated[Finite, Field(gt=0, le=1)] | None = None
    text: TextBody | None = None
    previous_response_id: str | None = None
    conversation: JsonValue = None
    stream: bool | None = None


class Responses(Dialect):
    """OpenAI's responses."""

    path: ClassVar[str] = "/responses"

    def read(self, body: object) -> ChatRequest:
        """Read a request."""
        asked = ResponseBody.model_validate(body)
        if asked.previous_response_id is not None or asked.conversation is not None:
            raise ApiError(
                "responses are not kept here",
                got="previous_response_id or conversation",
                allowed="the whole conversation as `input`",
                fix="send all items with each request (store = False)",
            )
        only_functions(tool.type for tool in asked.tools or ())
        messages = [ChatMessage(role="system", content=asked.instructions)] if asked.instructions else []
        items: list[dict[str, JsonValue]] = []
        items += [{"role": "user", "content": asked.input}] if isinstance(asked.input, str) else asked.input
        others = []
        if asked.text is not None and asked.text.format is not None and asked.text.format.get("type") != "text":
            others.append("text.format")
        if asked.tool_choice not in (None, "auto", "none"):
            others.append("tool_choice")
        tools = [function_tool(tool.name, tool.description, tool.parameters) for tool in asked.tools or ()]
        if not (messages := [*messages, *_messages(items)]):
            raise ApiError("a request has no message", got="an empty conversation", allowed="at least one", fix="add it")
        return ChatRequest(
            model=asked.model,
            messages=tuple(messages),
            tools=() if asked.tool_choice == "none" else tuple(tools),
            wishes=Wishes(
                max_tokens=asked.max_output_tokens,
                temperature=asked.temperature,
                top_p=asked.top_p,
                others=tuple(others),
            ),
            stream=bool(asked.stream),
        )

    def write(self, answer: ChatAnswer, request: ChatRequest) -> dict[str, object]:
        """Write an answer."""
        cut_off = answer.finish_reason == "length"
        read, sampled = len(answer.prompt_ids), len(answer.output_ids)
        return {
            **_head(answer, request),
            "status": "incomplete" if cut_off else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut_off else None,
            "output": _items(answer),
            "usage": {
                "input_tokens": read,
                "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                "output_tokens": sampled,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": read + sampled,
            },
        }

    def events(self, answer: ChatAnswer, request: ChatRequest) -> Iterator[str]:
        """Write an answer as the events of a stream, one delta for each item."""
        written = self.write(answer, request)
        started = {**written, "status": "in_progress", "output": [], "usage": None, "incomplete_details": None}
        told: list[dict[str, object]] = [{"type": "response.created", "response": started}]
        told.append({"type": "response.in_progress", "response": started})
        for index, item in enumerate(_items(answer)):
            told += _item_events(index, item)
        ended = "response.incomplete" if answer.finish_reason == "length" else "response.completed"
        told.append({"type": ended, "response": written})
        for number, data in enumerate(told):
            yield event({**data, "sequence_number": number}, str(data["type"]))

    def error(self, status: int, code: str, message: str) -> dict[str, object]:
        """Write a refusal."""
        return ChatCompletions().error(status, code, message)


def _messages(items: list[dict[str, JsonValue]]) -> list[ChatMessage]:
    """The items of a conversation as messages: calls belong to the assistant's message before them."""
    roles: dict[str, Role] = {"developer": "system", "system": "system", "user": "user", "assistant": "assistant"}
    found: list[ChatMessage] = []
    for item in items:
        match item:
            case {"type": "function_call", "name": str(name), "arguments": str(written)}:
                call = Call(id=str(item.get("call_id", "")), name=name, arguments=arguments_of(written))
                before = found.pop() if found and found[-1].role == "assistant" else ChatMessage(role="assistant", content="")
                found.append(ChatMessage(role="assistant", content=before.content, calls=(*before.calls, call)))
            case {"type": "function_call_output"}:
                output = item.get("output")
                found.append(ChatMessage(role="tool", content=text_of(output if isinstance(output, list) else str(output))))
            case {"type": "reasoning"}:
                pass
            case {"role": str(role), **rest} if role in roles and rest.get("type", "message") == "message":
                found.append(ChatMessage(role=roles[role], content=text_of(item.get("content"))))
            case _:
                raise ApiError(
                    "an item cannot be read",
                    got=f"type {item.get('type')!r}, role {item.get('role')!r}",
                    allowed="message, function_call, function_call_output, reasoning",
                    fix="leave it out",
                )
    return found


def _head(answer: ChatAnswer, request: ChatRequest) -> dict[str, object]:
    return {
        "id": f"resp_{answer.id}",
        "object": "response",
        "created_at": answer.created,
        "model": request.model,
        "error": None,
        "instructions": None,
        "metadata": {},
        "parallel_tool_calls": True,
        "temperature": request.wishes.temperature,
        "tool_choice": "auto",
        "tools": [],
        "top_p": request.wishes.top_p,
    }


def _items(answer: ChatAnswer) -> list[dict[str, object]]:
    turn = answer.turn
    items: list[dict[str, object]] = []
    if turn.thoughts:
        summary = [{"type": "summary_text", "text": turn.thoughts}]
        items.append({"id": f"rs_{answer.id}", "type": "reasoning", "summary": summary})
    if turn.content or not turn.calls:
        content = [{"type": "output_text", "text": turn.content, "annotations": []}]
        head = {"id": f"msg_{answer.id}", "type": "message", "role": "assistant", "status": "completed"}
        items.append({**head, "content": content})
    for call in turn.calls:
        named = {"call_id": call.id, "name": call.name, "arguments": call.written}
        items.append({"id": f"fc_{call.id}", "type": "function_call", "status": "completed", **named})
    return items


def _item_events(index: int, item: dict[str, object]) -> list[dict[str, object]]:
    """An item as it starts, what is added to it, and its end."""
    at = {"output_index": index, "item_id": item["id"]}
    inner: list[dict[str, object]] = []
    started = item
    if item["type"] == "message":
        part = item["content"][0]  # type: ignore[index]
        started, within = {**item, "status": "in_progress", "content": []}, {**at, "content_index": 0}
        inner = [
            {"type": "response.content_part.added", **within, "part": {**part, "text": ""}},
            {"type": "response.output_text.delta", **within, "delta": part["text"], "logprobs": []},
            {"type": "response.output_text.done", **within, "text": part["text"], "logprobs": []},
            {"type": "response.content_part.done", **within, "part": part},
        ]
    elif item["type"] == "function_call":
        written = item["arguments"]
        started = {**item, "status": "in_progress", "arguments": ""}
        inner = [
            {"type": "response.function_call_arguments.delta", **at, "delta": written},
            {"type": "response.function_call_arguments.done", **at, "arguments": written, "name": item["name"]},
        ]
    return [
        {"type": "response.output_item.added", "output_index": index, "item": started},
        *inner,
        {"type": "response.output_item.done", "output_index": index, "item": item},
    ]
