"""The tools of an environment class: their names and schemas, and the binding of an agent's calls to them.

A tool is a public method with a docstring; it may be a static or a class method. pydantic derives the JSON schema of each
parameter from its annotation, and checks and converts what the agent wrote. Nothing here raises on what an agent can write: a
call that does not fit becomes a `Malformed`, whose reason the agent is told.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, time, timedelta
from decimal import Decimal
from enum import Enum
from functools import cache, partial
from pathlib import PurePath
from typing import Final, cast
from uuid import UUID

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError, PydanticUserError
from pydantic_core import to_jsonable_python

from oldlogits.core.environment import Environment, JsonValue, Row
from oldlogits.core.errors import EnvironmentShapeError
from oldlogits.core.parser import Malformed, Parser, ToolCall
from oldlogits.envs.given import CALL_TOOL, bind_given, checked_schemas, gives_tools, names_of
from oldlogits.envs.text import readable, write_json

NO_TOOLS: Final = frozenset(
    {
        *("reset", "get_reward", "get_turn_reward", "get_group_rewards", "reply", "explain_reward"),
        *("make_row", "make_oracle", "warm_start", "system_prompt"),
    }
)
"""Public names that belong to the environment, not to the agent."""

_STATE: Final = frozenset({"save_state", "load_state"})
"""Two further ones, of a class that has both."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parameter:
    """A parameter of a tool: its annotation, what pydantic makes of that, and whether a call must give it."""

    hint: object
    adapter: TypeAdapter[object]
    is_required: bool

    def read(self, value: JsonValue) -> object:
        """Return a JSON value as the annotated type."""
        return self.adapter.validate_json(write_json(value), strict=True)

    def read_word(self, word: str) -> object:
        """Return a word of a positional call as the annotated type: as text where that fits, else as the JSON that it is."""
        try:
            return self.read(word)
        except ValidationError:
            return self.adapter.validate_json(word, strict=True)


def public_names(environment: type) -> list[str]:
    """Return the public names of a class."""
    return [name for name in dir(environment) if not name.startswith("_")]


@cache
def tool_names(environment: type) -> tuple[str, ...]:
    """Return the tools of an environment class, in the order in which they are written (inherited ones first)."""
    if gives_tools(environment):
        return names_of(tool_schemas(environment))
    written = [name for cls in reversed(environment.__mro__) for name in vars(cls)]
    own = NO_TOOLS | (_STATE if can_be_saved(environment) else frozenset())
    return tuple(
        name
        for name in dict.fromkeys(written)
        if not name.startswith("_") and name not in own and inspect.isfunction(tool_function(environment, name))
    )


def can_be_saved(environment: type) -> bool:
    """Return whether the environments of a class can be saved in mid-episode."""
    return all(callable(getattr(environment, name, None)) for name in _STATE)


def tool_function(environment: type, name: str) -> Callable[..., object]:
    """Return what is written under a name of the class; of static and class methods the function itself."""
    found = inspect.getattr_static(environment, name)
    return found.__func__ if isinstance(found, staticmethod | classmethod) else cast("Callable[..., object]", found)


def check_tool(environment: type, tool: str) -> None:
    """Refuse a tool that an agent could not call.

    Raises:
        EnvironmentShapeError: It has no docstring, takes ``*args``, or has a parameter that JSON cannot fill.
    """
    if not inspect.getdoc(tool_function(environment, tool)):
        raise EnvironmentShapeError(
            f"{environment.__name__}.{tool} is public but has no docstring",
            got="a method without docstring",
            allowed="a tool has a docstring: it is what the agent reads",
            fix=f"write one, or rename it to _{tool}",
        )
    for parameter in _signature(environment, tool).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise EnvironmentShapeError(
                f"{environment.__name__}.{tool} takes any number of arguments",
                got=str(parameter),
                allowed="named parameters only: they are the tool's schema",
                fix="name each parameter",
            )
    _parameters(environment, tool)


