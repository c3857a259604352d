"""The tools of MCP servers as an environment: one session with each server an episode, and a reward function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final, cast

from pydantic import TypeAdapter

from oldlogits.core.environment import Environment, JsonValue, McpServer, Row
from oldlogits.core.errors import ConfigError, EnvironmentShapeError, McpServerError
from oldlogits.core.registry import require

if TYPE_CHECKING:
    from oldlogits.envs.mcp.session import Sessions

START_S: Final = 60.0
"""Seconds in which a server must say which tools it has, when a run starts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A call that the model made, and what it read."""

    name: str
    arguments: Row
    answer: str
    is_error: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Offer:
    """What a server offers: schemas of the tools for the model, the names of all of its tools, its instructions."""

    server: McpServer
    schemas: Sequence[Row]
    names: frozenset[str]
    instructions: str


class McpEpisode:
    """An episode with MCP servers; the adapter makes a subclass for the servers of a recipe.

    A function of `env.reward` is given it as `environment`, after the last turn: `calls`, `said`, and `ask`.
    """

    tool_schemas: ClassVar[list[Row]]
    system_prompt: ClassVar[str]
    _places: ClassVar[Mapping[str, int]]
    _sessions: ClassVar[Sequence[Sessions]]
    _reset_tools: ClassVar[Sequence[str]]

    async def reset(self, *, prompt: str = "", **row: JsonValue) -> str:
        """Open the sessions; the first message is the row's prompt, or what the servers' reset tools answer."""
        self.calls: list[Call] = []
        self.said: list[str] = []
        self._open = [await sessions.take() for sessions in self._sessions]
        told = [await self.ask(name, row) for name in self._reset_tools]
        return prompt or "\n".join(told)

    async def call_tool(self, name: str, arguments: Row) -> str:
        """Call a tool of a server; an error that it answers is an answer."""
        answer = await self._open[self._places[name]].call(name, arguments)
        text = f"error : {answer.text}" if answer.is_error else answer.text
        self.calls.append(Call(name=name, arguments=arguments, answer=text, is_error=answer.is_error))
        return text

    def reply(self, message: str) -> None:
        """Take note of a message, which ends the episode."""
        self.said.append(message)

    async def ask(self, name: str, arguments: Row) -> str:
        """Call any tool of the servers, those included that the model is not offered; return the text of the answer.

        Raises:
            LookupError: No server has it.
            McpServerError: The server answers an error.
        """
        if name not in self._places:
            raise LookupError(f"no server has a tool {name}; tools are {', '.join(self._places)}")
        answer = await self._open[self._places[name]].call(name, arguments)
        if answer.is_error:
            raise McpServerError(
                f"an MCP server refused {name}",
                got=answer.text,
                allowed="an answer",
                fix="look whether the row fits the server",
            )
        return answer.text


def adapt(target: str) -> type[Environment]:
    """Make the environment class of the servers that a recipe names: the adapter "mcp".

    Each server is asked once for its tools.

    Raises:
        ConfigError: A server is named by neither command nor url, or lacks a tool.
        EnvironmentShapeError: Two tools have the same name.
        McpServerError: A server cannot be used.
    """
    require("mcp", "mcp", what="env.mcp")
    from oldlogits.envs.mcp.session import Sessions

    servers = TypeAdapter(tuple[McpServer, ...]).validate_json(target)
    offers = [_offer(server) for server in servers]
    names = [name for offer in offers for name in offer.names]
    if len(set(names)) < len(names):
        double = sorted({name for name in names if names.count(name) > 1})
        raise EnvironmentShapeError(
            "two MCP servers have a tool of the same name",
            got=", ".join(double),
            allowed="tools of different names",
            fix="rename the tool in one of the servers",
        )
    body = {
        "__doc__": "The tools of " + ", ".join(" ".join(server.command) or server.url for server in servers),
        "tool_schemas": [schema for offer in offers for schema in offer.schemas],
        "system_prompt": "\n\n".join(offer.instructions for offer in offers if offer.instructions),
        "_places": {name: place for place, offer in enumerate(offers) for name in offer.names},
        "_sessions": [Sessions(offer.server) for offer in offers],
        "_reset_tools": [offer.server.reset_tool for offer in offers if offer.server.reset_tool],
    }
    return cast("type[Environment]", type("McpTools", (McpEpisode,), body))


def _offer(server: McpServer) -> _Offer:
    if bool(server.command) == bool(server.url):
        raise ConfigError(
            "an MCP server is a command or an address",
            got=f"command = {list(server.command)}, url = '{server.url}'",
            allowed='{command = ["python", "server.py"]} or {url = "http://127.0.0.1:8000/mcp"}',
            fix="give one of the two",
        )
    from oldlogits.envs.mcp.session import Session

    session = Session(server)
    try:
        schemas, instructions = session.offered(START_S)
    except TimeoutError:
        raise McpServerError(
            "an MCP server does not say which tools it has",
            got=f"no answer for {START_S:g} s: {' '.join(server.command) or server.url}",
            allowed="a list of tools",
            fix="start it by hand and look at what it writes",
        ) from None
    finally:
        session.close()
    names = [str(cast(Row, schema["function"])["name"]) for schema in schemas]
    if lacking := [name for name in (*server.tools, server.reset_tool) if name and name not in names]:
        raise ConfigError(
            "an MCP server lacks a tool", got=lacking[0], allowed=", ".join(names), fix="correct env.mcp: tools, reset_tool"
        )
    offered = set(server.tools or names) - {server.reset_tool}
    chosen = [schema for schema, name in zip(schemas, names, strict=True) if name in offered]
    return _Offer(server=server, schemas=chosen, names=frozenset(names), instructions=instructions)
