"""Writes TOML; the standard library only reads it. Law: ``tomllib.loads(dump_toml(x)) == x``."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from oldlogits.record.jsonl import RecordError

Toml = str | bool | int | float | Sequence["Toml"] | Mapping[str, "Toml"]
"""What a recipe holds. TOML has no null."""

_BARE_KEY: Final = re.compile(r"[A-Za-z0-9_-]+")


def dump_toml(table: Mapping[str, Toml]) -> str:
    """The table as TOML text: first its own values, then its sub-tables under dotted headers.

    Raises:
        RecordError: A value has no TOML form, such as None.

    Example:
        >>> print(dump_toml({"seed": 1, "trainer": {"lr": 1e-5, "betas": [0.9, 0.99]}}))
        seed = 1
        <BLANKLINE>
        [trainer]
        lr = 1e-05
        betas = [0.9, 0.99]
        <BLANKLINE>
    """
    return "\n".join(_lines(table, ())).lstrip("\n") + "\n"


def _lines(table: Mapping[str, Toml], path: tuple[str, ...]) -> Iterator[str]:
    if path:
        yield f"\n[{'.'.join(map(_key, path))}]"
    for key, value in table.items():
        if not isinstance(value, Mapping):
            yield f"{_key(key)} = {_value(value, (*path, key))}"
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _lines(value, (*path, key))


def _value(value: Toml, path: tuple[str, ...]) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(key)} = {_value(item, (*path, key))}" for key, item in value.items()) + "}"
    if isinstance(value, Sequence):
        return "[" + ", ".join(_value(item, path) for item in value) + "]"
    raise RecordError(
        f"{'.'.join(path)} has no TOML form",
        got=repr(value),
        allowed="str, bool, int, float, a list or a table of these",
        fix="leave the key out",
    )


def _key(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) else _string(key)


def _string(text: str) -> str:
    return json.dumps(str(text), ensure_ascii=False).replace("\x7f", "\\u007f")
