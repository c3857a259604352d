"""Whether a study holds all that it declared: what is missing, by name."""

from __future__ import annotations

from collections import Counter
from itertools import product

from oldlogits.study.contrasts import all_contrasts, method_rows
from oldlogits.study.decision import STAND_INS
from oldlogits.study.layout import DASH, Table
from oldlogits.study.learning_tables import VIEW_NAMES
from oldlogits.study.methods import find_method
from oldlogits.study.results import Study

_SHOWN = 12
"""Missing things that are named; of more, the number follows."""


def completeness(study: Study) -> Table:
    """What was declared and what there is, part by part."""
    rows = [_tests(study), *_runs(study), _cross(study), _routes(study)]
    return Table(
        part="Declared and found",
        title="Declared and found",
        header=("part", "declared", "found", "missing"),
        rows=tuple((name, str(declared), str(declared - len(missing)), _named(missing)) for name, declared, missing in rows),
        caption="Everything that the recipe declares before the confirmation runs.",
    )


def missing(study: Study) -> list[str]:
    """One sentence a part that is not complete; empty where the study is."""
    rows = completeness(study).rows
    return [f"{name}: {found} of {declared}; missing: {what}." for name, declared, found, what in rows if what != DASH]


def _tests(study: Study) -> tuple[str, int, list[str]]:
    tests = [contrast for contrast in all_contrasts(study.declaration, study.learning) if contrast.adjusted is not None]
    short = [c for c in tests if c.estimate is None or c.estimate.n < c.num_declared]
    return "declared contrasts", len(tests), [f"{c.first} - {c.second} in {c.regime}" for c in short]


def _runs(study: Study) -> list[tuple[str, int, list[str]]]:
    found = []
    for regime in study.declaration.regimes:
        for view in regime.views:
            rows = method_rows(study.declaration, study.learning, regime, view)
            missing = [f"{row.method} block {block}" for row in rows for block in row.missing]
            found.append((f"runs in {regime.name}, {VIEW_NAMES[view]}", sum(row.num_declared for row in rows), missing))
    return found


def _cross(study: Study) -> tuple[str, int, list[str]]:
    cross = study.declaration.cross
    traces = Counter((e.window, e.lag, e.engine, e.band, e.stand_in) for e in study.decision)
    cells = list(product(cross.windows, cross.lags, cross.engines, cross.bands))
    short = [cell for cell in cells if any(traces[*cell, name] < cross.num_traces for name in STAND_INS)]
    names = [f"window {w}, {lag}, {engine}, band {band:g}" for w, lag, engine, band in short]
    return f"decision errors, settings with {cross.num_traces} traces", len(cells), names


def _routes(study: Study) -> tuple[str, int, list[str]]:
    measured = {row.route for row in study.cost}
    missing = [method for method in study.declaration.routes if find_method(method).source not in measured]
    return "routes whose cost is measured", len(study.declaration.routes), missing


def _named(missing: list[str]) -> str:
    more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
    return ", ".join(missing[:_SHOWN]) + more or DASH
