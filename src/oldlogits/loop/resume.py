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
from oldlogits.models.checksums import SUMS, damage_of
from oldlogits.record.episodes import read_episodes
from oldlogits.record.event_log import read_events
from oldlogits.record.folder import RunFolder
from oldlogits.rollout.journal.progress import Progress

FILE: Final = "state/loop.json"
"""Where the state of the loop lies in a checkpoint."""


@dataclass(slots=True, kw_only=True)
class LoopState:
    """What the loop needs to go on from a checkpoint, besides the trainer's own state.

    Args:
        num_events: Events recorded when it was written; None: the run begins. Those after them are done anew.
        is_evaluated: Whether the evaluation before the first update is done.
        next_row: The first training row that was never started.
        next_group: The first number that no group has had.
        account: Trajectories by what became of them; the others are in flight.
        journal: The number of the file of the journal that begins there.
        success: The held-out success of the version; None: it was not evaluated.
    """

    num_updates: int = 0
    num_events: int | None = None
    is_evaluated: bool = False
    next_row: int = 0
    next_group: int = 0
    account: dict[str, int] = field(default_factory=dict)
    journal: int = 0
    success: float | None = None

    def catch_up(self, since: Progress) -> None:
        """Add what happened to groups after the checkpoint."""
        counted = {"submitted": since.num_submitted, "failed": since.num_failed, "filtered": since.num_filtered}
        self.account = {name: self.account.get(name, 0) + counted.get(name, 0) for name in {**counted, **self.account}}
        self.next_row, self.next_group = max(self.next_row, since.next_row), max(self.next_group, since.next_group)

    def to_bytes(self) -> bytes:
        """The content of its file in a checkpoint."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def read(cls, checkpoint: Path) -> LoopState:
        """Read it from a checkpoint.

        Raises:
            RunFolderError: Its file is missing, or of another version of this package.
        """
        try:
            return cls(**json.loads((checkpoint / FILE).read_bytes()))
        except (OSError, ValueError, TypeError) as error:
            raise RunFolderError(
                "the state of the loop cannot be read",
                got=f"{checkpoint / FILE}: {error}",
                allowed="what this version of oldlogits writes",
                fix="resume with the version of oldlogits that wrote it, or from another checkpoint",
            ) from error

    @classmethod
    def journal_of(cls, checkpoint: Path) -> int:
        """The number of the file of the journal that begins at a checkpoint; 0, the first, where nobody knows any more."""
        try:
            return cls.read(checkpoint).journal
        except RunFolderError:
            return 0

    @classmethod
    def success_of(cls, checkpoint: Path) -> float | None:
        """The held-out success of a checkpoint's version; None: it was not evaluated, or nobody knows any more."""
        try:
            return cls.read(checkpoint).success
        except RunFolderError:
            return None


def whole_checkpoint(folder: RunFolder) -> Path:
    """The newest checkpoint, if every file of it is what was written; a damaged one is refused, and the one before offered.

    Raises:
        RunFolderError: Files of it are damaged, missing, or were added; each is named.
    """
    newest, *older = reversed(folder.all_checkpoints().values())
    wrong = damage_of(newest)
    if not wrong:
        return newest
    damaged, whole = [newest], None
    for checkpoint in older:
        if not damage_of(checkpoint):
            whole = checkpoint
            break
        damaged.append(checkpoint)
    remove = f"rm -r {' '.join(map(str, damaged))} && oldlogits train --resume {folder.path}"
    raise RunFolderError(
        f"checkpoint {newest.name} is not what was written",
        got=f"{newest}: " + ", ".join(wrong),
        allowed=f"the files of {SUMS}, bit for bit",
        fix=f"go on from {whole.name}, which is whole: {remove}" if whole else "restore it from a copy: no other is whole",
    )


def check_records(folder: RunFolder, state: LoopState) -> None:
    """Refuse records that a run cannot go on with: damaged lines, and fewer events than its checkpoint remembers.

    Raises:
        RecordError: A line is damaged.
        RunFolderError: Events are lost.
    """
    num_events = sum(1 for _ in read_events(folder.events))
    for _ in read_episodes(folder.episodes):
        pass
    if num_events < (state.num_events or 0):
        raise RunFolderError(
            f"{folder.events.name} has lost events",
            got=f"{num_events} in {folder.events}",
            allowed=f"at least {state.num_events}, which its checkpoint remembers",
            fix="restore the file from a copy, or start a new run with model.path = a checkpoint's model/ folder",
        )


def recorded_recipe(folder: RunFolder) -> RunConfig:
    """The recipe with which the run began, or last went on."""
    return config_from_table(tomllib.loads(folder.config.read_text(encoding="utf-8")))


def refuse_another_run(config: RunConfig, folder: RunFolder) -> None:
    """Refuse a recipe that describes another experiment than the one in `folder`; lengths, rates and deadlines may change.

    Raises:
        RunFolderError: Variant, source, seed, objective, numerics, model or environment differ.
    """
    recorded = recorded_recipe(folder)
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

    A resumed run draws numbers that the run has not drawn before, and the same ones every time it goes on from the same
    checkpoint. In lockstep the run itself draws them from the checkpoint on, so that a resumed run is the same.
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
        "trainer.compute": config.trainer.compute,
        "trainer.head_compute": config.trainer.head_compute,
        **{f"env.{key}": value for key, value in asdict(config.env).items() if key != "timeout_s"},
        **{f"correction.{key}": value for key, value in asdict(config.correction).items()},
        **{f"objective.{key}": value for key, value in asdict(config.objective).items()},
        **{f"model.{key}": value for key, value in asdict(config.model).items()},
    }
