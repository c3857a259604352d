"""The tables of the checks against idle baselines, and of the second measure: the updates until a success is reached."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from statistics import median
from typing import Final

from oldlogits.core.loss import card_of
from studies.old_logits.analyse.contrasts import method_rows
from studies.old_logits.declare.methods import find_method
from studies.old_logits.layout import DASH, Table
from studies.old_logits.results import LearningRun, Study

REACHED: Final = 0.8
"""The held-out success whose updates are counted."""

LOSS_ERROR: Final = 1e-5
"""What the loss, which is computed in float32, may differ by from that formed again in float64."""


def check_tables(study: Study) -> list[Table]:
    """The four checks where runs recorded what they need, and the updates until `REACHED`."""
    has_checks = any(run.checks for run in study.learning)
    return [*([_checks(study)] if has_checks else []), _reach(study)] if study.learning else []


def _has_clip(method: str) -> bool:
    """Whether the method's loss leaves tokens out because of r_s."""
    return card_of(str(find_method(method).settings.get("objective.loss", "masked_is"))).has_active_set


def _checks(study: Study) -> Table:
    rows = []
    for regime in study.declaration.regimes:
        for row in method_rows(study.declaration, study.learning, regime, study.declaration.primary):
            found = [run.checks for run in row.runs if run.checks]
            if not found:
                rows.append((regime.name, row.method, *(DASH,) * 5, "not recorded"))
                continue
            num_seeds, worst = len({one.first_batch for one in found}), max(one.loss_error for one in found)
            retrained = sum(one.num_retrained for one in found)
            faults = [
                *(["the clip never acts"] if max(one.clipped for one in found) == 0 and _has_clip(row.method) else []),
                *(["seeds alike"] if num_seeds < len(found) else []),
                *(["trained twice"] if retrained else []),
                *(["another loss"] if not worst <= LOSS_ERROR else []),
            ]
            rows.append(
                (
                    regime.name,
                    row.method,
                    _range([one.clipped for one in found]),
                    _range([one.masked for one in found]),
                    f"{num_seeds} of {len(found)}",
                    str(retrained),
                    f"{worst:.1e}",
                    ", ".join(faults) or ("none" if _has_clip(row.method) else "none; no clip by design"),
                )
            )
    return Table(
        part="Learning",
        title="Idle baselines: four checks of every run",
        header=("regime", "method", "clipped", "masked", "seeds", "retrained", "loss error", "found"),
        rows=tuple(rows),
        caption="Clipped and masked: the largest share of an update's tokens that the clip, or r_d, left out, over blocks. "
        "Seeds: first batches that differ. Retrained: groups in more than one update. Loss error: the loss as it was reported "
        "against that formed again of the record, in float64, with the stated denominator.",
    )


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.3f} to {max(values):.3f}"


def updates_to(run: LearningRun, success: float) -> float | None:
    """The updates until a run's held-out success first is that high, linear between evaluations; None: it never was."""
    if run.curve and run.curve[0].success >= success:
        return float(run.curve[0].update)
    for before, after in pairwise(run.curve):
        if before.success < success <= after.success:
            share = (success - before.success) / (after.success - before.success)
            return before.update + share * (after.update - before.update)
    return None


def _reach(study: Study) -> Table:
    rows = []
    for regime in study.declaration.regimes:
        for row in method_rows(study.declaration, study.learning, regime, study.declaration.primary):
            reached = [found for run in row.runs if (found := updates_to(run, REACHED)) is not None]
            shown = f"{median(reached):.1f}" if reached else DASH
            rows.append((regime.name, row.method, f"{len(reached)} of {len(row.runs)}", shown))
    return Table(
        part="Learning",
        title=f"Updates until a held-out success of {REACHED:g}",
        header=("regime", "method", "runs that reach it", "median of these"),
        rows=tuple(rows),
        caption="Linear between evaluations. A method whose weak runs never reach it looks fast: read both columns.",
        is_detail=True,
    )
