"""Tools that an environment class describes by JSON schemas of its own, and carries out by one method.

    class Remote:
        tool_schemas = [{"type": "function", "function": {"name": ..., "description": ..., "parameters": {...}}}, ...]
        def call_tool(self, name, arguments): ...

What is called is checked for its name and the names of its arguments; the values are for `call_tool` to check.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol, cast

from oldlogits.core.environment import Environment, JsonValue, Row
from oldlogits.core.errors import EnvironmentShapeError
from oldlogits.core.parser import Malformed, ToolCall


class GivenTools(Environment, Protocol):
    """An environment whose class describes its tools."""

    tool_schemas: Sequence[Row]

    def call_tool(self, name: str, arguments: Row) -> object:
        """Carry out a call; it may be asynchronous."""


def given_tools(environment: type) -> Mapping[str, Row] | None:
    """Return what a class says of its tools, by their names; None where its public methods are its tools."""
    schemas = inspect.getattr_static(environment, "tool_schemas", None)
    if schemas is None:
        return None
    return {str(function["name"]): function for function in (cast(Row, schema["function"]) for schema in schemas)}


def check_given_tools(environment: type) -> None:
    """Refuse a class that describes tools by something else than schemas, or cannot carry out calls.

    Raises:
        EnvironmentShapeError: There is something else than a list of schemas, two tools of one name, or no `call_tool`.
    """
    schemas = inspect.getattr_static(environment, "tool_schemas", None)
    if schemas is None:
        return
    misfit = (
        next((repr(one)[:200] for one in schemas if not _is_schema(one)), "") if isinstance(schemas, list) else repr(schemas)
    )
    if not misfit and len({one["function"]["name"] for one in schemas}) < len(schemas):
        misfit = "two tools of one name"
    if not misfit and not callable(getattr(environment, "call_tool", None)):
        misfit = "no method call_tool"
    if misfit:
        raise EnvironmentShapeError(
            f"{environment.__name__} describes tools that cannot be called",
            got=misfit,
            allowed='[{"type": "function", "function": {"name", "description", "parameters": {"type": "object", ...}}}], call_tool',
            fix="correct tool_schemas, and define call_tool(self, name, arguments)",
        )


def bind_given(environment: Environment, call: ToolCall) -> Callable[[], object] | Malformed:
    """Return the call of a tool that its class describes, ready to run without arguments."""
    arguments = named_arguments(type(environment), call)
    parameters = _parameters(type(environment), call.name)
    properties = cast("Mapping[str, object]", parameters.get("properties", {}))
    missing = [key for key in cast("Sequence[str]", parameters.get("required", ())) if key not in arguments]
    unknown = [key for key in arguments if key not in properties and not parameters.get("additionalProperties")]
    if missing or unknown or len(call.positional) > len(properties):
        takes, got = " ".join(properties) or "nothing", " ".join([*call.positional, *call.named]) or "nothing"
        return Malformed(reason=f"error : {call.name} takes {takes} but got {got}")
    return partial(cast(GivenTools, environment).call_tool, call.name, arguments)


def named_arguments(environment: type, call: ToolCall) -> Row:
    """Return the arguments of a call by name; a word that is no JSON of the type that the schema says is text."""
    properties = cast("Mapping[str, JsonValue]", _parameters(environment, call.name).get("properties", {}))
    words = zip(properties, call.positional, strict=False)
    return {key: _value(properties[key], word) for key, word in words} | dict(call.named)


def _parameters(environment: type, tool: str) -> Mapping[str, JsonValue]:
    tools = given_tools(environment)
    assert tools is not None
    return cast("Mapping[str, JsonValue]", tools[tool].get("parameters") or {})


def _value(schema: JsonValue, word: str) -> JsonValue:
    if isinstance(schema, dict) and schema.get("type") == "string":
        return word
    try:
        return cast(JsonValue, json.loads(word))
    except ValueError:
        return word


def _is_schema(one: object) -> bool:
    function = one.get("function") if isinstance(one, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        return False
    parameters = function.get("parameters", {})
    return isinstance(parameters, dict) and parameters.get("type", "object") == "object"
