"""``oldlogits workers RUN_FOLDER``: how many rollout workers a run with the runtime ray is to have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from oldlogits.backends.ray.desired_workers import read_wanted, write_wanted
from oldlogits.config.load import config_from_table, read_toml
from oldlogits.core.backend import BACKENDS
from oldlogits.core.errors import ConfigError
from oldlogits.record.folder import RunFolder


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkersOptions:
    """Say how many rollout workers a run is to have; it follows within seconds, and what ran on one that leaves goes on."""

    run: Annotated[Path, tyro.conf.Positional]
    """The run folder."""
    num: int | None = None
    """Workers from now on; without it, print how many are wanted now."""


def command(arguments: Sequence[str]) -> int:
    """Write the wish, or print it."""
    options = tyro.cli(WorkersOptions, prog="oldlogits workers", args=list(arguments))
    folder = RunFolder(path=options.run)
    config = folder.config
    if not config.exists():
        raise ConfigError("there is no run", got=str(options.run), allowed="a run folder", fix="name the folder given as --out")
    recipe = config_from_table(read_toml(config))
    if not BACKENDS.find(recipe.runtime.type).on_cluster:
        raise ConfigError(
            "only runs with the runtime ray have workers that join and leave",
            got=f"runtime.type = '{recipe.runtime.type}'",
            allowed="runtime.type = 'ray'",
            fix="start the run with --runtime.type ray",
        )
    if options.num is not None:
        if options.num < 1:
            raise ConfigError("a run needs a worker", got=f"--num {options.num}", allowed=">= 1", fix="--num 1")
        write_wanted(folder.path, options.num)
    wanted = read_wanted(folder.path)
    print(f"{recipe.ray.num_workers if wanted is None else wanted} workers are wanted")
    if folder.summary.exists():
        print(f"the run has ended: see {folder.summary}")
    return 0
