"""The runs of a comparison: recipes and varied keys x seeds, each in a run folder of its own, and what is read from them."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Final

import tomli_w

from oldlogits.config.load import load_config
from oldlogits.config.schema import RunConfig
from oldlogits.core.errors import ConfigError
from oldlogits.record.event_log import read_events, typed
from oldlogits.record.events import Audited, Evaluated, Updated, VersionPublished
from oldlogits.record.folder import RunFolder, unreadable_run
from oldlogits.record.summary import Summary

METRICS: Final = ("success", "reward", "decision_error", "seconds", "bytes")
"""The figures of a run.

success: held-out success of sampled episodes in the last evaluation. reward: mean over the updates of the mean reward of the
trained trajectories. decision_error: share of the audited tokens that the proximal policy keeps or masks where OLD would
not. seconds: of the training loop. bytes: the most bytes of versions and averages that were kept beside the live weights.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRun:
    """One run: a recipe under one seed, its folder, and the name of the recipe with its varied keys."""

    name: str
    config: RunConfig
    folder: Path

    @property
    def label(self) -> str:
        """Name it to the person who waits for it."""
        return f"{self.name}, seed {self.config.seed}"

    @property
    def is_done(self) -> bool:
        """Whether it came to its end."""
        path = RunFolder(path=self.folder).summary
        with unreadable_run(self.folder):
            return path.is_file() and Summary.read(path).ended == "done"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFigures:
    """What came out of one run under one seed: figures by metric, None where one was not measured."""

    name: str
    seed: int
    values: Mapping[str, float | None]


def plan_runs(
    recipes: Sequence[Path], overrides: Sequence[str], vary: Sequence[str], seeds: Sequence[int], out: Path
) -> list[PlannedRun]:
    """Plan recipes x varied keys x seeds, seed by seed, so that what else the machine does meets all recipes alike.

    Args:
        recipes: TOML files of runs.
        overrides: Words of a command line, which hold for all runs.
        vary: ``key=value,value,...`` each.
        seeds: The seeds of every recipe.
        out: The folder of the comparison.

    Raises:
        ConfigError: A recipe cannot be run, two would have one name, or `out` holds a run of another recipe.
    """
    names: dict[str, tuple[Path, list[str]]] = {}
    for recipe in recipes:
        for choice in itertools.product(*map(_choices, vary)):
            name = ",".join([recipe.stem, *(f"{key.rpartition('.')[2]}={value}" for key, value in choice)])
            if name in names:
                raise ConfigError("two recipes have one name", got=name, allowed="different file names", fix="rename one")
            names[name] = (recipe, [word for key, value in choice for word in (f"--{key}", value)])
    planned = [
        PlannedRun(
            name=name,
            config=load_config(recipe, [*overrides, *own, "--seed", str(seed)]),
            folder=out / name.replace("/", "_") / f"seed{seed}",
        )
        for seed in dict.fromkeys(seeds)
        for name, (recipe, own) in names.items()
    ]
    for run in planned:
        there = RunFolder(path=run.folder).config
        if there.is_file() and there.read_bytes() != tomli_w.dumps(asdict(run.config)).encode():
            raise ConfigError(
                "the folder holds a run of another recipe",
                got=str(run.folder),
                allowed=f"the recipe of {there}",
                fix="give another --out, or remove that folder",
            )
    return planned


def _choices(vary: str) -> list[tuple[str, str]]:
    key, equals, values = vary.partition("=")
    if not equals or not key or not values:
        raise ConfigError("--vary names no values", got=vary, allowed="KEY=VALUE,VALUE", fix="--vary trainer.lr=1e-4,5e-4")
    return [(key, value) for value in values.split(",")]


def perform(planned: PlannedRun) -> None:
    """Run it to its end, from its last checkpoint where there is one."""
    from oldlogits.run.run import run  # torch: only the worker processes need it

    folder = RunFolder(path=planned.folder)
    resume = folder.latest_checkpoint() is not None
    if not resume and folder.config.is_file():
        shutil.rmtree(planned.folder)
    result = run(planned.config, planned.folder, resume=resume)
    if result.error is not None:
        raise result.error
    if result.summary.ended == "interrupted":
        raise KeyboardInterrupt


def read_figures(planned: PlannedRun) -> RunFigures:
    """Read what came out of a run that is done.

    Raises:
        RunFolderError: Its files are not what a run writes.
    """
    with unreadable_run(planned.folder):
        return _figures(planned)


def _figures(planned: PlannedRun) -> RunFigures:
    folder = RunFolder(path=planned.folder)
    events = list(read_events(folder.events))
    success = [e.mean if e.num_episodes else None for e in typed(events, Evaluated) if e.mode == "sampled"]
    metrics = {update.version: update.metrics for update in typed(events, Updated)}  # a run that was resumed made some twice
    audits = typed(events, Audited)
    num_tokens = sum(sum(audit.num_tokens) for audit in audits)
    num_wrong = sum(sum(audit.wrongly_kept) + sum(audit.wrongly_masked) for audit in audits)
    stored = max((version.bytes for version in typed(events, VersionPublished)), default=0)
    average = max((found.get("average/stored_bytes", 0.0) for found in metrics.values()), default=0.0)
    values = {
        "success": success[-1] if success else None,
        "reward": fmean(found["reward/mean"] for found in metrics.values()) if metrics else None,
        "decision_error": num_wrong / num_tokens if num_tokens else None,
        "seconds": Summary.read(folder.summary).train_wall_s,
        "bytes": stored + average,
    }
    return RunFigures(name=planned.name, seed=planned.config.seed, values=values)
