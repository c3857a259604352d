"""The shape of an environment: a class whose public methods with docstrings are the agent's tools.

    class Desk:
        system_prompt = "..."                            # optional
        def reset(self, **row) -> str | None             # the first user message
        def get_reward(self) -> float
        def reply(self, message) -> str | None           # optional: the conversation partner; None ends the episode
        def make_row(split, index) -> dict               # optional, static: row `index` of "train" or "heldout"
        def any_other_public_method(self, order: str)    # a tool; it may be async

What the agent writes is read by a parser of `PARSERS`, and a `ToolCall` is made ready to run by `bind`. Neither raises
on what an agent can write: it is answered with the text of a `Malformed`.
"""

from __future__ import annotations

import importlib
import inspect
import json
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Final, Literal, Protocol, TypeAlias, Union, cast, get_args, get_origin

from oldlogits.core.errors import ConfigError, EnvironmentShapeError

JsonValue: TypeAlias = "bool | int | float | str | list[JsonValue] | dict[str, JsonValue] | None"
Row: TypeAlias = dict[str, JsonValue]
Split = Literal["train", "heldout"]

BUILT_IN: Final[Mapping[str, str]] = types.MappingProxyType(
    {
        "desk": "oldlogits.envs.desk:OrderDesk",
        "desk_long": "oldlogits.envs.desk_long:LongOrderDesk",
        "desk_slow": "oldlogits.envs.desk_slow:SlowOrderDesk",
    }
)
"""Short names that `env.target` accepts."""

NO_TOOLS: Final = frozenset({"reset", "get_reward", "reply", "make_row", "system_prompt"})
"""Public names that belong to the environment, not to the agent."""


class Environment(Protocol):
    """What every environment has. Its tools are its other public methods."""

    @property
    def reset(self) -> Callable[..., str | None]:
        """``reset(**row)`` starts an episode and returns the first user message, if there is one."""
        ...

    def get_reward(self) -> float:
        """The reward of the episode so far."""
        ...


class ConversingEnvironment(Environment, Protocol):
    """An environment with a conversation partner."""

    def reply(self, message: str) -> str | None:
        """The partner's answer to an agent's message; None ends the episode."""
        ...


class RowSource(Protocol):
    """An environment class that makes its own rows."""

    @staticmethod
    def make_row(split: Split, index: int) -> Row:
        """Row `index` of a split: JSON-able arguments of `reset`, the same for the same arguments."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A call that the agent wrote: arguments by position (text), or by name (JSON values)."""

    name: str
    positional: tuple[str, ...] = ()
    named: Mapping[str, JsonValue] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Malformed:
    """A call that cannot be run; `reason` is what the agent is told."""

    reason: str


Parsed = ToolCall | Malformed | None
"""None: a plain message to the conversation partner."""


def load_environment(target: str) -> type[Environment]:
    """The environment class that `env.target` names: one of `BUILT_IN`, or "package.module:Class".

    Raises:
        ConfigError: There is no such module or class.
        EnvironmentShapeError: The class does not have the shape of an environment.
    """
    path = BUILT_IN.get(target, target)
    module_name, colon, class_name = path.partition(":")
    allowed = f'{", ".join(map(repr, BUILT_IN))} or "package.module:Class"'
    if not (colon and module_name and class_name):
        raise ConfigError("env.target names no class", got=repr(target), allowed=allowed, fix='write "package.module:Class"')
    try:
        found: object = vars(importlib.import_module(module_name))[class_name]
    except (ImportError, KeyError) as error:
        raise ConfigError(
            "env.target cannot be loaded",
            got=f"{target!r}: {type(error).__name__}: {error}",
            allowed=allowed,
            fix="check the name, and that the package is installed or on PYTHONPATH",
        ) from error
    return check_environment(found)


