"""Plain data to dataclasses: one reader for recipes and for every other file of this project that a person writes.

pydantic checks types and the ranges in the annotations; its errors are told in this project's form: what, got, allowed, fix.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import types
from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Annotated, Any, Final, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt
from pydantic import TypeAdapter, ValidationError

from oldlogits.core.errors import ConfigError, reading
from oldlogits.core.registry import Registry

T = TypeVar("T")
Table = Mapping[str, object]

_BOUNDS: Final = frozenset({"greater_than", "greater_than_equal", "less_than", "less_than_equal"})
_LONGEST: Final = 200
"""Characters of a value that an error quotes."""
_KINDS: Final = {int: "a whole number", float: "a number", str: "a string", bool: "true or false", object: "anything"}


def build(kind: type[T], table: Table, unknown: Callable[[str, Table], ConfigError] | None = None) -> T:
    """Build a dataclass from nested tables.

    A whole number serves as a number; nothing else is converted: no text is read as a number, and true is not 1.

    Args:
        kind: A dataclass; its annotations hold types and ranges.
        table: The nested tables of a TOML or JSON file.
        unknown: Makes the error for an unknown key from its dotted name and its table; by default the nearest key is named.

    Raises:
        ConfigError: A key is unknown or missing, a value has another type or is out of range.
    """
    what, allowed = "the values cannot be read", "numbers, texts, and lists of them"
    try:
        with reading(ConfigError, what, got="a table", allowed=allowed, fix="correct it"):
            hashable: Any = kind
            text = json.dumps(table, default=str)
        made: T = _adapter(hashable).validate_json(text, strict=True, extra="forbid")
        return made
    except ValidationError as error:
        found = error.errors(include_url=False)
    strays = [one for one in found if one["type"] == "unexpected_keyword_argument"]
    for one in strays:
        key, value = ".".join(map(str, one["loc"])), one["input"]
        while isinstance(value, dict) and value:  # a whole section is unknown: name the first of its keys
            name, value = next(iter(value.items()))
            key += f".{name}"
        raise unknown(key, table) if unknown else stray(key, nearest_key(key, {name: name for name in fields_by_key(kind)}))
    if found[0]["type"] == "json_invalid":
        raise ConfigError(what, got=found[0]["msg"], allowed=allowed, fix="correct it")
    raise _refusal(kind, found[0]["type"], found[0]["loc"], found[0]["input"])


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def fields_by_key(kind: Any, prefix: str = "") -> dict[str, Any]:
    """The annotation of every dotted key under a dataclass."""
    found: dict[str, Any] = {}
    for name, hint in get_type_hints(kind, include_extras=True).items():
        found |= fields_by_key(hint, f"{prefix}{name}.") if dataclasses.is_dataclass(hint) else {prefix + name: hint}
    return found


def nearest_key(key: str, names: Mapping[str, str]) -> str:
    """The key that an unknown one was probably meant to be, of those that `names` stand for; empty: none resembles it."""
    tails = {name.rpartition(".")[2]: meant for name, meant in reversed(list(names.items()))}
    tail = key.rpartition(".")[2]
    if tail in tails:
        return tails[tail]
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.6)
    if near:
        return names[near[0]]
    return "".join(tails[found] for found in difflib.get_close_matches(tail, tails, n=1, cutoff=0.6))


def stray(key: str, near: str) -> ConfigError:
    """The error for an unknown key; `near` is what was probably meant, or empty."""
    return ConfigError(
        "unknown key in the recipe",
        got=key,
        allowed=f"the nearest known key is '{near}'" if near else "the keys of `oldlogits show recipe`",
        fix=f"did you mean {near}?" if near else "run `oldlogits show recipe` for all keys",
    )


def _refusal(kind: type, problem: str, where: tuple[int | str, ...], value: object) -> ConfigError:
    """One of pydantic's errors in this project's form."""
    lacks_item = problem == "missing" and isinstance(where[-1], int)  # of a list of fixed length
    key, hint = _located(kind, where[:-1] if lacks_item else where)
    if problem == "missing" and not lacks_item:
        section, _, name = key.rpartition(".")
        got = ", ".join(value) if isinstance(value, dict) else repr(value)
        what = f"{f'[{section}]' if section else 'the recipe'} lacks {name}"
        return ConfigError(what, got=got[:_LONGEST], allowed=f"{name} = ...", fix="add the key")
    if dataclasses.is_dataclass(hint) or get_origin(hint) is Mapping:
        return ConfigError(f"[{key}] is a table", got=_quoted(value), allowed=f"[{key}] with keys", fix=f"write [{key}]")
    allowed = allowed_values(hint)
    if problem in _BOUNDS:
        got = f"{key} = {_quoted(_as_number(value) if 'a number' in allowed else value)}"
        return ConfigError(f"{key} is out of range", got=got, allowed=allowed, fix=_example(kind, key, hint))
    if get_origin(hint) is Literal:
        return ConfigError(f"{key} has no such choice", got=_quoted(value), allowed=allowed, fix="choose one of these")
    return ConfigError(f"{key} takes {_type_in_words(hint)}", got=_quoted(value), allowed=allowed, fix="correct the value")


def _as_number(value: object) -> object:
    return float(value) if type(value) is int and abs(value) < 2**63 else value


def as_written(value: object) -> str:
    """A value as a recipe has it."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else repr(list(value) if isinstance(value, tuple) else value)


