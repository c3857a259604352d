"""A chat request and its answer, whatever interface they came through.

    body --read--> ChatRequest --> whoever answers --> ChatAnswer --write--> body, or a stream of events

What a request wants besides a conversation stands in `Wishes`: who answers decides what becomes of them.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol

from pydantic import BaseModel, ConfigDict

from oldlogits.core.environment import JsonValue
from oldlogits.core.errors import OldLogitsError
from oldlogits.envs.text import read_json

Role = Literal["system", "user", "assistant", "tool"]
FinishReason = Literal["stop", "tool_calls", "length"]


class ApiError(OldLogitsError, ValueError):
    """A request is refused: with a status and a code of the interface."""

    def __init__(
        self, what: str, *, got: str, allowed: str, fix: str, status: int = 400, code: str = "invalid_request"
    ) -> None:
        super().__init__(what, got=got, allowed=allowed, fix=fix)
        self.status, self.code = status, code


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A call of a tool; `arguments` that are no JSON object stay the text that they are."""

    id: str
    name: str
    arguments: Mapping[str, JsonValue] | str

    @property
    def written(self) -> str:
        """The arguments as JSON text."""
        return self.arguments if isinstance(self.arguments, str) else json.dumps(self.arguments, ensure_ascii=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatMessage:
    """A message: the text of all of its parts, and the calls of an assistant's."""

    role: Role
    content: str
    calls: tuple[Call, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What a request wants of sampling.

    Args:
        max_tokens: The most tokens; None: as many as there is room for.
        temperature: None: that of whoever answers.
        top_p: The nucleus; None or 1: everything.
        top_k: The k likeliest tokens; None or 0: all.
        others: Names of further parameters that would change what is sampled, such as ``n`` or ``response_format``.
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    others: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    """A conversation that waits for the assistant's next turn.

    Args:
        tools: What chat templates take of each: ``{"type": "function", "function": {"name", "description", "parameters"}}``.
        logprobs: Whether the log-probs of the sampled tokens are wanted.
        token_ids: Whether the ids of all tokens are wanted.
        stream: Whether the answer is wanted as events.
        usage_in_stream: Whether they are to end with the counts of tokens.
    """

    model: str
    messages: tuple[ChatMessage, ...]
    tools: tuple[Mapping[str, JsonValue], ...] = ()
    wishes: Wishes = field(default_factory=Wishes)
    logprobs: bool = False
    token_ids: bool = False
    stream: bool = False
    usage_in_stream: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """An assistant turn as clients read it: what is said aloud, the thoughts, and the calls."""

    content: str
    thoughts: str
    calls: tuple[Call, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatAnswer:
    """The assistant's turn.

    Args:
        turn: What it says and calls.
        finish_reason: "length": it was cut off.
        prompt_ids: All tokens before it.
        output_ids: Its own tokens, the end-of-turn token included.
        logprobs: Natural log, one for each of them.
        texts: The text of each, where log-probs are wanted.
    """

    turn: Turn
    finish_reason: FinishReason
    prompt_ids: Sequence[int]
    output_ids: Sequence[int]
    logprobs: Sequence[float]
    texts: Sequence[str] = ()
    id: str = field(default_factory=lambda: new_id("gen"))
    created: int = field(default_factory=lambda: int(time.time()))


class Body(BaseModel):
    """A JSON body, of which fields that say nothing about the answer are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Dialect(Protocol):
    """One interface: how its requests are read, and its answers written."""

    path: ClassVar[str]
    """The route, below the base URL."""

    def read(self, body: object) -> ChatRequest:
        """Read a request.

        Raises:
            ApiError: It is none that can be answered.
            pydantic.ValidationError: It has not the interface's form.
        """

    def write(self, answer: ChatAnswer, request: ChatRequest) -> dict[str, object]:
        """Write an answer."""

    def events(self, answer: ChatAnswer, request: ChatRequest) -> Iterator[str]:
        """Write an answer as the text of server-sent events."""

    def error(self, status: int, code: str, message: str) -> dict[str, object]:
        """Write a refusal."""


def new_id(kind: str) -> str:
    """Make an id that nothing else has, such as ``call_5f0c...``."""
    return f"{kind}_{secrets.token_hex(12)}"


def text_of(content: object, kinds: tuple[str, ...] = ("text", "input_text", "output_text")) -> str:
    """Return the text of a message's content: a text, None, or a list of parts.

    Raises:
        ApiError: A part is no text, such as an image.
    """
    if content is None or isinstance(content, str):
        return content or ""
    texts: list[str] = []
    for part in content if isinstance(content, list) else [content]:
        match part:
            case {"type": str(kind), "text": str(text)} if kind in kinds:
                texts.append(text)
            case _:
                got = f"a part of type {part.get('type')!r:.80}" if isinstance(part, dict) else f"{part!r:.80}"
                raise ApiError("a message has a part that is no text", got=got, allowed="text", fix="leave it out")
    return "".join(texts)


def arguments_of(written: str) -> Mapping[str, JsonValue] | str:
    """Return the arguments of a call as an object, or as they are written where they are none."""
    try:
        found = read_json(written or "{}")
    except ValueError:
        return written
    return found if isinstance(found, dict) else written


def function_tool(name: str, description: str | None, parameters: Mapping[str, JsonValue] | None) -> dict[str, JsonValue]:
    """Return a tool as chat templates take it."""
    schema: dict[str, JsonValue] = dict(parameters) if parameters else {"type": "object", "properties": {}}
    return {"type": "function", "function": {"name": name, "description": description or "", "parameters": schema}}


def event(data: Mapping[str, object] | str, name: str = "") -> str:
    """Return the text of one server-sent event."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    return (f"event: {name}\n" if name else "") + f"data: {text}\n\n"
