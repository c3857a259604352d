"""TOML recipe + overrides -> a checked `RunConfig`. Imports no torch."""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import tyro

from oldlogits.config.check import check
from oldlogits.config.schema import RunConfig
from oldlogits.core.errors import ConfigError

T = TypeVar("T")
Table = Mapping[str, object]


def load_config(recipe: Path, overrides: Sequence[str] = (), *, needs_model: bool = True) -> RunConfig:
    """Read a recipe, apply ``--dotted.key value`` overrides, and check the result.

    Args:
        recipe: A TOML file.
        overrides: Words of a command line.
        needs_model: Whether the model folder must be there.

    Raises:
        ConfigError: The recipe does not exist, is no TOML, has unknown keys, wrong types or values out of range.
        ModelFolderError: The model folder is needed and incomplete.
    """
    config = override(config_from_table(read_toml(recipe)), overrides)
    check(config, needs_model=needs_model)
    return config


def read_toml(recipe: Path) -> Table:
    """The tables of a recipe.

    Raises:
        ConfigError: It does not exist, or is no TOML.
    """
    if not recipe.is_file():
        found = ", ".join(sorted(str(p) for p in Path("recipes").glob("*.toml"))) or "no recipes/ folder here"
        raise ConfigError("the recipe does not exist", got=str(recipe), allowed="a TOML file", fix=f"try one of: {found}")
    try:
        return tomllib.loads(recipe.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError("the recipe is no TOML", got=f"{recipe}: {error}", allowed="TOML", fix="correct that line") from error


def config_from_table(table: Table) -> RunConfig:
    """Build a `RunConfig` from nested tables: types checked, ranges not.

    Example:
        >>> config_from_table({"band": 2.0, "trainer": {"lr": 1e-3}}).trainer.lr
        0.001
    """
    return build(RunConfig, table)


def build(kind: type[T], table: Table) -> T:
    """Build a dataclass from nested tables: unknown keys are refused, types checked, ranges not.

    Args:
        kind: Its fields are scalars, choices, dataclasses, tuples of one kind or of fixed kinds, and mappings.
        table: As a TOML file holds it.

    Raises:
        ConfigError: A key is unknown or missing, or a value has another type.
    """
    return _build(kind, table, "", fields_by_key(kind))


def override(config: RunConfig, arguments: Sequence[str]) -> RunConfig:
    """Apply ``--dotted.key value`` overrides; tyro prints what is wrong with one and exits with status 2."""
    if not arguments:
        return config
    return tyro.cli(RunConfig, prog="oldlogits train RECIPE", args=list(arguments), default=config)


def known_keys() -> list[str]:
    """Every dotted key of a recipe."""
    return list(fields_by_key(RunConfig))


def fields_by_key(kind: type) -> dict[str, Any]:
    """The type of every dotted key under a dataclass."""
    keys: dict[str, Any] = {}

    def walk(kind: type, prefix: str) -> None:
        for name, hint in get_type_hints(kind).items():
            if dataclasses.is_dataclass(hint):
                walk(hint, f"{prefix}{name}.")  # type: ignore[arg-type]
            else:
                keys[prefix + name] = hint

    walk(kind, "")
    return keys


def _build(kind: type[T], table: Table, prefix: str, known: Mapping[str, object]) -> T:
    hints = get_type_hints(kind)
    values: dict[str, object] = {}
    for name, value in table.items():
        key = prefix + name
        if name not in hints:
            raise _unknown(key, known)
        values[name] = _typed(value, hints[name], key, known)
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    missing = [f.name for f in fields if f.name not in values and f.default is f.default_factory is dataclasses.MISSING]
    if missing:
        where = f"[{prefix.rstrip('.')}]" if prefix else "the recipe"
        raise ConfigError(
            f"{where} lacks {missing[0]}", got=", ".join(values), allowed=f"{missing[0]} = ...", fix="add the key"
        )
    return kind(**values)


def _typed(value: object, hint: Any, key: str, known: Mapping[str, object]) -> object:
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"[{key}] is a table", got=repr(value), allowed=f"[{key}] with keys", fix=f"write [{key}]")
        inside = {f"{key}.{name}": kind for name, kind in fields_by_key(hint).items()}  # type: ignore[arg-type]
        return _build(hint, value, key + ".", {**known, **inside})  # type: ignore[arg-type]
    if get_origin(hint) is tuple:
        return _tuple(value, get_args(hint), key, known)
    if get_origin(hint) is Mapping:
        if not isinstance(value, dict):
            raise ConfigError(f"[{key}] is a table", got=repr(value), allowed="{name = value, ...}", fix=f"write [{key}]")
        return {name: _typed(item, get_args(hint)[1], f"{key}.{name}", known) for name, item in value.items()}
    if isinstance(hint, UnionType):
        if isinstance(value, hint):
            return value
        raise ConfigError(f"{key} takes another type", got=repr(value), allowed=str(hint), fix="correct the value")
    if hint is object:
        return value
    if get_origin(hint) is not None:
        if value in get_args(hint):
            return value
        choices = ", ".join(map(str, get_args(hint)))
        raise ConfigError(f"{key} has no such choice", got=repr(value), allowed=choices, fix="choose one of these")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise ConfigError(f"{key} takes {_named(hint)}", got=repr(value), allowed=_named(hint), fix="correct the value")
    return value


def _tuple(value: object, hints: tuple[Any, ...], key: str, known: Mapping[str, object]) -> tuple[object, ...]:
    """A list of one kind (``tuple[T, ...]``), or of fixed kinds."""
    kinds = hints[:1] * len(value) if isinstance(value, list) and hints[-1] is ... else hints
    if not isinstance(value, list) or len(value) != len(kinds):
        size = "any length" if hints[-1] is ... else f"length {len(hints)}"
        raise ConfigError(f"{key} takes a list", got=repr(value), allowed=f"a list of {size}", fix="correct the value")
    return tuple(_typed(item, kind, f"{key}[{i}]", known) for i, (item, kind) in enumerate(zip(value, kinds, strict=True)))


def _named(hint: Any) -> str:
    return {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}[hint]


def _unknown(key: str, fields: Mapping[str, object]) -> ConfigError:
    tails = {name.rpartition(".")[2]: name for name in fields}
    near = difflib.get_close_matches(key, fields, n=1, cutoff=0.6)
    near = near or [tails[t] for t in difflib.get_close_matches(key.rpartition(".")[2], tails, n=1, cutoff=0.6)]
    return ConfigError(
        "unknown key in the recipe",
        got=key,
        allowed=f"the nearest known key is '{near[0]}'" if near else "the keys of `oldlogits show recipe`",
        fix=f"did you mean {near[0]}?" if near else "run `oldlogits show recipe` for all keys",
    )
