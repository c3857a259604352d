"""What a study declared, written down before its first confirmation run; what was changed afterwards is named."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final

from oldlogits.record.folder import write_json
from oldlogits.record.jsonl import Json, encode
from studies.old_logits.results import Declaration

_FILE: Final = "declaration.json"


def write_down(folder: Path, declaration: Declaration, num_runs: int) -> None:
    """Keep the declaration as it is before the confirmation runs; one that was kept before stays as it was.

    Args:
        folder: The study's.
        declaration: As the recipe has it now.
        num_runs: Confirmation runs that have a result already.
    """
    if not (folder / _FILE).is_file():
        write_json(folder / _FILE, {"num_runs": num_runs, "declaration": _plain(declaration)})


def amendments(folder: Path, declaration: Declaration) -> tuple[str, ...]:
    """One sentence for everything in the declaration that the confirmation runs did not have before them."""
    if not (folder / _FILE).is_file():
        return ()
    kept = json.loads((folder / _FILE).read_text(encoding="utf-8"))
    late = [f"Written down when {kept['num_runs']} confirmation runs had a result already."] if kept["num_runs"] else []
    changes = _changes("", kept["declaration"], _plain(declaration))
    return (*late, *(f"{place}: {before} when it was written down, {after} now." for place, before, after in changes))


def _plain(declaration: Declaration) -> Mapping[str, Json]:
    """As JSON has it; regimes by name."""
    plain: dict[str, Json] = json.loads(encode(asdict(declaration)))
    regimes = plain["regimes"]
    assert isinstance(regimes, Sequence), "a declaration has a tuple of regimes"
    plain["regimes"] = {str(regime["name"]): regime for regime in regimes if isinstance(regime, Mapping)}
    return plain


def _changes(place: str, before: Json, after: Json) -> Iterator[tuple[str, str, str]]:
    """Where two JSON values differ, as deep as both are objects: place, the one and the other."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for name in dict.fromkeys([*before, *after]):
            yield from _changes(f"{place}.{name}" if place else name, before.get(name), after.get(name))
    elif before != after:
        yield place, _shown(before), _shown(after)


def _shown(value: Json) -> str:
    return "absent" if value is None else encode(value)
