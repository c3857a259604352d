"""TOML recipe + overrides -> a checked `RunConfig`. Imports no torch."""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import tyro

from oldlogits.config.check import check
from oldlogits.config.schema import RunConfig
from oldlogits.core.errors import ConfigError

T = TypeVar("T")
Table = Mapping[str, object]


def load_config(recipe: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a recipe, apply ``--dotted.key value`` overrides, and check the result.

    Raises:
        ConfigError: The recipe does not exist, is no TOML, has unknown keys, wrong types or values out of range.
    """
    if not recipe.is_file():
        found = ", ".join(sorted(str(p) for p in Path("recipes").glob("*.toml"))) or "no recipes/ folder here"
        raise ConfigError("the recipe does not exist", got=str(recipe), allowed="a TOML file", fix=f"try one of: {found}")
    try:
        table = tomllib.loads(recipe.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError("the recipe is no TOML", got=f"{recipe}: {error}", allowed="TOML", fix="correct that line") from error
    config = override(config_from_table(table), overrides)
    check(config)
    return config


def config_from_table(table: Table) -> RunConfig:
    """Build a `RunConfig` from nested tables: types checked, ranges not.

    Example:
        >>> config_from_table({"band": 2.0, "trainer": {"lr": 1e-3}}).trainer.lr
        0.001
    """
    return _build(RunConfig, table, "")


def override(config: RunConfig, arguments: Sequence[str]) -> RunConfig:
    """Apply ``--dotted.key value`` overrides; tyro prints what is wrong with one and exits with status 2."""
    if not arguments:
        return config
    return tyro.cli(RunConfig, prog="oldlogits train RECIPE", args=list(arguments), default=config)


def known_keys() -> list[str]:
    """Every dotted key of a recipe."""
    return list(_fields_by_key())


def _fields_by_key() -> dict[str, Any]:
    keys: dict[str, Any] = {}

    def walk(kind: type, prefix: str) -> None:
        for name, hint in get_type_hints(kind).items():
            if dataclasses.is_dataclass(hint):
                walk(hint, f"{prefix}{name}.")  # type: ignore[arg-type]
            else:
                keys[prefix + name] = hint

    walk(RunConfig, "")
    return keys


def _build(kind: type[T], table: Table, prefix: str) -> T:
    hints = get_type_hints(kind)
    values: dict[str, object] = {}
    for name, value in table.items():
        key = prefix + name
        if name not in hints:
            raise _unknown(key, _fields_by_key())
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, Mapping):
                raise ConfigError(f"[{key}] is a table", got=repr(value), allowed=f"[{key}] with keys", fix=f"write [{key}]")
            values[name] = _build(hint, value, key + ".")  # type: ignore[arg-type]
        else:
            values[name] = _typed(value, hint, key)
    return kind(**values)


def _typed(value: object, hint: Any, key: str) -> object:
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
