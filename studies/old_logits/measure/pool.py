"""Computes cells with the product's job pool: each result is one file, written when the cell ends, and never computed twice.

cells without a file -> worker processes -> cells/STAGE/KEY.json -> rows
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Final

from oldlogits.compare.pool import Outcome, run_jobs
from oldlogits.record.folder import write_atomic
from oldlogits.record.jsonl import Json, RecordError, encode
from studies.old_logits.declare.plan import Cell
from studies.old_logits.results import Plain

_KEYS: Final = frozenset({"label", "config", "commit", "cpu_s", "wall_s", "rows"})

Work = Callable[[Cell, Path], Sequence[Plain]]
"""Computes a cell in a folder of its own, which is deleted afterwards; returns its rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """What a cell gave.

    Args:
        cell: The cell.
        rows: Its results; empty if it failed.
        cpu_s: CPU seconds of its process, and of those that it started; 0 if it failed.
        wall_s: Seconds from its beginning to its end.
        commit: Of the code that computed it.
        error: Why it failed; empty: it did not.
    """

    cell: Cell
    rows: tuple[Plain, ...]
    cpu_s: float
    wall_s: float
    commit: str
    error: str = ""


class Pool:
    """Computes cells, at most `processes` at the same time.

    Args:
        folder: Holds ``cells/`` and ``failures/``.
        work: What computes a cell; a function that a new process can import.
        processes: Worker processes.
        commit: Of the code; noted with every result.
    """

    def __init__(self, folder: Path, work: Work, processes: int, commit: str = "unknown") -> None:
        self._folder, self._work, self._processes, self._commit = folder, work, processes, commit

    def known(self, cells: Iterable[Cell]) -> list[Done]:
        """The results that are there, in the order of the cells."""
        return [done for cell in cells if (done := self._read(cell)) is not None]

    def run(self, cells: Sequence[Cell], on_done: Callable[[Done], None], on_start: Callable[[Cell], None]) -> list[Done]:
        """Compute the cells that have no result yet.

        Args:
            cells: In the order in which they are started.
            on_done: Called after each.
            on_start: Called before each.

        Returns:
            Those that failed.
        """
        failed: list[Done] = []

        def ended(outcome: Outcome[Cell, tuple[tuple[Plain, ...], float]]) -> None:
            rows, cpu_s = outcome.value or ((), 0.0)
            done = Done(
                cell=outcome.job,
                rows=rows,
                cpu_s=cpu_s,
                wall_s=outcome.wall_s,
                commit=self._commit,
                error=outcome.error,
            )
            self._write(done)
            failed.extend([done] if done.error else [])
            on_done(done)

        waiting = [cell for cell in cells if self._read(cell) is None]
        work = partial(_compute, self._work)
        log = self._folder / "log.txt"
        run_jobs(waiting, work, processes=self._processes, log=log, on_start=on_start, on_done=ended)
        return failed

    def _file(self, cell: Cell) -> Path:
        return self._folder / "cells" / cell.stage / f"{cell.key}.json"

    def _read(self, cell: Cell) -> Done | None:
        """The result of a cell; None if there is none, or it was computed when a key had another default."""
        path = self._file(cell)
        if not path.is_file():
            return None
        found = json.loads(path.read_text(encoding="utf-8"))
        if found.keys() != _KEYS:
            raise RecordError(
                "a result of the study is not readable",
                got=str(path),
                allowed=", ".join(sorted(_KEYS)),
                fix="delete the file: the cell is computed again",
            )
        if _differs(found["config"], json.loads(encode(asdict(cell.config)))):
            return None
        values = {name: found[name] for name in ("cpu_s", "wall_s", "commit")}
        return Done(cell=cell, rows=tuple(found["rows"]), **values)

    def _write(self, done: Done) -> None:
        """A result is kept; a failure is written aside, so that the cell is tried again next time."""
        path = self._folder / "failures" / f"{done.cell.key}.txt" if done.error else self._file(done.cell)
        path.parent.mkdir(parents=True, exist_ok=True)
        content: dict[str, Json] = {
            "label": done.cell.label,
            "config": asdict(done.cell.config),
            "commit": done.commit,
            "cpu_s": done.cpu_s,
            "wall_s": done.wall_s,
            "rows": done.rows,
        }
        write_atomic(path, f"{done.cell.label}\n\n{done.error}\n" if done.error else encode(content) + "\n")


def _differs(then: Mapping[str, Json], now: Mapping[str, Json]) -> bool:
    """Whether a key that both recipes have has another value."""
    for name in then.keys() & now.keys():
        a, b = then[name], now[name]
        if _differs(a, b) if isinstance(a, Mapping) and isinstance(b, Mapping) else a != b:
            return True
    return False


def _compute(work: Work, cell: Cell) -> tuple[tuple[Plain, ...], float]:
    """Compute one cell in a worker, in a folder of its own that is deleted afterwards; with its CPU seconds."""
    before = sum(os.times()[:4])
    with tempfile.TemporaryDirectory(prefix="oldlogits-cell-", ignore_cleanup_errors=True) as folder:
        rows = tuple(work(cell, Path(folder) / "run"))
    return rows, sum(os.times()[:4]) - before