@cache
def _signature(environment: type, tool: str) -> inspect.Signature:
    """Return the signature of a tool, `self` or `cls` left out."""
    is_static = isinstance(inspect.getattr_static(environment, tool), staticmethod)
    parameters = list(inspect.signature(tool_function(environment, tool)).parameters.values())
    return inspect.Signature(parameters[0 if is_static else 1 :])


@cache
def _parameters(environment: type, tool: str) -> Mapping[str, _Parameter]:
    """Return the parameters of a tool by name; one without an annotation takes text."""
    hints = _hints(environment, tool)
    found = {}
    for parameter in _signature(environment, tool).parameters.values():
        hint = hints.get(parameter.name, str)
        try:
            adapter: TypeAdapter[object] = TypeAdapter(hint)
            adapter.json_schema()
        except (PydanticSchemaGenerationError, PydanticUserError) as error:
            raise EnvironmentShapeError(
                f"{environment.__name__}.{tool} has a parameter that JSON cannot fill",
                got=f"{parameter}: {str(error).splitlines()[0]}",
                allowed="types of JSON, Literal, unions, TypedDict, dataclasses, pydantic models",
                fix="annotate it with one of these",
            ) from error
        found[parameter.name] = _Parameter(hint=hint, adapter=adapter, is_required=parameter.default is inspect.Parameter.empty)
    return found


def _hints(environment: type, tool: str) -> Mapping[str, typing.Any]:
    """Return the annotations of a tool's parameters, those that are written as text evaluated."""
    function = inspect.unwrap(tool_function(environment, tool))
    names = _signature(environment, tool).parameters
    nested = {name: found for name, found in vars(environment).items() if isinstance(found, type)}
    written = {name: hint for name, hint in function.__annotations__.items() if name in names}
    try:
        return typing.get_type_hints(
            types.SimpleNamespace(__annotations__=written), function.__globals__, nested, include_extras=True
        )
    except Exception as error:  # an annotation is code of the user
        raise EnvironmentShapeError(
            f"{environment.__name__}.{tool} has an annotation that cannot be evaluated",
            got=f"{written}: {type(error).__name__}: {error}",
            allowed="names that exist when the module is imported, not only under TYPE_CHECKING",
            fix="import the name at run time",
        ) from error


def tool_schemas(environment: type) -> list[Row]:
    """Return the tools in the JSON form that chat templates take: one `{"type": "function", "function": {...}}` each.

    Where the environments describe their tools themselves, those that are the same in every episode.
    """
    if gives_tools(environment):
        written = inspect.getattr_static(environment, "tool_schemas")
        return checked_schemas(written, environment.__name__) if isinstance(written, list | tuple) else []
    return schemas_of(environment, tool_names(environment))


