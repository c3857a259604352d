"""What a cell computes, by its stage: one call from a checked recipe to rows of ``study.json``."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from oldlogits.record.jsonl import encode
from studies.old_logits.declare.plan import Cell, Stage
from studies.old_logits.measure.cost import measure_route
from studies.old_logits.measure.decision import decision_errors
from studies.old_logits.measure.learning import run_learning
from studies.old_logits.measure.trace import record_trace
from studies.old_logits.results import Plain


def compute(cell: Cell, folder: Path) -> Sequence[Plain]:
    """The rows of a cell.

    Args:
        cell: The job.
        folder: An absent folder, for the run.

    Raises:
        OldLogitsError: The run could not be made.
    """
    return _BY_STAGE[cell.stage](cell, folder)


def _learn(cell: Cell, folder: Path) -> Sequence[Plain]:
    return [_plain(run_learning(cell.config, folder, regime=cell.regime, method=cell.method, block=cell.block))]


def _decide(cell: Cell, folder: Path) -> Sequence[Plain]:
    o = cell.config.objective
    errors = decision_errors(
        record_trace(cell.config, folder, cell.num_scored),
        driver=cell.method,
        trace=cell.block,
        bands=cell.bands,
        eps_low=o.eps_low,
        eps_high=o.eps_high,
        dual_clip=None if math.isinf(o.dual_clip) else o.dual_clip,
        weight_mu=o.interpolation_mu,
    )
    return [_plain(error) for error in errors]


def _cost(cell: Cell, folder: Path) -> Sequence[Plain]:
    return [_plain(measure_route(cell.config, folder))]


_BY_STAGE: Final[Mapping[Stage, Callable[[Cell, Path], Sequence[Plain]]]] = {
    "pilot": _learn,
    "learning": _learn,
    "decision": _decide,
    "cost": _cost,
}


def _plain(row: Any) -> Plain:
    """A row as a file holds it."""
    plain: Plain = json.loads(encode(asdict(row)))
    return plain
