"""Tools that an environment describes itself, by JSON schemas, and carries out by one method: servers' tools, tools of a row.

A class with `tool_schemas` and `call_tool(name, arguments)` is one. Nothing here raises on what an agent can write.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Final, Protocol, cast

from oldlogits.core.environment import JsonValue, Row
from oldlogits.core.errors import EnvironmentShapeError
from oldlogits.core.parser import Malformed, ToolCall
from oldlogits.envs.text import read_json, write_json

CALL_TOOL: Final = "call_tool"
REMOTE_TOOLS: Final = "_oldlogits_tool_schemas"
"""The method of an environment that lives elsewhere which returns the schemas that it has there."""


class GivingEnvironment(Protocol):
    """An environment that describes its tools itself."""

    tool_schemas: Sequence[Row]

    def call_tool(self, name: str, arguments: Row) -> object:
        """Carry out a call; it may return an awaitable."""


def gives_tools(environment: type) -> bool:
    """Return whether the environments of a class describe their tools themselves."""
    return hasattr(environment, "tool_schemas") and callable(getattr(environment, CALL_TOOL, None))


def schemas_now(environment: object) -> Sequence[Row]:
    """Return what an environment says of its tools in this episode, unchecked."""
    return cast(GivingEnvironment, environment).tool_schemas


def schemas_to_ask(environment: object) -> Callable[[], object]:
    """Return how to ask for the schemas of one episode."""
    remote = getattr(environment, REMOTE_TOOLS, None)
    return cast("Callable[[], object]", remote) if callable(remote) else partial(schemas_now, environment)


def checked_schemas(written: object, owner: str) -> list[Row]:
    """Return schemas in the form that chat templates take: one ``{"type": "function", "function": {...}}`` each.

    Raises:
        EnvironmentShapeError: One is no function with a name, or two have the same name.
    """
    schemas: list[Row] = []
    for one in written if isinstance(written, list | tuple) else [written]:
        function = one.get("function", one) if isinstance(one, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise _misshapen(owner, repr(one))
        parameters = function.get("parameters") or {"type": "object", "properties": {}}
        schemas.append({"type": "function", "function": {"description": "", **function, "parameters": parameters}})
    names = names_of(schemas)
    if len(set(names)) < len(names) or not _is_json(schemas):
        raise _misshapen(owner, f"tools {' '.join(names)}")
    return schemas


def names_of(schemas: Sequence[Row]) -> tuple[str, ...]:
    """Return the names of the tools that are described."""
    return tuple(str(_function(schema)["name"]) for schema in schemas)


def bind_given(environment: object, schemas: Sequence[Row], call: ToolCall) -> Callable[[], object] | Malformed:
    """Return the call of a tool that is described, ready to run without arguments; it may return an awaitable."""
    described = {name: _function(schema) for name, schema in zip(names_of(schemas), schemas, strict=True)}
    if call.name not in described:
        return Malformed(reason=f"error : no tool {call.name} ; tools are {' '.join(described)}")
    arguments = arguments_of(call, cast(Row, described[call.name]["parameters"]))
    if isinstance(arguments, Malformed):
        return arguments
    return partial(cast(GivingEnvironment, environment).call_tool, call.name, arguments)


def arguments_of(call: ToolCall, parameters: Row) -> Row | Malformed:
    """Return the arguments of a call by name, as JSON values; words become the type that the schema of the tool names."""
    properties = cast("dict[str, JsonValue]", parameters.get("properties") or {})
    required = cast("list[str]", parameters.get("required") or [])
    given = named_arguments(call, parameters)
    is_closed = parameters.get("additionalProperties", False) is False
    unknown = is_closed and not given.keys() <= properties.keys()
    if unknown or len(given) < len(call.positional) + len(call.texts) + len(call.named) or not given.keys() >= set(required):
        takes, got = " ".join(properties) or "nothing", " ".join([*call.positional, *call.named, *call.texts]) or "nothing"
        return Malformed(reason=f"error : {call.name} takes {takes} but got {got}")
    return given


def named_arguments(call: ToolCall, parameters: Row) -> Row:
    """Return the arguments of a call by name, unchecked; words become the type that the schema of the tool names."""
    properties = cast("dict[str, JsonValue]", parameters.get("properties") or {})
    words = {**dict(zip(properties, call.positional, strict=False)), **call.texts}
    return {**{name: _read_word(word, properties.get(name)) for name, word in words.items()}, **call.named}


def _read_word(word: str, schema: JsonValue) -> JsonValue:
    if _takes_text(schema):
        return word
    try:
        return read_json(word)
    except ValueError:
        return word


def _takes_text(schema: JsonValue) -> bool:
    """Whether a text fits a schema, as far as its types say."""
    if not isinstance(schema, dict):
        return True
    options = schema.get("anyOf") or schema.get("oneOf")
    if isinstance(options, list):
        return any(_takes_text(one) for one in options)
    types = schema.get("type", "string")
    return "string" in (types if isinstance(types, list) else [types])


def _function(schema: Row) -> Mapping[str, JsonValue]:
    return cast("dict[str, JsonValue]", schema["function"])


def _is_json(schemas: Sequence[Row]) -> bool:
    try:
        read_json(write_json(list(schemas)))
    except (TypeError, ValueError):
        return False
    return True


def _misshapen(owner: str, got: str) -> EnvironmentShapeError:
    return EnvironmentShapeError(
        f"{owner}.tool_schemas does not describe tools",
        got=f"{got:.300}",
        allowed='a list of {"name": ..., "description": ..., "parameters": JSON SCHEMA}, each name once, as JSON can write it',
        fix="describe each tool so",
    )