def check_environment(found: object) -> type[Environment]:
    """`found` itself, if it has the shape of an environment.

    Raises:
        EnvironmentShapeError: It is no class, lacks `reset` or `get_reward`, has no tool, or a tool that has no docstring or
            takes ``*args``.
    """
    if not isinstance(found, type):
        raise EnvironmentShapeError(
            "an environment is a class", got=repr(found), allowed="a class", fix="name the class, not an instance"
        )
    for name in ("reset", "get_reward"):
        if not callable(inspect.getattr_static(found, name, None)):
            raise EnvironmentShapeError(
                f"{found.__name__} has no method {name}",
                got=f"public names {_public_names(found)}",
                allowed="reset(self, **row) -> str | None and get_reward(self) -> float",
                fix=f"define {name}",
            )
    for name in tool_names(found):
        if not inspect.getdoc(inspect.getattr_static(found, name)):
            raise EnvironmentShapeError(
                f"{found.__name__}.{name} is public but has no docstring",
                got="a method without docstring",
                allowed="a tool has a docstring: it is what the agent reads",
                fix=f"write one, or rename it to _{name}",
            )
        for parameter, _ in _parameters(found, name).values():
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                raise EnvironmentShapeError(
                    f"{found.__name__}.{name} takes any number of arguments",
                    got=str(parameter),
                    allowed="named parameters only: they are the tool's schema",
                    fix="name each parameter",
                )
    if not tool_names(found):
        raise EnvironmentShapeError(
            f"{found.__name__} has no tool",
            got=f"public names {_public_names(found)}",
            allowed="at least one further public method with a docstring",
            fix="add a tool",
        )
    return cast("type[Environment]", found)


def _public_names(environment: type) -> list[str]:
    return [name for name in dir(environment) if not name.startswith("_")]


@cache
def tool_names(environment: type) -> tuple[str, ...]:
    """The tools of an environment class, in the order in which they are written (inherited ones first)."""
    written = [name for cls in reversed(environment.__mro__) for name in vars(cls)]
    return tuple(
        name
        for name in dict.fromkeys(written)
        if not name.startswith("_") and name not in NO_TOOLS and inspect.isfunction(inspect.getattr_static(environment, name))
    )


@cache
def _parameters(environment: type, tool: str) -> Mapping[str, tuple[inspect.Parameter, object]]:
    """Parameter and resolved annotation by name, `self` left out."""
    function = inspect.getattr_static(environment, tool)
    hints = typing.get_type_hints(function)
    parameters = list(inspect.signature(function).parameters.values())[1:]
    return {parameter.name: (parameter, hints.get(parameter.name, str)) for parameter in parameters}


_JSON_TYPES: Final[Mapping[object, str]] = types.MappingProxyType(
    {str: "string", int: "integer", float: "number", bool: "boolean", list: "array", dict: "object", type(None): "null"}
)


def tool_schemas(environment: type) -> list[Row]:
    """The tools in the JSON form that chat templates take: one `{"type": "function", "function": {...}}` each."""
    return [
        {
            "type": "function",
            "function": {
                "name": name,
                "description": inspect.getdoc(inspect.getattr_static(environment, name)) or "",
                "parameters": {
                    "type": "object",
                    "properties": {key: _json_schema(hint) for key, (_, hint) in _parameters(environment, name).items()},
                    "required": [
                        key
                        for key, (parameter, _) in _parameters(environment, name).items()
                        if parameter.default is parameter.empty
                    ],
                },
            },
        }
        for name in tool_names(environment)
    ]


def _json_schema(hint: object) -> Row:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return {"type": _JSON_TYPES[type(args[0])], "enum": list(args)}
    if origin in (Union, types.UnionType):
        return {"anyOf": [_json_schema(arg) for arg in args]}
    schema: Row = {}
    if (name := _JSON_TYPES.get(origin or hint)) is not None:
        schema["type"] = name
    if origin is list:
        schema["items"] = _json_schema(args[0])
    return schema


def bind(environment: Environment, call: ToolCall) -> Callable[[], object] | Malformed:
    """The call, ready to run without arguments; it may return an awaitable. Arguments are checked, texts converted."""
    cls = type(environment)
    if call.name not in tool_names(cls):
        return Malformed(reason=f"error : no tool {call.name} ; tools are {' '.join(tool_names(cls))}")
    parameters = _parameters(cls, call.name)
    method = types.MethodType(inspect.getattr_static(cls, call.name), environment)
    try:
        bound = inspect.signature(method).bind(*call.positional, **call.named)
    except TypeError:
        takes, got = " ".join(parameters) or "nothing", " ".join([*call.positional, *call.named]) or "nothing"
        return Malformed(reason=f"error : {call.name} takes {takes} but got {got}")
    for key, value in bound.arguments.items():
        hint = parameters[key][1]
        converted = _from_text(value, hint) if call.positional else value
        if not _fits(converted, hint):
            return Malformed(reason=f"error : {call.name} wants {key} as {_name_of(hint)} but got {json.dumps(value)}")
        bound.arguments[key] = converted
    return partial(method, *bound.args, **bound.kwargs)


