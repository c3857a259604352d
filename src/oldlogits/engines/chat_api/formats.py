"""Requests as the chat template takes them: its formats by tools, messages as it reads them, digests of their beginnings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Final, Protocol, TypeVar, cast

from oldlogits.core.environment import JsonValue
from oldlogits.core.errors import ConfigError, ContentError
from oldlogits.core.parser import Parser, ToolCall, WritingParser
from oldlogits.engines.chat_api.messages import ApiError, Call, ChatMessage, ChatRequest
from oldlogits.envs.text import write_json
from oldlogits.models.chat.format import ChatFormat
from oldlogits.models.chat.template import SENTINEL, Message

T = TypeVar("T")
Refusal = ConfigError | ContentError
Tools = Sequence[Mapping[str, JsonValue]]

_MOST_KEPT: Final = 64
_MOST_TOKENS: Final = 1 << 20


class Elsewhere(Protocol):
    """Runs what may take long beside the event loop."""

    def __call__(self, call: Callable[[], T], /) -> Awaitable[T]:
        """Return what the call returns."""


class Prompts:
    """The tokens of conversations that begin, by digest: all episodes of a task begin alike. The latest million are kept."""

    def __init__(self) -> None:
        self._kept: dict[bytes, list[int]] = {}
        self._num_tokens = 0

    def get(self, digest: bytes) -> list[int] | None:
        """Return the tokens of a conversation, if they are kept."""
        return self._kept.get(digest)

    def keep(self, digest: bytes, ids: list[int]) -> None:
        """Keep the tokens of a conversation."""
        self._num_tokens += len(ids) - len(self._kept.pop(digest, ()))
        self._kept[digest] = ids
        while self._num_tokens > _MOST_TOKENS:
            self._num_tokens -= len(self._kept.pop(next(iter(self._kept))))


class ChatFormats:
    """The chat formats of one model by the tools of a conversation, the latest ones kept.

    Args:
        make: Opens the chat format for some tools.
    """

    def __init__(self, make: Callable[[Tools], ChatFormat]) -> None:
        self._make = make
        self._kept: dict[bytes, ChatFormat] = {}
        self.prompts = Prompts()

    async def of(self, key: bytes, tools: Tools, run: Elsewhere) -> ChatFormat:
        """Return the chat format of tools whose digest is the key; a new one is opened where `run` runs it.

        Raises:
            ApiError: The chat template cannot write the tools.
        """
        found = self._kept.pop(key, None)
        if found is None:
            made: ChatFormat | Refusal = await run(lambda: refusal_or(partial(self._make, tools)))
            if isinstance(made, ConfigError) and tools:
                raise _unwritten(tools, made)
            found = raised(made)
        self._kept[key] = found
        if len(self._kept) > _MOST_KEPT:
            del self._kept[next(iter(self._kept))]
        return found


def _unwritten(tools: Tools, error: ConfigError) -> ApiError:
    names = [str(cast("Mapping[str, JsonValue]", tool["function"])["name"]) for tool in tools]
    return ApiError(
        f"the model cannot be offered the tool{'s' * (len(names) > 1)} {', '.join(names[:8])}: {error.what}",
        got=error.got,
        allowed=error.allowed,
        fix="set model.chat_tools = 'system' or 'user' (oldlogits serve: --chat-tools), or offer no tools",
        code="unwritten_tools",
    )


def refusal_or(call: Callable[[], T]) -> T | Refusal:
    """Return what a call returns, or its refusal: raised, it would be taken for an error of environment code."""
    try:
        return call()
    except (ConfigError, ContentError) as error:
        return error


def raised(outcome: T | Refusal) -> T:
    """Return an outcome, or raise the refusal that it is."""
    if isinstance(outcome, ConfigError | ContentError):
        raise outcome
    return outcome


def as_written(message: ChatMessage, parser: Parser, chat: ChatFormat) -> Message:
    """Return a message as chat templates take it; calls are text, as the parser writes them, where the template does not.

    Raises:
        ApiError: A parser would have to write arguments that are no object, and has no place for them.
    """
    if not message.calls:
        return {"role": message.role, "content": message.content}
    if not chat.writes_calls and isinstance(parser, WritingParser):
        calls_as_text = [_call_text(call, parser) for call in message.calls]
        return {"role": message.role, "content": "\n".join(filter(None, [message.content, *calls_as_text]))}
    calls = [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in message.calls
    ]
    return {"role": message.role, "content": message.content, "tool_calls": calls}


def _call_text(call: Call, parser: WritingParser) -> str:
    """A call as the parser writes it; arguments that are no object stand as they are in the place of one."""
    if not isinstance(call.arguments, str):
        return parser.write(ToolCall(name=call.name, named=call.arguments))
    before, found, after = parser.write(ToolCall(name=call.name, named={SENTINEL: 0})).partition(write_json({SENTINEL: 0}))
    if found:
        return before + call.arguments + after
    raise ApiError(
        f"the arguments of a call of {call.name} in the history are no JSON object, which this env.parser cannot write",
        got=repr(call.arguments)[:200],
        allowed="a JSON object, as it was returned",
        fix="send back what was returned, or have the message say the call as its text",
    )


def digests_of(request: ChatRequest) -> list[bytes]:
    """Give the digest of the tools, and after it of every beginning of the messages; what a model reads alike has the same."""
    found = [_digest(b"", request.tools)]
    for message in request.messages:
        found.append(next_digest(found[-1], message))
    return found


def next_digest(digest: bytes, message: ChatMessage) -> bytes:
    """Give the digest with one more message. Ids of calls do not count, nor space around what an assistant says."""
    content = message.content.strip() if message.role == "assistant" else message.content
    return _digest(digest, [message.role, content, [[call.name, call.arguments] for call in message.calls]])


def _digest(before: bytes, value: object) -> bytes:
    return hashlib.blake2b(before + json.dumps(value, sort_keys=True, ensure_ascii=False).encode(), digest_size=16).digest()
