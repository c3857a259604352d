"""The chat interfaces as HTTP routes; who answers is given.

client --POST .../v1/chat/completions--> read --> answer(http request, ChatRequest) --> write --> client
client leaves                                     answer is cancelled
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Final

from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from oldlogits.core.errors import ConfigError, ContentError, TrajectoryError
from oldlogits.engines.chat_api.anthropic import AnthropicMessages
from oldlogits.engines.chat_api.completions import ChatCompletions
from oldlogits.engines.chat_api.messages import ApiError, ChatAnswer, ChatRequest, Dialect, event
from oldlogits.engines.chat_api.responses import Responses
from oldlogits.envs.text import read_json

DIALECTS: Final[tuple[Dialect, ...]] = (ChatCompletions(), Responses(), AnthropicMessages())

Answer = Callable[[Request, ChatRequest], Awaitable[ChatAnswer]]
"""Answers a request; raises `ApiError` where it refuses it. It is cancelled when the client leaves."""

Models = Callable[[Request], str]
"""Names the model that a client may name; raises `ApiError` where it may not ask."""

_LONG: Final = 1 << 16
"""Bytes of a body above which it is read beside the event loop."""
_SILENT_S: Final = 10.0
"""Seconds after which a stream begins with a comment, although nothing was sampled yet: the connection is kept alive."""


def chat_routes(answer: Answer, models: Models, *, prefix: str = "/v1") -> list[Route]:
    """Make the routes of all interfaces below a prefix."""

    async def list_models(http: Request) -> Response:
        try:
            card = {"id": models(http), "object": "model", "created": 0, "owned_by": "oldlogits", "type": "model"}
        except ApiError as error:
            return _refused(DIALECTS[0], error)
        return JSONResponse({"object": "list", "data": [card], "has_more": False})

    routes = [Route(f"{prefix}{dialect.path}", _endpoint(dialect, answer), methods=["POST"]) for dialect in DIALECTS]
    return [*routes, Route(f"{prefix}/models", list_models, methods=["GET"])]


def _endpoint(dialect: Dialect, answer: Answer) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(http: Request) -> Response:
        try:
            body = await http.body()
            read = _reader(dialect, body)
            request = await asyncio.to_thread(read) if len(body) > _LONG else read()
            answering = asyncio.ensure_future(answer(http, request))
            leaving = asyncio.ensure_future(_left(http))
            try:
                waiting_s = _SILENT_S if request.stream else None
                await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED, timeout=waiting_s)
                if not answering.done() and not leaving.done():
                    return _stream(_late_events(dialect, request, answering))
                if not answering.done():
                    return Response(status_code=499)
                answered = answering.result()
            finally:
                leaving.cancel()
                if not request.stream or leaving.done():
                    answering.cancel()
            if request.stream:
                return _stream(_events(dialect, request, answered))
            return JSONResponse(dialect.write(answered, request))
        except ApiError as error:
            return _refused(dialect, error)
        except (ConfigError, ContentError, TrajectoryError) as error:
            return JSONResponse(dialect.error(400, "invalid_request", str(error)), status_code=400)

    return endpoint


def _reader(dialect: Dialect, body: bytes) -> Callable[[], ChatRequest]:
    def read() -> ChatRequest:
        try:
            return dialect.read(read_json(body.decode()))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the body"
            got = f"{where} = {first.get('input')!r:.200}"
            raise ApiError("a request cannot be read", got=got, allowed=first["msg"], fix="correct it") from error
        except ValueError as error:
            if isinstance(error, ApiError):
                raise
            got, allowed = str(error)[:300], "JSON in UTF-8"
            raise ApiError("a body is no JSON that can be read", got=got, allowed=allowed, fix="correct it") from error

    return read


def _refused(dialect: Dialect, error: ApiError) -> Response:
    return JSONResponse(dialect.error(error.status, error.code, str(error)), status_code=error.status)


def _stream(events: AsyncIterator[str]) -> Response:
    return StreamingResponse(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})


async def _events(dialect: Dialect, request: ChatRequest, answer: ChatAnswer) -> AsyncIterator[str]:
    for text in dialect.events(answer, request):
        yield text


async def _late_events(dialect: Dialect, request: ChatRequest, answering: asyncio.Future[ChatAnswer]) -> AsyncIterator[str]:
    """The events of an answer that takes long: comments until it is there; a refusal is an event."""
    try:
        while not answering.done():
            yield ": waiting\n\n"
            await asyncio.wait({answering}, timeout=_SILENT_S)
        try:
            answer = answering.result()
        except ApiError as error:
            yield event(dialect.error(error.status, error.code, str(error)), "error")
            return
        for text in dialect.events(answer, request):
            yield text
    finally:
        if not answering.done():
            answering.cancel()
            with suppress(asyncio.CancelledError):
                await answering


async def _left(http: Request) -> None:
    """Return when nobody waits for the answer any more."""
    while (await http.receive())["type"] != "http.disconnect":
        pass