def _quoted(value: object) -> str:
    """A value for an error: Python does not write integers of thousands of digits."""
    try:
        text = repr(value)
    except (ValueError, RecursionError) as error:
        return f"a {type(value).__name__} that cannot be written: {error}"
    return text if len(text) <= _LONGEST else text[:_LONGEST] + " ..."


def _example(kind: type, key: str, hint: Any) -> str:
    """What a key may be set to: a whole number to the least that it may be, which other keys allow too; else its default."""
    bounds = {type(note): note for branch in branches(hint) for note in getattr(branch, "__metadata__", ())}
    if isinstance(least := bounds.get(Ge), Ge) and isinstance(least.ge, int) and "whole number" in allowed_values(hint):
        return f"{key} = {least.ge}, for example"
    try:
        return f"{key} = {attrgetter(key)(kind())}, for example"
    except (TypeError, AttributeError):
        return "choose a value within these bounds"


def _located(kind: type, where: tuple[int | str, ...]) -> tuple[str, Any]:
    """The dotted key that an error is about, and its annotation; what follows in `where` is a branch of a union."""
    key, hint = "", kind
    for part in where:
        if dataclasses.is_dataclass(hint):
            hint = get_type_hints(hint, include_extras=True)[str(part)]
            key += f".{part}" if key else str(part)
        elif get_origin(hint) is Mapping:
            hint, key = get_args(hint)[1], f"{key}.{part}"
        elif get_origin(hint) is tuple and isinstance(part, int) and (kinds := get_args(hint)):
            if kinds[-1] is not ... and part >= len(kinds):
                break
            hint, key = kinds[0 if kinds[-1] is ... else part], f"{key}[{part}]"
    return key, hint


def branches(hint: Any) -> tuple[Any, ...]:
    """The alternatives of an annotation: itself, unless it is a union."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def registry_of(hint: Any) -> Registry[Any] | None:
    """The registry whose names a key takes, where its annotation has one."""
    for branch in branches(hint):
        inner = get_args(branch)[0] if get_origin(branch) is tuple else branch
        for note in getattr(inner, "__metadata__", ()):
            if isinstance(note, Registry):
                return note
    return None


def allowed_values(hint: Any) -> str:
    """The values that an annotation allows, in words.

    Example:
        >>> allowed_values(Annotated[float, Gt(1)]), allowed_values(Literal["auto"] | Annotated[int, Ge(1)])
        ('a number > 1, or inf', 'auto, or a whole number >= 1')
    """
    registry = registry_of(hint)
    if registry is not None:
        names = [name for branch in branches(hint) if get_origin(branch) is Literal for name in get_args(branch)]
        many = "any of " if get_origin(hint) is tuple else ""
        return many + ", ".join([*names, *registry.names]) + ', or "package.module:Name"'
    return ", or ".join(_allowed(branch) for branch in branches(hint))


def _allowed(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return ", ".join(map(str, get_args(hint)))
    if get_origin(hint) is not Annotated:
        return _type_in_words(hint)
    kind, notes = hint.__origin__, hint.__metadata__
    names = next((note for note in notes if isinstance(note, tuple)), None)
    if names is not None:
        return ", ".join(names)
    bounds = {type(note): next(iter(dataclasses.asdict(note).values())) for note in notes}  # each has one field: its bound
    words, is_open = _type_in_words(kind), Gt in bounds
    low, high = bounds.get(Gt, bounds.get(Ge)), bounds.get(Lt, bounds.get(Le))
    if high not in (None, math.inf):
        if kind is int:
            return f"{words} from {low} to {high}"
        return f"{words} in {'(' if is_open else '['}{low:g}, {high:g}{')' if Lt in bounds else ']'}"
    return f"{words} {'>' if is_open else '>='} {low:g}" + (", or inf" if kind is float and high is None else "")


def _type_in_words(hint: Any) -> str:
    if get_origin(hint) is Annotated:
        return _type_in_words(hint.__origin__)
    if get_origin(hint) is Mapping:
        return "a table"
    if get_origin(hint) is tuple:
        kinds = get_args(hint)
        return "a list" + ("" if kinds[-1] is ... else f" of length {len(kinds)}")
    if len(branches(hint)) > 1:
        return ", or ".join(_allowed(b) if get_origin(b) is Literal else _type_in_words(b) for b in branches(hint))
    return _KINDS.get(hint, str(hint))
