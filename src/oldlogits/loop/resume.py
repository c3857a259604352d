"""Going on with a run: what it needs from a checkpoint, what its recipe may not change, and what is drawn anew."""

from __future__ import annotations

import json
import random
import tomllib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

from oldlogits.config.load import config_from_table
from oldlogits.config.schema import RunConfig
from oldlogits.core.errors import RunFolderError
from oldlogits.record.folder import RunFolder

FILE: Final = "state/loop.json"
"""Where the state of the loop lies in a checkpoint."""


@dataclass(slots=True, kw_only=True)
class LoopState:
    """What the loop needs to go on from a checkpoint, besides the trainer's own state.

    Args:
        num_events: Events recorded when it was written; None: the run begins. Those after them are done anew.
        is_evaluated: Whether the evaluation before the first update is done.
        next_row: The first training row that was never started.
        unfinished_rows: The rows of the groups in flight, which a resumed run starts anew.
        account: Trajectories by what became of them.
    """

    num_updates: int = 0
    num_events: int | None = None
    is_evaluated: bool = False
    next_row: int = 0
    unfinished_rows: list[int] = field(default_factory=list)
    account: dict[str, int] = field(default_factory=dict)

    def write(self, checkpoint: Path) -> None:
        """Write it into the folder of a checkpoint."""
        (checkpoint / FILE).write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, checkpoint: Path) -> LoopState:
        """Read what `write` wrote."""
        return cls(**json.loads((checkpoint / FILE).read_text(encoding="utf-8")))


def refuse_another_run(config: RunConfig, folder: RunFolder) -> None:
    """Refuse a recipe that describes another experiment than the one in `folder`; its lengths and rates may change.

    Raises:
        RunFolderError: Variant, source, seed, objective, numerics, model or environment differ.
    """
    recorded = config_from_table(tomllib.loads(folder.config.read_text(encoding="utf-8")))
    asked, found = _identity(config), _identity(recorded)
    differing = [key for key in asked if asked[key] != found[key]]
    if differing:
        raise RunFolderError(
            f"the recipe contradicts the run in {folder.path}",
            got=", ".join(f"{key} = {asked[key]!r}" for key in differing),
            allowed=", ".join(f"{key} = {found[key]!r}" for key in differing) + ", as the run began",
            fix="leave these keys as they are, or start a new run with model.path = a checkpoint's model/ folder",
        )


def sampler_seed(seed: int, num_updates: int) -> int:
    """The seed of engine and latencies: the run's own at its start, another one at every update that it goes on from.

    Sampling is not replayed: a resumed run draws numbers that the run has not drawn before, and the same ones every time
    it goes on from the same checkpoint.
    """
    return random.Random(f"{seed}/{num_updates}").getrandbits(31) if num_updates else seed


def _identity(config: RunConfig) -> dict[str, object]:
    """What makes it the same experiment, by dotted key."""
    return {
        "variant": config.variant,
        "proximal.source": config.proximal.source,
        "seed": config.seed,
        "band": config.band,
        "engine.precision": config.engine.precision,
        **{f"env.{key}": value for key, value in asdict(config.env).items()},
        **{f"objective.{key}": value for key, value in asdict(config.objective).items()},
        **{f"model.{key}": value for key, value in asdict(config.model).items()},
    }
