"""Sessions with MCP servers, on an event loop of their own; the one file that imports the package mcp.

    environment --call--> Session --(the loop)--> _Owner, one task that opens and closes --> server

A session is entered and left in one task, as the cancel scopes under it ask for; calls come from anywhere.
"""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
import threading
import weakref
from collections import deque
from collections.abc import AsyncIterator, Coroutine
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache
from typing import IO, Any, Final, TextIO, TypeVar, cast

import httpx2
from mcp import ClientSession, MCPError, StdioServerParameters, stdio_client
from mcp.client.streamable_http import streamable_http_client
from mcp.types import INVALID_PARAMS, METHOD_NOT_FOUND, CallToolResult, ContentBlock, PaginatedRequestParams

from oldlogits.core.environment import McpServer, Row
from oldlogits.core.errors import McpServerError

T = TypeVar("T")

_ANSWERS: Final = (INVALID_PARAMS, METHOD_NOT_FOUND)
"""Errors by which a server answers a call that does not fit, with or without a result."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a server answers to a call, as a model reads it; an error is an answer, too."""

    text: str
    is_error: bool


@cache
def _loop(process: int) -> asyncio.AbstractEventLoop:
    """The event loop of all sessions of a process, in a thread that does not keep the process from ending."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="oldlogits-mcp", daemon=True).start()
    return loop


def _start(work: Coroutine[Any, Any, T]) -> Future[T]:
    return asyncio.run_coroutine_threadsafe(work, _loop(os.getpid()))


class Session:
    """A session with a server; it is closed by `close`, or when nobody holds it any more."""

    def __init__(self, server: McpServer) -> None:
        self._owner = _Owner(server)
        self.close: Final = weakref.finalize(self, self._owner.close)

    def offered(self, timeout_s: float) -> tuple[list[Row], str]:
        """Return the schemas of the server's tools, and the instructions that it gives to models.

        Raises:
            McpServerError: The server cannot be started or reached, ended, or talks another protocol.
            TimeoutError: It takes longer.
        """
        return _start(self._owner.offered()).result(timeout_s)

    async def call(self, name: str, arguments: Row) -> Answer:
        """Call a tool.

        Raises:
            McpServerError: The server cannot be started or reached, ended, or answers what the protocol has no place for.
        """
        return await asyncio.wrap_future(_start(self._owner.call(name, arguments)))

    async def answers(self) -> bool:
        """Whether the server can be used and still answers, once it has started; nothing of the session changes."""
        try:
            await asyncio.wrap_future(_start(self._owner.offered()))
        except McpServerError:
            return False
        return True


class Sessions:
    """Opens sessions with a server; some of them ahead, where its start takes time."""

    def __init__(self, server: McpServer) -> None:
        self._server, self._spare, self._lock = server, deque[Session](), threading.Lock()

    async def take(self) -> Session:
        """Return a session that nobody else has or had: one opened ahead if its server still answers, else a new one."""
        for _ in range(self._server.spare):
            if (ahead := self._next()) is None:
                break
            if await ahead.answers():
                return ahead
        return Session(self._server)

    def _next(self) -> Session | None:
        with self._lock:
            ahead = self._spare.popleft() if self._spare else None
            while len(self._spare) < self._server.spare:
                self._spare.append(Session(self._server))
        return ahead


class _Owner:
    """The task that a session is opened and closed in."""

    def __init__(self, server: McpServer) -> None:
        self._server = server
        self._opened: Future[tuple[ClientSession, str]] = Future()
        self._log: IO[str] | None = None  # what the server writes to its standard error
        self._task = _start(self._own())

    def close(self) -> None:
        """End the task, whatever it waits for; it ends the server that it started."""
        self._task.cancel()

    async def _own(self) -> None:
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as self._log:
            try:
                async with self._session() as session:
                    initialized = await session.initialize()
                    self._opened.set_result((session, initialized.instructions or ""))
                    await asyncio.Event().wait()  # until the session is closed
            except BaseException as error:
                if not self._opened.done():
                    self._opened.set_exception(self._failed("cannot be used", error))

    @asynccontextmanager
    async def _session(self) -> AsyncIterator[ClientSession]:
        if self._server.command:
            command, *args = self._server.command
            parameters = StdioServerParameters(
                command=command, args=args, env=dict(self._server.env), cwd=self._server.cwd or None
            )
            transport = stdio_client(parameters, errlog=cast("TextIO", self._log))
            async with transport as streams, ClientSession(*streams) as session:
                yield session
        else:
            timeout = httpx2.Timeout(30, read=None)  # env.timeout_s is the limit of a call
            async with (
                httpx2.AsyncClient(headers=dict(self._server.headers), timeout=timeout, follow_redirects=True) as client,
                streamable_http_client(self._server.url, http_client=client) as streams,
                ClientSession(*streams) as session,
            ):
                yield session

    async def offered(self) -> tuple[list[Row], str]:
        session, instructions = await asyncio.shield(asyncio.wrap_future(self._opened))
        schemas: list[Row] = []
        cursor = None
        try:
            while True:
                page = await session.list_tools(params=PaginatedRequestParams(cursor=cursor))
                for tool in page.tools:
                    function: Row = {"name": tool.name, "description": tool.description or "", "parameters": tool.input_schema}
                    schemas.append({"type": "function", "function": function})
                if (cursor := page.next_cursor) is None:
                    return schemas, instructions
        except Exception as error:  # of the library, of any kind: the transport's, the protocol's, pydantic's
            raise self._failed("lists no tools", error) from error

    async def call(self, name: str, arguments: Row) -> Answer:
        session, _ = await asyncio.shield(asyncio.wrap_future(self._opened))
        try:
            result = await session.call_tool(name, dict(arguments))
        except MCPError as error:
            if error.code in _ANSWERS:
                return Answer(text=error.message, is_error=True)
            raise self._failed(f"did not answer {name}", error) from error
        except Exception as error:  # of the library, of any kind
            raise self._failed(f"did not answer {name}", error) from error
        return Answer(text=_text_of(result), is_error=result.is_error)

    def _failed(self, what: str, error: BaseException) -> McpServerError:
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        server = " ".join(self._server.command) or self._server.url
        said = _last_line(self._log)
        return McpServerError(
            f"an MCP server {what}",
            got=f"{server}: {type(error).__name__}: {error}" + (f"; it wrote: {said}" if said else ""),
            allowed="a server that answers until the episode has ended",
            fix="start it by hand and look at what it writes",
        )


def _last_line(log: IO[str] | None) -> str:
    if log is None or log.closed:
        return ""
    log.seek(0)
    lines = log.read().strip().splitlines()
    return lines[-1][:300] if lines else ""


def _text_of(result: CallToolResult) -> str:
    """What a model reads of a result: its texts; where it has none, the JSON that it has."""
    texts = [_text_of_block(block) for block in result.content]
    if not texts and result.structured_content is not None:
        return json.dumps(result.structured_content, ensure_ascii=False)
    return "\n".join(texts)


def _text_of_block(block: ContentBlock) -> str:
    if block.type == "text":
        return str(block.text)
    if block.type == "resource":
        return str(getattr(block.resource, "text", f"[{block.resource.uri}]"))
    if block.type == "resource_link":
        return f"[{block.uri}]"
    return f"[{block.mime_type}]"
