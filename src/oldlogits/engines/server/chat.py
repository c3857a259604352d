"""The chat interfaces of `oldlogits serve`: every conversation is encoded from its text, as a deployed model reads it.

    messages, tools --chat template--> tokens --> engine --> tokens --parser--> what is said, thoughts, calls

A request's temperature, top_p, top_k and most tokens are honoured. What else would change what is sampled is overridden,
counted among /metrics and told once, or refused.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from starlette.requests import Request

from oldlogits.core.engine import Generation, Sampling
from oldlogits.core.errors import ConfigError, ContentError
from oldlogits.core.parser import Parser
from oldlogits.core.server import GenerateRequest
from oldlogits.engines.chat_api.formats import ChatFormats, as_written, digests_of
from oldlogits.engines.chat_api.messages import ApiError, ChatAnswer, ChatRequest
from oldlogits.engines.chat_api.turn import answer_of, read_turn
from oldlogits.engines.chat_api.wishes import Rules, Unmet
from oldlogits.engines.server.served import Served
from oldlogits.models.chat.format import ChatFormat

OVERRIDDEN = "oldlogits:overridden_parameters_total"
"""The counter, by parameter, of what requests asked for and did not get."""


class ServedChat:
    """Answers chat requests with the served engine.

    Args:
        served: The engine.
        chat: How its model writes conversations.
        parser: Reads the calls of its turns.
        unmet: What becomes of a parameter that is not honoured.
        note: Told once of every parameter that is overridden.
    """

    def __init__(
        self,
        served: Served,
        chat: ChatFormat,
        parser: Parser,
        *,
        unmet: Unmet = "override",
        note: Callable[[str], None] = print,
    ) -> None:
        self._served, self._parser, self._note = served, parser, note
        self._formats = ChatFormats(chat.for_tools)
        self._rules = Rules(unmet=unmet, honours=True, key="--unmet-wishes")
        self.overridden: Counter[str] = Counter()

    async def answer(self, http: Request, request: ChatRequest) -> ChatAnswer:
        """Sample the next turn of a conversation.

        Raises:
            ApiError: The request is refused, or the engine gave it up.
        """
        if request.messages[-1].role == "assistant":
            raise ApiError(
                "the last message is the assistant's: a turn is sampled whole, and not begun by the client",
                got="a last message of role 'assistant'",
                allowed="user, tool, system",
                fix="leave it out",
            )
        most = self._served.spec.max_context
        sampling = self._sampling(request, most)
        try:
            chat = await self._formats.of(digests_of(request)[0], request.tools, asyncio.to_thread)
            ids = await asyncio.to_thread(self._encoded, chat, request)
        except (ConfigError, ContentError) as error:
            got, allowed = str(error), "a conversation that the chat template can write"
            raise ApiError("the conversation cannot be encoded", got=got, allowed=allowed, fix="correct it") from error
        if len(ids) >= most:
            raise _too_long(f"{len(ids):,} tokens", most)
        room = min(sampling.max_tokens, most - len(ids))
        name = f"chat-{next(self._served.numbers)}"
        generation = await self._served.generate(
            GenerateRequest(
                request_id=name,
                token_ids=tuple(ids),
                sampling=replace(sampling, max_tokens=room, stop_token_ids=chat.stop_ids),
            )
        )
        return await self._read(chat, request, ids, generation)

    def _sampling(self, request: ChatRequest, most: int) -> Sampling:
        before = set(self.overridden)
        own = Sampling(max_tokens=request.wishes.max_tokens or most)
        sampling = self._rules.sampling(own, request.wishes, self.overridden)
        for name in self.overridden.keys() - before:
            self._note(f"requests ask for '{name}', which is not honoured (--unmet-wishes refuse refuses it)")
        return sampling

    def _encoded(self, chat: ChatFormat, request: ChatRequest) -> list[int]:
        most, size = (
            self._served.spec.max_context,
            sum(len(message.content.encode(errors="replace")) for message in request.messages),
        )
        if size > chat.most_bytes * most:
            raise _too_long(f"{size:,} bytes", most)
        return chat.conversation_ids([as_written(message, self._parser, chat) for message in request.messages])

    async def _read(self, chat: ChatFormat, request: ChatRequest, ids: list[int], generation: Generation) -> ChatAnswer:
        if generation.finish_reason == "abort":
            got, fix = f"{len(generation.output_ids)} tokens of a turn", "ask again"
            raise ApiError(
                "the turn was given up by a request to abort it", got=got, allowed="", fix=fix, status=503, code="aborted"
            )
        is_whole = generation.finish_reason == "stop"
        text = chat.decode(generation.output_ids)
        turn = await asyncio.to_thread(partial(read_turn, text, self._parser, request.tools, is_whole=is_whole))
        return answer_of(chat, request, ids, generation, turn)


def _too_long(size: str, most: int) -> ApiError:
    return ApiError(
        "the conversation fills the context",
        got=size,
        allowed=f"fewer than {most:,} tokens (--max-context)",
        fix="shorten it, or serve with a longer context",
        code="context_length_exceeded",
    )
