"""The tools of an environment class: their names and schemas, and the binding of an agent's calls to them.

A tool is a public method with a docstring; it may be a static or a class method. pydantic derives the JSON schema of each
parameter from its annotation, and checks and converts what the agent wrote. Nothing here raises on what an agent can write: a
call that does not fit becomes a `Malformed`, whose reason the agent is told.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Final, cast

from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError, PydanticUserError

from oldlogits.core.environment import Environment, JsonValue, Row
from oldlogits.core.errors import EnvironmentShapeError
from oldlogits.core.parser import Malformed, ToolCall
from oldlogits.envs.given_tools import bind_given, given_tools, named_arguments
from oldlogits.envs.text import readable, write_json

NO_TOOLS: Final = frozenset(
    {"reset", "get_reward", "reply", "explain_reward", "make_row", "make_oracle", "warm_start", "system_prompt"}
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
    if (given := given_tools(environment)) is not None:
        return tuple(given)
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
    for parameter in _signature(environment, tool):
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise EnvironmentShapeError(
                f"{environment.__name__}.{tool} takes any number of arguments",
                got=str(parameter),
                allowed="named parameters only: they are the tool's schema",
                fix="name each parameter",
            )
    _parameters(environment, tool)


def _signature(environment: type, tool: str) -> list[inspect.Parameter]:
    """Return the parameters of a tool, `self` or `cls` left out."""
    is_static = isinstance(inspect.getattr_static(environment, tool), staticmethod)
    return list(inspect.signature(tool_function(environment, tool)).parameters.values())[0 if is_static else 1 :]


@cache
def _parameters(environment: type, tool: str) -> Mapping[str, _Parameter]:
    """Return the parameters of a tool by name; one without an annotation takes text."""
    hints = _hints(environment, tool)
    found = {}
    for parameter in _signature(environment, tool):
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
    names = {parameter.name for parameter in _signature(environment, tool)}
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
    """Return the tools in the JSON form that chat templates take: one `{"type": "function", "function": {...}}` each."""
    if (given := given_tools(environment)) is not None:
        return [{"type": "function", "function": function} for function in given.values()]
    return [
        {
            "type": "function",
            "function": {
                "name": name,
                "description": inspect.getdoc(tool_function(environment, name)) or "",
                "parameters": {
                    "type": "object",
                    "properties": {key: p.adapter.json_schema() for key, p in _parameters(environment, name).items()},
                    "required": [key for key, p in _parameters(environment, name).items() if p.is_required],
                },
            },
        }
        for name in tool_names(environment)
    ]


def bind(environment: Environment, call: ToolCall) -> Callable[[], object] | Malformed:
    """Return the call, ready to run without arguments; it may return an awaitable. Arguments are checked and converted."""
    cls = type(environment)
    if call.name not in tool_names(cls):
        return Malformed(reason=f"error : no tool {call.name} ; tools are {' '.join(tool_names(cls))}")
    if given_tools(cls) is not None:
        return bind_given(environment, call)
    parameters = _parameters(cls, call.name)
    method = inspect.getattr_static(cls, call.name).__get__(environment, cls)
    try:
        bound = inspect.signature(method).bind(*call.positional, **call.named)
    except TypeError:
        takes, got = " ".join(parameters) or "nothing", " ".join([*call.positional, *call.named]) or "nothing"
        return Malformed(reason=f"error : {call.name} takes {takes} but got {got}")
    for key, value in bound.arguments.items():
        parameter = parameters[key]
        try:
            bound.arguments[key] = parameter.read_word(value) if call.positional else parameter.read(value)
        except ValidationError:
            wants = _name_of(parameter.hint)
            return Malformed(reason=f"error : {call.name} wants {key} as {wants} but got {write_json(value)}")
    return partial(method, *bound.args, **bound.kwargs)


def with_names(environment: type, call: ToolCall) -> ToolCall:
    """Return the same call with all of its arguments by name, as far as the tool has parameters for them."""
    if given_tools(environment) is not None:
        return ToolCall(name=call.name, named=named_arguments(environment, call))
    named = dict(zip(_parameters(environment, call.name), call.positional, strict=False))
    return ToolCall(name=call.name, named={**named, **call.named})


def _name_of(hint: object) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def render_result(value: object) -> str:
    """Return what the agent reads of a tool's return value: text as it is, JSON for dicts and lists, else `str`.

    Raises:
        TypeError: JSON cannot write it.
        ValueError: It contains itself.
    """
    return readable(write_json(value) if isinstance(value, dict | list | tuple) else str(value))
