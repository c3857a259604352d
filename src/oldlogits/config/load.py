"""TOML recipe + overrides -> a checked `RunConfig`. Imports no torch."""

from __future__ import annotations

import dataclasses
import functools
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any, get_args, get_origin

import tyro

from oldlogits.config.check import check, resolve
from oldlogits.config.objective.presets import expanded
from oldlogits.config.reader import Table, build, fields_by_key, nearest_key, stray
from oldlogits.config.schema import RunConfig
from oldlogits.core.errors import ConfigError, reading


def load_config(recipe: Path, overrides: Sequence[str] = (), *, needs_model: bool = True) -> RunConfig:
    """Read a TOML recipe, apply ``--dotted.key value`` overrides, and check the result.

    Raises:
        ConfigError: The recipe does not exist, is no TOML, has unknown keys, wrong types or values out of range.
        ModelFolderError: The model folder is needed and incomplete.
    """
    table = expanded(read_toml(recipe), _preset_of(overrides))
    config = resolve(override(_read(table), overrides))
    check(config, needs_model=needs_model)
    return config


def shipped_recipes() -> Mapping[str, Path]:
    """The recipes that come with the package, by their bare name: of the wheel, or of the checkout that it runs from."""
    package = Path(__file__).parents[1]
    folders = (package / "recipes", package.parents[1] / "recipes")
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.toml"))}


def read_toml(recipe: Path) -> Table:
    """The tables of a recipe: of a file, or where there is no such file, of the one of that name that comes with the package.

    Raises:
        ConfigError: It does not exist, or is no TOML.
    """
    allowed = "a TOML file"
    with reading(ConfigError, "the recipe cannot be read", got=repr(str(recipe)), allowed=allowed, fix="name another one"):
        is_file = recipe.is_file()
    if not is_file and str(recipe) in shipped_recipes():
        recipe, is_file = shipped_recipes()[str(recipe)], True
    if not is_file:
        found = ", ".join([*sorted(str(path) for path in Path("recipes").glob("*.toml")), *sorted(shipped_recipes())])
        raise ConfigError("the recipe does not exist", got=str(recipe), allowed=allowed, fix=f"try one of: {found}")
    with reading(ConfigError, "the recipe is no TOML", got=str(recipe), allowed="TOML", fix="correct that line"):
        return tomllib.loads(recipe.read_text(encoding="utf-8"))


def config_from_table(table: Table) -> RunConfig:
    """Build a `RunConfig` from nested tables: types and ranges are checked, what depends on several keys is not.

    Example:
        >>> config_from_table({"variant": "decoupled_async", "band": 2}).proximal.source
        'arrival'
    """
    return resolve(_read(expanded(table)))


def override(config: RunConfig, arguments: Sequence[str]) -> RunConfig:
    """Apply ``--dotted.key value`` overrides; tyro prints what is wrong with one and exits with status 2.

    A list or a table is written as JSON: ``--env.command '["python", "agent.py", "--verbose"]'``. A list of texts none of
    which begins with a hyphen may be words: ``--record.trackers wandb tensorboard``. What is true or false is written as in a
    recipe.

    Raises:
        ConfigError: A key has another name now, or is that of another project; a list is no such JSON; a word is neither
            true nor false.
    """
    config, words = _with_lists(config, list(arguments))
    words = _with_flags(words)
    if not words:
        return config
    for word in words:
        key = word[2:].partition("=")[0].replace("-", "_").replace(".no_", ".")
        if word.startswith("--") and key not in known_keys() and (key in _names("renamed") or key in _names("elsewhere")):
            raise _unknown(key, {})
    return tyro.cli(RunConfig, prog="oldlogits train RECIPE", args=words, default=config)