def schemas_of(environment: type, names: Sequence[str]) -> list[Row]:
    """Return methods of a class in the form of tools."""
    return [
        {
            "type": "function",
            "function": {
                "name": name,
                "description": inspect.getdoc(tool_function(environment, name)) or "",
                "parameters": {
                    "type": "object",
                    "properties": {key: inlined(p.adapter.json_schema()) for key, p in _parameters(environment, name).items()},
                    "required": [key for key, p in _parameters(environment, name).items() if p.is_required],
                },
            },
        }
        for name in names
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundCall:
    """A call that can be run: `run` takes no arguments, and may return an awaitable; `method` is what it calls."""

    name: str
    method: str
    run: Callable[[], object]


def calls_of(
    parser: Parser, environment: Environment, aloud: str, given: Sequence[Row] | None = None
) -> list[BoundCall | Malformed]:
    """Return the calls of a turn in their order, ready to run; none where it is a message, as every turn is without tools.

    Parsers may be the user's code, as types of tools. `given` are the schemas of an environment that
    describes its tools itself.
    """
    calls = parser.parse(aloud) if (tool_names(type(environment)) if given is None else given) else ()
    return [call if isinstance(call, Malformed) else _bound(environment, call, given) for call in calls]


def _bound(environment: Environment, call: ToolCall, given: Sequence[Row] | None) -> BoundCall | Malformed:
    made = bind(environment, call) if given is None else bind_given(environment, given, call)
    method = call.name if given is None else CALL_TOOL
    return made if isinstance(made, Malformed) else BoundCall(name=call.name, method=method, run=made)


def bind(environment: Environment, call: ToolCall) -> Callable[[], object] | Malformed:
    """Return the call, ready to run without arguments; it may return an awaitable. Arguments are checked and converted."""
    names = tool_names(type(environment))
    if call.name not in names:
        return Malformed(reason=f"error : no tool {call.name} ; tools are {' '.join(names)}")
    return bind_method(environment, call)


def bind_method(environment: object, call: ToolCall) -> Callable[[], object] | Malformed:
    """Return the call of a method, whether it is a tool or not."""
    cls: type = type(environment)
    parameters = _parameters(cls, call.name)
    method = inspect.getattr_static(cls, call.name).__get__(environment, cls)
    try:
        bound = _signature(cls, call.name).bind(*call.positional, **call.named, **call.texts)
    except TypeError:
        takes, got = " ".join(parameters) or "nothing", " ".join([*call.positional, *call.named, *call.texts]) or "nothing"
        return Malformed(reason=f"error : {call.name} takes {takes} but got {got}")
    for key, value in bound.arguments.items():
        parameter, is_text = parameters[key], bool(call.positional) or key in call.texts
        try:
            bound.arguments[key] = parameter.read_word(value) if is_text else parameter.read(value)
        except ValidationError:
            wants = _name_of(parameter.hint)
            return Malformed(reason=f"error : {call.name} wants {key} as {wants} but got {write_json(value)}")
    return partial(method, *bound.args, **bound.kwargs)


def with_names(environment: type, call: ToolCall) -> ToolCall:
    """Return the same call with all of its arguments by name, as far as the tool has parameters for them."""
    named = dict(zip(_parameters(environment, call.name), call.positional, strict=False))
    return ToolCall(name=call.name, named={**named, **call.named}, texts=call.texts)


def _name_of(hint: object) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def inlined(schema: Mapping[str, object]) -> Row:
    """Return a JSON schema without references, which chat templates do not follow; what refers to itself is an object there.

    Example:
        >>> inlined({"$defs": {"P": {"type": "object"}}, "items": {"$ref": "#/$defs/P"}})
        {'items': {'type': 'object'}}
    """
    defs = cast("Mapping[str, object]", schema.get("$defs", {}))

    def inline(part: object, within: tuple[str, ...]) -> JsonValue:
        if isinstance(part, list):
            return [inline(one, within) for one in part]
        if not isinstance(part, dict):
            return cast(JsonValue, part)
        others = {key: inline(value, within) for key, value in part.items() if key not in ("$defs", "$ref", "discriminator")}
        if not isinstance(reference := part.get("$ref"), str):
            return others
        name = reference.removeprefix("#/$defs/")
        meant = {"type": "object"} if name in within or name not in defs else inline(defs[name], (*within, name))
        return {**cast(Row, meant), **others}

    return cast(Row, inline(dict(schema), ()))


def render_result(value: object) -> str:
    """Return what the agent reads of a tool's result: text as it is; JSON for dicts, lists, models and dataclasses; else `str`.

    Raises:
        TypeError: JSON cannot write it.
        ValueError: It contains itself.
    """
    is_structured = isinstance(value, dict | list | tuple | BaseModel) or _is_dataclass(value)
    return readable(json.dumps(value, ensure_ascii=False, default=_jsonable) if is_structured else str(value))


def _is_dataclass(value: object) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _jsonable(value: object) -> object:
    """What JSON writes of a value that it does not know, one level deep."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if _is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(cast("typing.Any", value))}
    if isinstance(value, date | time | timedelta | Decimal | Enum | PurePath | UUID):
        return to_jsonable_python(value)
    raise TypeError(f"a result of {type(value).__name__} is nothing that JSON can write")
