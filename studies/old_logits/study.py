"""A whole study: run the cells that have no result yet, stage by stage, and put the results together.

pilot: bands -> best band -> eps      learning: confirmation runs      decision: traces      cost: one at a time
                           cells/*/*.json -> Study -> study.json
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Protocol

from oldlogits import __version__
from oldlogits.core.errors import ConfigError, RunFolderError
from oldlogits.record.folder import describe_environment
from studies.old_logits.declare.declaration import amendments, write_down
from studies.old_logits.declare.pilot import best_knobs
from studies.old_logits.declare.plan import (
    Cell,
    Plan,
    Stage,
    cost_cells,
    decision_cells,
    learning_cells,
    pilot_bands,
    pilot_eps,
    resolved,
)
from studies.old_logits.measure.cost import RouteCost
from studies.old_logits.measure.decision import DecisionError
from studies.old_logits.measure.pool import Done, Pool
from studies.old_logits.measure.work import compute
from studies.old_logits.results import Budget, LearningRun, Study, read_as

STAGES: Final[tuple[Stage, ...]] = ("pilot", "learning", "decision", "cost")


class View(Protocol):
    """Told how the study goes on."""

    def begin(self, stage: Stage, num_cells: int, num_known: int) -> None:
        """A stage begins; `num_known` of its cells have a result already."""

    def start(self, cell: Cell) -> None:
        """A cell begins."""

    def done(self, done: Done) -> None:
        """A cell has ended."""


class Comparison:
    """A study in a folder.

    Args:
        plan: What is compared.
        notes: Commentary of a person.
        folder: Holds the results of the cells, ``study.json`` and what is made of it.
        processes: Cells that run at the same time.
    """

    def __init__(self, plan: Plan, notes: str, folder: Path, processes: int) -> None:
        self.plan, self._notes, self._folder, self._processes = plan, notes, folder, processes
        found = describe_environment()
        self._machine = {name: found[name] for name in ("python", "machine", "num_cpus", "packages")}
        self._commit = str(found["git_commit"] or "unknown")
        self._pool = Pool(folder, compute, processes, self._commit)

    def run(self, stages: Sequence[Stage], view: View) -> list[Done]:
        """Compute what is missing in these stages; returns the cells that failed.

        Raises:
            RunFolderError: Another process works on the folder.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        failed: list[Done] = []
        with _owned(self._folder):
            for stage in STAGES:
                if stage in stages:
                    if stage == "learning":
                        write_down(self._folder, self.plan.declaration, self._num_known("learning"))
                    for cells in self._rounds(stage):
                        failed += self._compute(stage, cells, view)
        return failed

    def num_missing(self, stages: Sequence[Stage]) -> dict[Stage, int]:
        """Cells without a result, by stage; those of a pilot's second round are counted once its first has ended."""
        return {s: sum(map(len, self._rounds(s))) - self._num_known(s) for s in STAGES if s in stages}

    def study(self) -> Study:
        """What the results add up to so far."""
        done = {stage: [d for cells in self._rounds(stage) for d in self._pool.known(cells)] for stage in STAGES}
        everything = [d for known in done.values() for d in known]
        return Study(
            title=self.plan.title,
            notes=self._notes,
            recipe=resolved(self.plan),
            declaration=self.plan.declaration,
            amendments=amendments(self._folder, self.plan.declaration),
            code={"version": __version__, "commits": ", ".join(sorted({d.commit for d in everything}))},
            machine=self._machine,
            pilot=_runs(done["pilot"]),
            learning=_runs(done["learning"]),
            decision=tuple(read_as(DecisionError, row) for d in done["decision"] for row in d.rows),
            cost=tuple(read_as(RouteCost, row) for d in done["cost"] for row in d.rows),
            budget=Budget(
                cpu_s=sum(d.cpu_s for d in everything),
                wall_s=sum(d.wall_s / (1 if d.cell.stage == "cost" else self._processes) for d in everything),
            ),
        )

    def _num_known(self, stage: Stage) -> int:
        return sum(len(self._pool.known(cells)) for cells in self._rounds(stage))

    def _rounds(self, stage: Stage) -> Iterator[list[Cell]]:
        """The cells of a stage; a pilot's second round depends on the results of the first."""
        if stage != "pilot":
            yield list({"learning": learning_cells, "decision": decision_cells, "cost": cost_cells}[stage](self.plan))
            return
        first = list(pilot_bands(self.plan))
        yield first
        known = self._pool.known(first)
        if first and len(known) == len(first):
            best = best_knobs(self.plan, _runs(known))
            yield list(pilot_eps(self.plan, {key: knobs[0] for key, knobs in best.items()}))

    def _compute(self, stage: Stage, cells: Sequence[Cell], view: View) -> list[Done]:
        view.begin(stage, len(cells), len(self._pool.known(cells)))
        pool = Pool(self._folder, compute, 1, self._commit) if stage == "cost" else self._pool
        return pool.run(cells, view.done, view.start)


def _runs(done: Sequence[Done]) -> tuple[LearningRun, ...]:
    return tuple(read_as(LearningRun, row) for d in done for row in d.rows)


def read_notes(plan: Plan) -> str:
    """The text of ``notes``; empty if there is none.

    Raises:
        ConfigError: The file does not exist.
    """
    if not plan.notes:
        return ""
    path = Path(plan.folder) / plan.notes
    if not path.is_file():
        raise ConfigError("the notes do not exist", got=str(path), allowed="a text file", fix="write it, or leave out `notes`")
    return path.read_text(encoding="utf-8")


@contextmanager
def _owned(folder: Path) -> Iterator[None]:
    """One process works on a study's folder at a time."""
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunFolderError(
                "another process works on this study",
                got=str(folder),
                allowed="one at a time",
                fix="wait for it, or give another --out",
            ) from error
        yield
