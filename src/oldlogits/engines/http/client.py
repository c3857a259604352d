"""Calls to one server over HTTP: address, token, proxy, time-outs. It knows no routes: these are its protocol's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp

from oldlogits.core.errors import ConfigError
from oldlogits.core.server import Json, Reply, ServerFailedError, SharedWeights
from oldlogits.engines.shared_memory import share_text

LOOPBACK: Final = frozenset({"127.0.0.1", "localhost", "::1"})
"""Hosts that need no token and no proxy."""
_REFUSALS: Final = (400, 401, 403, 404, 413, 422)
"""Answers that say that the request is wrong, not that the server is broken."""


class HttpClient:
    """A `Transport` to a server of this machine, or of one that has the same shared memory."""

    def __init__(self, url: str, *, token: str, control_timeout_s: float) -> None:
        self.url, self.control_timeout_s = url.rstrip("/"), control_timeout_s
        self._token = token
        parts = urlsplit(url)
        asks_proxy = parts.hostname not in LOOPBACK and not proxy_bypass(parts.hostname or "")  # it is for other machines
        self._proxy = getproxies().get(parts.scheme) if asks_proxy else None
        self._opened: aiohttp.ClientSession | None = None  # with the first call: a session belongs to a running loop
        self._is_closed = False

    def move_to(self, url: str, token: str) -> None:
        """Speak to another address from now on."""
        self.url, self._token = url.rstrip("/"), token

    async def close(self) -> None:
        """Leave no connection; what waits for an answer fails."""
        self._is_closed = True
        if self._opened is not None:
            await self._opened.close()

    async def share(self, text: str) -> Path:
        """Write a text to a file where the weights for this server will be."""
        return share_text(text)

    async def located(self, weights: SharedWeights) -> SharedWeights:
        """Return the weights as they are: they lie on this machine."""
        return weights

    async def call(self, method: str, path: str, body: Json = None, *, timeout_s: float | None) -> Reply:
        """Call a route; see `Transport.call`. A cancellation closes the connection, which ends the request there too."""
        route = path.partition("?")[0]
        if self._is_closed:
            raise ServerFailedError(f"{method} {path}: it was given up")
        headers = {"content-type": "application/json"} if body is not None else {}
        if self._token:
            headers["authorization"] = f"Bearer {self._token}"
        data = None if body is None else json.dumps(body).encode()
        timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=10.0)
        try:
            asking = self._session.request(
                method, self.url + path, data=data, headers=headers, timeout=timeout, proxy=self._proxy
            )
            async with asking as answer:
                return Reply(path=route, status=answer.status, content=await answer.read())
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            timed_out = isinstance(error, TimeoutError)
            how = f"no answer within {timeout_s:g} s" if timed_out and timeout_s else str(error) or type(error).__name__
            how = "it was given up" if self._is_closed else how
            raise ServerFailedError(f"{method} {route}: {how}", timed_out=timed_out) from error

    async def control(self, method: str, path: str, body: Json = None) -> Reply:
        """Call a route within the time of control calls; see `Transport.control`."""
        return self.accepted(await self.call(method, path, body, timeout_s=self.control_timeout_s))

    def accepted(self, reply: Reply) -> Reply:
        """Return an answer of status 200; see `Transport.accepted`."""
        got = f"{reply.path} answers {reply.status}: {reply.text[:300]}"
        if reply.status in _REFUSALS:
            raise self.refused(got, "a request that it serves", "correct what it names")
        if reply.status != 200:
            raise ServerFailedError(got)
        return reply

    def refused(self, got: str, allowed: str, fix: str) -> ConfigError:
        """Make the error that says why this server cannot be used."""
        return ConfigError(f"the server {self.url} cannot be used", got=got, allowed=allowed, fix=fix)

    @property
    def _session(self) -> aiohttp.ClientSession:
        if self._opened is None:
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2.0)  # servers close idle connections after 5 s
            self._opened = aiohttp.ClientSession(connector=connector)
        return self._opened