def _name_of(hint: object) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def _from_text(text: str, hint: object) -> JsonValue:
    """A word of a positional call as the annotated type, or the word itself."""
    if _fits(text, hint):
        return text
    try:
        value: JsonValue = json.loads(text)
    except ValueError:
        return text
    return value


def _fits(value: JsonValue, hint: object) -> bool:
    """Whether a JSON value has the annotated type; annotations outside JSON accept everything."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return value in args
    if origin in (Union, types.UnionType):
        return any(_fits(value, arg) for arg in args)
    if origin is list and isinstance(value, list):
        return all(_fits(item, args[0]) for item in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    plain = origin or hint
    return not (isinstance(plain, type) and plain in _JSON_TYPES) or isinstance(value, plain)


def render_result(value: object) -> str:
    """What the agent reads of a tool's return value: text as it is, JSON for dicts and lists, else `str`."""
    if isinstance(value, str):
        return value
    return json.dumps(value) if isinstance(value, dict | list | tuple) else str(value)


def parse_plain(text: str) -> Parsed:
    """Read ``<call> name word ... </call>``: a positional call, one argument a word.

    Example:
        >>> parse_plain("<call> cancel o17 </call>")
        ToolCall(name='cancel', positional=('o17',), named={})
    """
    words = text.split()
    if "<call>" not in words and "</call>" not in words:
        return None
    if words[0] != "<call>" or words[-1] != "</call>" or words.count("<call>") + words.count("</call>") != 2:
        return Malformed(reason="error : write one call as <call> tool argument </call>")
    if len(words) == 2:
        return Malformed(reason="error : the call names no tool")
    return ToolCall(name=words[1], positional=tuple(words[2:-1]))


def parse_hermes(text: str) -> Parsed:
    """Read ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``; text around it is ignored.

    Example:
        >>> parse_hermes('<tool_call>{"name": "cancel", "arguments": {"order": "o17"}}</tool_call>')
        ToolCall(name='cancel', positional=(), named={'order': 'o17'})
    """
    _, opened, rest = text.partition("<tool_call>")
    body, closed, after = rest.partition("</tool_call>")
    if not opened:
        return Malformed(reason="error : </tool_call> without <tool_call>") if "</tool_call>" in text else None
    if not closed:
        return Malformed(reason="error : <tool_call> is not closed")
    if "<tool_call>" in after:
        return Malformed(reason="error : one call at a time")
    try:
        call = json.loads(body)
    except ValueError as error:
        return Malformed(reason=f"error : the call is not JSON ; {error}")
    if not isinstance(call, dict) or not isinstance(call.get("name"), str) or not isinstance(call.get("arguments", {}), dict):
        return Malformed(reason='error : write {"name": tool, "arguments": {...}}')
    return ToolCall(name=call["name"], named=call.get("arguments", {}))


def write_hermes(environment: type, call: ToolCall) -> str:
    """A call as `parse_hermes` reads it, its arguments by their names.

    Example:
        >>> from oldlogits.envs.desk import OrderDesk
        >>> write_hermes(OrderDesk, ToolCall(name="cancel", positional=("o17",)))
        '<tool_call>{"name": "cancel", "arguments": {"order": "o17"}}</tool_call>'
    """
    arguments = {**dict(zip(_parameters(environment, call.name), call.positional, strict=False)), **call.named}
    return f"<tool_call>{json.dumps({'name': call.name, 'arguments': arguments})}</tool_call>"


Parser = Callable[[str], Parsed]
PARSERS: Final[Mapping[str, Parser]] = types.MappingProxyType({"plain": parse_plain, "hermes": parse_hermes})
"""How an assistant turn is read; `env.parser` names one."""
