"""A conversation partner that is a language model: any endpoint that answers as OpenAI's chat completions do.

    class Shop:
        def __init__(self):
            self.user = ChatUser("http://127.0.0.1:8000/v1", "some-model", "You want a lamp. Say ###STOP### when you have it.")

        async def reset(self, **row):
            return await self.user.open()

        async def reply(self, message):
            return await self.user.reply(message)

What it writes is context of the agent: none of its tokens is trained.
"""

from __future__ import annotations

import asyncio
import json
import random
from dataclasses import KW_ONLY, dataclass, field
from typing import Final, cast

from oldlogits.core.environment import JsonValue, Row
from oldlogits.core.errors import OldLogitsError
from oldlogits.core.registry import require
from oldlogits.envs.text import read_json, spoken

_LARGEST: Final = 1 << 22
"""Bytes of an answer that are read."""
_AGAIN: Final = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
"""Statuses after which the same request may well succeed."""


class ChatUserError(OldLogitsError, ConnectionError):
    """The model of a conversation partner did not answer."""


@dataclass(slots=True)
class ChatUser:
    """One conversation with a language model in the role of the user; `env.timeout_s` counts for all tries of an answer.

    Args:
        base_url: The address before ``/chat/completions``.
        model: The model that the endpoint shall answer with.
        instructions: The system message: who this user is, what they want, and when they say the stop word.
        api_key: Sent as a bearer token; empty: none is.
        stop: The word with which the user ends the conversation; what else they say then is not heard.
        max_replies: Answers after which the conversation ends.
        sampling: Further fields of the request.
        timeout_s: Seconds that one try may take.
        retries: Further tries after a lost connection, a time-out, or a busy server.
        backoff_s: Seconds before the second try; they double with every further one.
        messages: The conversation as that model sees it: the agent is its user. JSON, for the `save_state` of an environment.
    """

    base_url: str
    model: str
    instructions: str
    _: KW_ONLY
    api_key: str = field(default="", repr=False)
    stop: str = "###STOP###"
    max_replies: int = 64
    sampling: Row = field(default_factory=lambda: cast(Row, {"max_tokens": 512}))
    timeout_s: float = 60.0
    retries: int = 4
    backoff_s: float = 0.5
    messages: list[dict[str, str]] = field(default_factory=list)

    async def open(self, greeting: str = "Hello, how can I help you?") -> str:
        """Return what the user says first, to a greeting that only they read.

        Raises:
            ChatUserError: The endpoint refuses, or does not answer.
        """
        return await self.reply(greeting) or ""

    async def reply(self, message: str) -> str | None:
        """Return the user's answer to an agent's message; None where they end the conversation.

        Raises:
            ChatUserError: The endpoint refuses, or does not answer.
        """
        if sum(one["role"] == "assistant" for one in self.messages) >= self.max_replies:
            return None
        asked = [*self.messages, {"role": "user", "content": message}]
        answer = spoken(await self._ask(asked)).strip()
        self.messages = [*asked, {"role": "assistant", "content": answer}]
        return None if self.stop in answer else answer

    async def _ask(self, messages: list[dict[str, str]]) -> str:
        """Ask the endpoint, again where that may help."""
        body = {**self.sampling, "model": self.model, "messages": [{"role": "system", "content": self.instructions}, *messages]}
        reason = ""
        for attempt in range(self.retries + 1):
            if attempt:
                await asyncio.sleep(self.backoff_s * 2 ** (attempt - 1) * random.uniform(0.5, 1.0))
            status, answer = await self._post(json.dumps(body).encode())
            if status == 200:
                return _content(answer)
            reason = f"{status or 'no answer'}: {' '.join(answer.split())[:200]}"
            if status and status not in _AGAIN:
                break
        raise ChatUserError(
            "the conversation partner did not answer",
            got=f"{self.base_url}: {reason}",
            allowed="an endpoint of chat completions",
            fix="correct base_url, model or api_key, or raise timeout_s or retries",
        )

    async def _post(self, body: bytes) -> tuple[int, str]:
        """Send a request; returns status and text of the answer, 0 and the reason where there is none."""
        require("vllm", "aiohttp", what="ChatUser")
        import aiohttp

        headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {self.api_key}"} if self.api_key else {})
        url, timeout = f"{self.base_url.rstrip('/')}/chat/completions", aiohttp.ClientTimeout(total=self.timeout_s)
        try:
            async with (
                aiohttp.ClientSession(timeout=timeout, trust_env=True) as session,
                session.post(url, data=body, headers=headers) as answer,
            ):
                parts, size = [], 0
                async for part in answer.content.iter_chunked(1 << 16):
                    parts.append(part)
                    if (size := size + len(part)) > _LARGEST:
                        return 0, f"an answer of more than {_LARGEST:,} bytes"
                return answer.status, b"".join(parts).decode(errors="replace")
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            return 0, f"{type(error).__name__} {error}"


def _content(answer: str) -> str:
    try:
        read: JsonValue = read_json(answer)
    except ValueError:
        read = None
    match read:
        case {"choices": [{"message": {"content": str(content)}}, *_]} if content.strip():
            return content
    raise ChatUserError(
        "the conversation partner said nothing",
        got=" ".join(answer.split())[:200],
        allowed='{"choices": [{"message": {"content": ...}}]}',
        fix="correct base_url, or ask a model that answers in words",
    )
