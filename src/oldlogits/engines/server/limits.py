"""What a request to `oldlogits serve` may take: bytes, digits, depth, connections and time. Beyond it, an answer 4xx.

    connection --head within idle_s--> Guard: host, token --> its body, within idle_s and max_body_bytes --> routes

The body is read here, whole, before any route is called, so that no route waits for a client.
"""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

import h11
from fastapi import HTTPException, Request, Response
from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from oldlogits.core.server import LOOPBACK

_DRAINED: Final = 2**24
"""Bytes beyond the limit that are read and thrown away: a client that still writes would not see its answer."""
_MOST_DIGITS: Final = 19
"""Digits of a whole number: one of 64 bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What clients may take of the server.

    Args:
        max_body_bytes: The largest body of a request.
        max_connections: Connections at the same time; a further one is closed at once.
        idle_s: Seconds for the head of a request, and again for its body.
    """

    max_body_bytes: int
    max_connections: int = 4096
    idle_s: float = 60.0


def refused(status: int, reason: str, kind: str = "BadRequestError") -> Response:
    """Make the answer to a request that is refused, in the shape of vLLM's."""
    body = {"error": {"message": reason, "type": kind, "param": None, "code": status}}
    return Response(json.dumps(body), status_code=status, media_type="application/json")


class Guard:
    """Lets in who has the token, and whole bodies within the limits.

    Without a token, it lets in who is on this machine and no page of a browser.
    """

    def __init__(self, app: ASGIApp, token: str, limits: Limits) -> None:
        self._app, self._token, self._limits = app, token, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer what is refused; pass on the rest."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check_caller(Request(scope))
            body = await self._body(Headers(scope=scope), receive)
        except HTTPException as error:
            answer = refused(error.status_code, error.detail)
            answer.headers["connection"] = "close"  # what is left of the body is not read
            await answer(scope, receive, send)
        except ConnectionError:
            return
        else:
            await self._app(scope, _replayed(body, receive), send)

    def _check_caller(self, request: Request) -> None:
        """Refuse who may not come in; everybody may ask for /health."""
        try:
            host = urlsplit(f"//{request.headers.get('host', '')}").hostname
        except ValueError as error:
            raise HTTPException(400, f"the header Host names no host: {error}") from error
        if request.scope["path"] == "/health":
            return
        if self._token:
            key = request.headers.get("x-api-key")  # Anthropic's clients
            given = f"Bearer {key}" if key is not None else request.headers.get("authorization", "")
            if not hmac.compare_digest(given.encode(), f"Bearer {self._token}".encode()):
                raise HTTPException(401, "the bearer token is missing or wrong")
        elif "origin" in request.headers:
            raise HTTPException(401, "pages of a browser may not use an engine that wants no token")
        elif host not in LOOPBACK:
            raise HTTPException(401, f"host {host} is not this machine's loopback")

    async def _body(self, headers: Headers, receive: Receive) -> bytes:
        """Read the body.

        Raises:
            HTTPException: It is too large, or does not come in time.
            ConnectionError: The client left.
        """
        most, told = self._limits.max_body_bytes, headers.get("content-length", "0")
        too_large = HTTPException(413, f"the body is larger than {most:,} bytes (--max-body-bytes)")
        if not told.isdecimal() or int(told[:20]) > most + _DRAINED:
            raise too_large
        body, size = bytearray(), 0
        try:
            async with asyncio.timeout(self._limits.idle_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ConnectionError
                    size += len(part := message.get("body", b""))
                    body += part if size <= most else b""
                    if size > most + _DRAINED or not message.get("more_body", False):
                        break
        except TimeoutError as error:
            raise HTTPException(408, f"the body did not come within {self._limits.idle_s:g} s") from error
        if size > most:
            raise too_large
        return bytes(body)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Give a body that was read, then what the connection says."""
    waiting = [body]

    async def replay() -> Message:
        return {"type": "http.request", "body": waiting.pop(), "more_body": False} if waiting else await receive()

    return replay


class StrictRoute(APIRoute):
    """A route whose body is JSON that every reader of it can compute with."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Read bodies by `_StrictRequest`."""
        handle = super().get_route_handler()

        async def strictly(request: Request) -> Response:
            return await handle(_StrictRequest(request.scope, request.receive))

        return strictly


class _StrictRequest(Request):
    """Whole numbers of 64 bits, finite numbers, Unicode text, and a depth that can be read."""

    async def json(self) -> Any:  # as in the base class
        """Read the body; what is no such JSON is refused."""
        try:
            text = (await self.body()).decode("utf-8")
            found = json.loads(text, parse_int=_whole, parse_float=_finite, parse_constant=_refuse)
            if "\\ud" in text.lower():  # half a surrogate pair is no text
                json.dumps(found, ensure_ascii=False).encode()
            return found
        except (ValueError, RecursionError) as error:
            raise HTTPException(400, f"the body is no JSON that can be read: {error}"[:300]) from error


def _whole(digits: str) -> int:
    if len(digits.lstrip("-")) >= _MOST_DIGITS and abs(int(digits[: _MOST_DIGITS + 2])) >= 2**63:
        raise ValueError(f"{digits[:24]} has more than 64 bits")
    return int(digits)


def _finite(digits: str) -> float:
    if (number := float(digits)) in (float("inf"), float("-inf")):
        raise ValueError(f"{digits[:24]} is too large")
    return number


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def http_protocol(limits: Limits) -> type[H11Protocol]:
    """Make uvicorn's protocol with a bound on connections, and on the time that a request's head may take."""

    class Impatient(H11Protocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > limits.max_connections:
                transport.abort()
            else:
                self.loop.call_later(limits.idle_s, self._look, None)

        def _look(self, before: object) -> None:
            """Close the connection if it waits for the head of the same request as at the last look."""
            if self.transport.is_closing():
                return
            if self.conn.their_state is h11.IDLE and self.cycle is before:
                self.transport.close()
            else:
                self.loop.call_later(limits.idle_s, self._look, self.cycle)

    return Impatient
