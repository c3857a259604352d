"""How many rollout workers a run is to have, as a file of its folder: who can write there can change it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from oldlogits.core.errors import ConfigError
from oldlogits.record.folder import write_json

NAME: Final = "workers.json"


def write_wanted(folder: Path, num_workers: int) -> None:
    """Want so many workers from now on."""
    write_json(folder / NAME, {"num_workers": num_workers})


def read_wanted(folder: Path) -> int | None:
    """Return how many workers are wanted; None: nobody has said."""
    if not (path := folder / NAME).exists():
        return None
    text = path.read_text(encoding="utf-8")
    try:
        num = json.loads(text)["num_workers"]
    except (ValueError, TypeError, KeyError):
        num = None
    if not isinstance(num, int) or isinstance(num, bool) or num < 1:
        allowed, fix = '{"num_workers": N} with N >= 1', "use `oldlogits workers RUN_FOLDER --num N`"
        raise ConfigError("workers.json is no wish for workers", got=text[:80], allowed=allowed, fix=fix)
    return num
