"""A database for one episode over one that all episodes share: parsed once, what is looked up by its key is copied."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Final, Generic, TypeVar

from pydantic import BaseModel
from pydantic_core import to_jsonable_python

T = TypeVar("T", bound=BaseModel)


class Overlay(MutableMapping[str, T], Generic[T]):
    """A table over another one that never changes.

    An entry that is looked up by its key is copied first: only such ones are changed. Those of `values` and `items` are read.
    """

    def __init__(self, base: Mapping[str, T]) -> None:
        self._base: Final = base
        self._own: dict[str, T] = {}
        self._gone: set[str] = set()

    def __getitem__(self, key: str) -> T:
        if key not in self._own:
            if key in self._gone:
                raise KeyError(key)
            self._own[key] = copy.deepcopy(self._base[key])
        return self._own[key]

    def __setitem__(self, key: str, value: T) -> None:
        self._own[key] = value
        self._gone.discard(key)

    def __delitem__(self, key: str) -> None:
        if key not in self:
            raise KeyError(key)
        self._own.pop(key, None)
        self._gone.add(key)

    def __contains__(self, key: object) -> bool:
        return key in self._own or (key in self._base and key not in self._gone)

    def __iter__(self) -> Iterator[str]:
        yield from (key for key in self._base if key not in self._gone)
        yield from (key for key in self._own if key not in self._base)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _read(self, key: str) -> T:
        return self._own[key] if key in self._own else self._base[key]

    def values(self) -> list[T]:  # type: ignore[override]
        """Return the entries as they are, to read."""
        return [self._read(key) for key in self]

    def items(self) -> list[tuple[str, T]]:  # type: ignore[override]
        """Return keys and entries as they are, to read."""
        return [(key, self._read(key)) for key in self]

    def changes(self) -> dict[str, str]:
        """Return what is another entry than in the shared table, as JSON; an entry that is gone is empty."""
        own = {key: _written(value) for key, value in self._own.items()}
        changed = {key: text for key, text in own.items() if key not in self._base or _written(self._base[key]) != text}
        return changed | dict.fromkeys(self._gone & self._base.keys(), "")


class OverlaidDatabase:
    """A pydantic database of tables, each table overlaid; what is no table is copied.

    Two of them over the same database are in the same state exactly where `model_dump` gives the same.
    """

    def __init__(self, base: BaseModel) -> None:
        self._tables: dict[str, Overlay[BaseModel]] = {}
        self._copied: list[str] = []
        for name in type(base).model_fields:
            value = getattr(base, name)
            if isinstance(value, dict) and all(isinstance(entry, BaseModel) for entry in value.values()):
                self._tables[name] = Overlay(value)
                setattr(self, name, self._tables[name])
            else:
                self._copied.append(name)
                setattr(self, name, copy.deepcopy(value))

    def model_dump(self) -> dict[str, object]:
        """Return what was changed, by table and key, and what is no table."""
        changed = {name: changes for name, table in self._tables.items() if (changes := table.changes())}
        return changed | {name: to_jsonable_python(getattr(self, name)) for name in self._copied}


def _written(value: BaseModel) -> str:
    return json.dumps(value.model_dump(mode="json"), sort_keys=True)