def _with_lists(config: RunConfig, words: list[str]) -> tuple[RunConfig, list[str]]:
    """Apply the overrides of lists and tables that are JSON; returns the other words, too."""
    lists = {key: _is_json(hint) for key, hint in _hints().items() if get_origin(hint) in (tuple, Mapping)}
    for at, word in enumerate(words):
        flag, is_joined, value = word.partition("=")
        key = flag.removeprefix("--").replace("-", "_")
        value, num = (value, 1) if is_joined else (" ".join(words[at + 1 : at + 2]), 2)
        if not flag.startswith("--") or key not in lists or not (lists[key] or value.startswith("[")):
            continue
        is_table = get_origin(_hints()[key]) is Mapping
        example = '[{"name of a key": "value"}]' if lists[key] else '["one", "two"]'
        allowed, fix = f"a list of {'tables' if lists[key] else 'texts'} as JSON", f"--{key} '{example}'"
        if is_table:
            allowed, fix = "a table as JSON", f"--{key} '{{\"name of a key\": 1.5}}'"
        with reading(ConfigError, f"{key} cannot be read", got=repr(value[:200]), allowed=allowed, fix=fix):
            given = json.loads(value)
        section, _, name = key.partition(".")
        whole = asdict(config)
        whole[section] = {**whole[section], name: given}
        return _with_lists(build(RunConfig, whole, _unknown), [*words[:at], *words[at + num :]])
    return config, words


def _is_json(hint: Any) -> bool:
    """Whether a list or table can be written as JSON only: its items are tables, or it is one."""
    return get_origin(hint) is Mapping or dataclasses.is_dataclass(get_args(hint)[0])


def _preset_of(words: Sequence[str]) -> str:
    """The preset that the command line names; empty: none."""
    named = ""
    for at, word in enumerate(words):
        flag, is_joined, value = word.partition("=")
        if flag == "--objective.preset":
            named = value if is_joined else " ".join(words[at + 1 : at + 2])
    return named


def _with_flags(words: list[str]) -> list[str]:
    """Write ``--key true`` and ``--key false`` as the flags that tyro has for them, ``--key`` and ``--no-key``."""
    written, rest = [], list(words)
    while rest:
        flag, is_joined, value = rest.pop(0).partition("=")
        key = flag.removeprefix("--").replace("-", "_")
        if not flag.startswith("--") or _hints().get(key) is not bool:
            written.append(flag + is_joined + value)
            continue
        if not is_joined:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        if value.lower() not in ("true", "false"):
            raise ConfigError(f"{key} cannot be read", got=repr(value[:200]), allowed="true or false", fix=f"--{key} true")
        section, _, name = key.rpartition(".")
        written.append(f"--{section}.{'no_' * (value.lower() == 'false')}{name}")
    return written


@functools.cache
def known_keys() -> tuple[str, ...]:
    """Every dotted key of a recipe."""
    return tuple(_hints())


@functools.cache
def _hints() -> Mapping[str, object]:
    return fields_by_key(RunConfig)


def _read(table: Table) -> RunConfig:
    return build(RunConfig, table, _unknown)


@functools.cache
def _names(kind: str) -> Mapping[str, str]:
    """Other names of recipe keys: what they were called ("renamed"), and what other projects call them ("elsewhere")."""
    tables = tomllib.loads(resources.files(__package__).joinpath("other_names.toml").read_text(encoding="utf-8"))
    found: Mapping[str, str] = tables[kind]
    return found


def _unknown(key: str, table: Table) -> ConfigError:
    """The error for a key that is not known: by its new name, by what another project calls it, or by the nearest one."""
    renamed, elsewhere, tail = _names("renamed"), _names("elsewhere"), key.rpartition(".")[2]
    if key in renamed:
        return ConfigError(
            "the key has a new name", got=key, allowed=renamed[key], fix=f"write {renamed[key]} instead of {key}"
        )
    if tail in _names("absent"):
        return ConfigError("unknown key in the recipe", got=key, allowed=_names("absent")[tail], fix=f"remove {key}")
    keys = {name: name for name in known_keys()}
    return stray(key, elsewhere.get(tail, "") if tail in elsewhere else nearest_key(key, {**keys, **renamed, **elsewhere}))
