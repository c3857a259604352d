"""Other projects' objectives as recipe keys: ``objective.preset``. The table itself is data, presets.toml. Imports no torch."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from types import MappingProxyType
from typing import Final

from oldlogits.core.errors import ConfigError

Table = Mapping[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """Another project's objective.

    Args:
        source: What it is called there.
        keys: The keys that it stands for, by dotted name.
        leaves_out: What of it has no key here; empty: nothing of the loss.
    """

    source: str
    keys: Mapping[str, object]
    leaves_out: str = ""


def _read() -> Mapping[str, Preset]:
    tables = tomllib.loads(resources.files(__package__).joinpath("presets.toml").read_text(encoding="utf-8"))
    return MappingProxyType({name: _preset(table) for name, table in tables.items()})


def _preset(table: Mapping[str, object]) -> Preset:
    keys = {key: value for key, value in table.items() if key not in ("source", "leaves_out")}
    return Preset(source=str(table["source"]), keys=keys, leaves_out=str(table.get("leaves_out", "")))


PRESETS: Final = _read()
"""Every preset by its name, "project:name"."""


def find_preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        ConfigError: There is none.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.4)
        fix = f"did you mean '{near[0]}'?" if near else "run `oldlogits show presets`"
        raise ConfigError("unknown preset", got=f"objective.preset = {name!r}", allowed=", ".join(PRESETS), fix=fix)
    return PRESETS[name]


def expanded(recipe: Table, preset: str = "") -> Table:
    """Put the keys of a recipe's preset under its own, which keep their values.

    Args:
        recipe: The tables of a recipe.
        preset: The preset that the command line names, whose keys take the place of the recipe's; empty: the recipe's own.

    Raises:
        ConfigError: There is no such preset.

    Example:
        >>> recipe = {"band": 2.0, "objective": {"preset": "verl:token-is"}}
        >>> expanded(recipe)["band"], expanded(recipe, "verl:token-is")["band"]
        (2.0, inf)
    """
    objective = recipe.get("objective", {})
    named = preset or (objective.get("preset", "") if isinstance(objective, Mapping) else "")
    if not isinstance(named, str) or not named:
        return recipe
    whole: dict[str, object] = dict(recipe)
    for key, value in {**find_preset(named).keys, "objective.preset": named}.items():
        section, _, name = key.rpartition(".")
        there = whole.get(section, {}) if section else whole
        if isinstance(there, Mapping) and (preset or name not in there):
            whole.update({section: {**there, name: value}} if section else {name: value})
    return whole


def chosen_differently(preset: str, values: Mapping[str, object]) -> Mapping[str, object]:
    """The keys of a preset that the recipe sets to another value, with the recipe's.

    Args:
        preset: The name of a preset.
        values: The recipe's value of every dotted key.
    """
    return {key: values[key] for key, value in find_preset(preset).keys.items() if values[key] != value}
