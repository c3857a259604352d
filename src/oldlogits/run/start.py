"""The model folder that a run starts from: a folder, what a warm start makes of one, or what a starting model makes."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar, cast

from oldlogits.config.episodes import EnvConfig
from oldlogits.config.mixture import MixturePart
from oldlogits.config.schema import RunConfig
from oldlogits.core.environment import MODELS, Demonstrated, Environment, ModelOrder, is_model_folder
from oldlogits.envs.delegate import players_of
from oldlogits.models.cache import cache_folder
from oldlogits.run.chat import chat_options


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """The model folder that a run starts from, and how it came to be.

    Args:
        model: The folder.
        is_warm: Whether something made the folder for this run, now or for an earlier one.
        steps: Supervised steps that were taken now; 0 where the folder was in the cache.
        loss: Loss of the last step in nats per token.
        seconds_s: Seconds that it took.
    """

    model: Path
    is_warm: bool = False
    steps: int = 0
    loss: float = math.nan
    seconds_s: float = 0.0


F = TypeVar("F", EnvConfig, MixturePart)


def anchored(config: RunConfig) -> RunConfig:
    """Return the recipe with absolute paths: environment code may change the working directory."""

    def absolute(path: str) -> str:
        return str(Path(path).absolute()) if path else ""

    def with_files(of: F) -> F:
        return replace(of, train_data=absolute(of.train_data), eval_data=absolute(of.eval_data))

    model, env, versions, engine = config.model, config.env, config.versions, config.engine
    return replace(
        config,
        model=replace(model, path=absolute(model.path)) if is_model_folder(model.path) else model,
        env=replace(with_files(env), mixture=tuple(map(with_files, env.mixture)), command=_anchored(env.command)),
        versions=replace(versions, folder=absolute(versions.folder)),
        engine=replace(engine, python=absolute(engine.python)) if os.sep in engine.python else engine,
    )


def _anchored(command: tuple[str, ...]) -> tuple[str, ...]:
    """A command whose words that name files are absolute; "python" is the interpreter that runs this."""
    words = (sys.executable, *command[1:]) if command[:1] in (("python",), ("python3",)) else command
    return tuple(
        str(Path(word).absolute()) if (number or os.sep in word) and Path(word).is_file() else word
        for number, word in enumerate(words)  # the first word may be one of PATH
    )


def prepare_model(config: RunConfig, environment_class: type[Environment], note: Callable[[str], None]) -> Start:
    """Return the recipe's model folder, or what a warm start or a starting model makes (from the cache, if it is there)."""
    path, steps = config.model.path, config.model.warm_start_steps
    is_folder = is_model_folder(path)
    if is_folder and steps in ("auto", 0):
        return Start(model=Path(path))
    before, done, last = 0, 0, math.nan
    started = time.perf_counter()

    def progress(step: int, num_steps: int, loss: float) -> None:
        nonlocal done, last
        done, last = before + step, loss
        if step == 1:
            note(f"warm start of {path}: {num_steps} supervised steps; cached for the next run")
        elif step % (100 if num_steps > 100 else 1) == 0:
            note(f"warm start: step {step}/{num_steps}, loss {loss:.3f} nats/token")

    first, *others = dict.fromkeys(players_of(environment_class).values())
    order = ModelOrder(
        seed=config.model_seed,
        steps=steps,
        environment=first,
        parser=config.env.parser,
        chat=chat_options(config),
        folder=path if is_folder else "",
        cache=cache_folder(),
        progress=progress,
        note=note,
    )
    folder = cast(Demonstrated, first).warm_start(order) if is_folder else MODELS.find(path)(order)
    for other in others if steps not in ("auto", 0) else ():  # of a mixture, one after another
        before = done
        folder = cast(Demonstrated, other).warm_start(replace(order, environment=other, folder=str(folder)))
    note(f"model: {folder.name}" + ("" if done else ", warm start taken from the cache"))
    return Start(model=folder, is_warm=True, steps=done, loss=last, seconds_s=time.perf_counter() - started)
