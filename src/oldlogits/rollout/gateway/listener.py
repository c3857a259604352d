"""Where agent programs find their run: one address and one key for each episode, on this machine.

http://127.0.0.1:41234/3f2a.../v1/chat/completions   the key of the episode as bearer token, or as x-api-key
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Final

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request

from oldlogits.core.environment import Row
from oldlogits.engines.chat_api.messages import ApiError, ChatAnswer, ChatRequest
from oldlogits.engines.chat_api.routes import chat_routes
from oldlogits.engines.server.limits import Guard, Limits
from oldlogits.rollout.gateway.conversations import Conversations
from oldlogits.rollout.gateway.programs import Address

MODEL: Final = "policy"
"""The model that clients may name; any other name is answered by it as well."""

_LIMITS: Final = Limits(max_body_bytes=2**26, idle_s=600.0)
_KEPT_S: Final = 86_400
"""Seconds that an idle connection is kept: one that is closed while its client writes is an error of the program."""
_CLOSING_S: Final = 2


class Gateway:
    """Answers the requests of all episodes; `port` is known while it listens."""

    def __init__(self) -> None:
        self.port = 0
        self._episodes: dict[str, tuple[str, Conversations]] = {}

    @contextmanager
    def episode(self, conversations: Conversations, row: Row) -> Iterator[Address]:
        """Answer requests for one episode."""
        name, key = secrets.token_hex(8), f"sk-{secrets.token_hex(16)}"
        self._episodes[name] = (key, conversations)
        try:
            yield Address(root=f"http://127.0.0.1:{self.port}/{name}", key=key, row=row)
        finally:
            del self._episodes[name]

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[Gateway]:
        """Listen on a free port of this machine."""
        routes = chat_routes(self._answer, self._model, prefix="/{episode}/v1")
        app = Guard(Starlette(routes=routes), token="", limits=_LIMITS)
        config = uvicorn.Config(app, ws="none", lifespan="off", log_level="warning", access_log=False, proxy_headers=False)
        config.timeout_keep_alive, config.timeout_graceful_shutdown = _KEPT_S, _CLOSING_S
        server = _Server(config)
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            listening.listen(1024)
            self.port = listening.getsockname()[1]
            serving = asyncio.create_task(server.serve(sockets=[listening]))
            try:
                yield self
            finally:
                server.should_exit = True
                await serving

    async def _answer(self, http: Request, request: ChatRequest) -> ChatAnswer:
        return await self._conversations(http).answer(request)

    def _model(self, http: Request) -> str:
        self._conversations(http)
        return MODEL

    def _conversations(self, http: Request) -> Conversations:
        """The episode of a request.

        Raises:
            ApiError: There is none of this address, or the key is another one.
        """
        key, conversations = self._episodes.get(http.path_params["episode"], ("", None))
        given = http.headers.get("x-api-key") or http.headers.get("authorization", "").removeprefix("Bearer ")
        if conversations is None:
            raise ApiError(
                "there is no such episode",
                got=http.url.path,
                allowed="the base URL of an episode that runs",
                fix="end the program with its episode",
                status=404,
                code="no_episode",
            )
        if not hmac.compare_digest(key.encode(), given.encode()):
            raise ApiError(
                "the API key is not that of the episode",
                got="another key",
                allowed="the api_key that the program was given",
                fix="use it",
                status=401,
                code="invalid_api_key",
            )
        return conversations


class _Server(uvicorn.Server):
    """A server within a run, which handles signals itself."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals to the run."""
        yield
