"""Calls to one server over HTTP: address, token, proxy, time-outs. It knows no routes: these are its protocol's."""

from __future__ import annotations

import json
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp

from oldlogits.core.server import LOOPBACK, Json, Reply, ServerFailedError, Transport
from oldlogits.engines.shared_memory import share_text


class HttpClient(Transport):
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

    async def call(self, method: str, path: str, body: Json | bytes = None, *, timeout_s: float | None) -> Reply:
        """Call a route; see `Transport.call`."""
        route = path.partition("?")[0]
        if self._is_closed:
            raise ServerFailedError(f"{method} {path}: it was given up")
        headers = {"content-type": "application/json"} if body is not None else {}
        if self._token:
            headers["authorization"] = f"Bearer {self._token}"
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=10.0)
        try:
            asking = self._session.request(
                method, self.url + path, data=data, headers=headers, timeout=timeout, proxy=self._proxy
            )
            async with asking as answer:
                return Reply(path=route, status=answer.status, content=await answer.read())
        except AssertionError as error:  # a request that is about to connect when the session closes meets one of aiohttp's
            if not self._is_closed:
                raise
            raise ServerFailedError(f"{method} {route}: it was given up") from error
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            timed_out = isinstance(error, TimeoutError)
            how = f"no answer within {timeout_s:g} s" if timed_out and timeout_s else str(error) or type(error).__name__
            how = "it was given up" if self._is_closed else how
            raise ServerFailedError(f"{method} {route}: {how}", timed_out=timed_out) from error

    @property
    def _session(self) -> aiohttp.ClientSession:
        if self._opened is None:
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2.0)  # servers close idle connections after 5 s
            self._opened = aiohttp.ClientSession(connector=connector)
        return self._opened
