"""Whether a study holds all that it declared: what is missing, by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from studies.old_logits.analyse.contrasts import all_contrasts, method_rows
from studies.old_logits.declare.methods import find_method
from studies.old_logits.layout import DASH, Table, blocks_named, counted
from studies.old_logits.measure.decision import PROXIMAL_POLICIES
from studies.old_logits.results import Study
from studies.old_logits.show.learning_tables import VIEW_NAMES

_SHOWN = 8
"""Missing things that are named; of more, the number follows."""


def completeness(study: Study) -> Table:
    """What was declared and what there is, part by part."""
    parts = [*_contrasts(study), *_runs(study), _cross(study), _routes(study)]
    return Table(
        part="Declared and found",
        title="What the recipe declares",
        header=("part", "declared", "found", "missing"),
        rows=tuple((p.name, str(p.declared), str(p.declared - p.num_missing), _named(p.missing)) for p in parts),
    )


def missing(study: Study) -> list[str]:
    """One sentence a part that is not complete; empty where the study is."""
    rows = completeness(study).rows
    return [f"{name}: {found} of {declared}; missing: {what}." for name, declared, found, what in rows if what != DASH]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """A part of the study: how many things it declares, how many are missing, and these by name."""

    name: str
    declared: int
    num_missing: int
    missing: Sequence[str]


def _contrasts(study: Study) -> Iterator[_Part]:
    """The pairs in every regime, a part a view; short of runs, or of a method that the view does not hold."""
    found = [c for c in all_contrasts(study.declaration, study.learning) if c.axis == "update"]
    for view in dict.fromkeys(c.view for c in found):
        own = [c for c in found if c.view == view]
        short = [c for c in own if c.estimate is None or c.estimate.n < c.num_declared]
        names = [f"{c.first} - {c.second} in {c.regime}" for c in short]
        yield _Part(name=f"contrasts {VIEW_NAMES[view]}", declared=len(own), num_missing=len(short), missing=names)


def _runs(study: Study) -> Iterator[_Part]:
    for regime in study.declaration.regimes:
        for view in regime.views:
            rows = method_rows(study.declaration, study.learning, regime, view)
            yield _Part(
                name=f"runs in {regime.name}, {VIEW_NAMES[view]}",
                declared=sum(row.num_declared for row in rows),
                num_missing=sum(len(row.missing) for row in rows),
                missing=[f"{row.method} {blocks_named(row.missing)}" for row in rows if row.missing],
            )


def _cross(study: Study) -> _Part:
    cross = study.declaration.cross
    traces = Counter((e.window, e.lag, e.engine, e.band, e.proximal_policy) for e in study.decision)
    cells = list(product(cross.windows, cross.lags, cross.engines, cross.bands))
    short = [cell for cell in cells if any(traces[*cell, name] < cross.num_traces for name in PROXIMAL_POLICIES)]
    names = [f"{engine}, {lag} lags, window {window}, band {band:g}" for window, lag, engine, band in short]
    title = f"decision errors, settings with {counted(cross.num_traces, 'trace')}"
    return _Part(name=title, declared=len(cells), num_missing=len(short), missing=names)


def _routes(study: Study) -> _Part:
    measured = {row.route for row in study.cost}
    routes = study.declaration.routes
    names = [method for method in routes if find_method(method).source not in measured]
    return _Part(name="routes whose cost is measured", declared=len(routes), num_missing=len(names), missing=names)


def _named(missing: Sequence[str]) -> str:
    more = f"; and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
    return "; ".join(missing[:_SHOWN]) + more or DASH
