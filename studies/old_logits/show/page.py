"""A study's ``report.html``: one self-contained page with every picture and table that ``study.json`` gives."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from oldlogits.record.folder import write_atomic
from oldlogits.record.report.cards import Card
from oldlogits.record.report.charts import Figure
from oldlogits.record.report.frame import page_template
from studies.old_logits.analyse.contrasts import COLLAPSE, all_contrasts, collapse_bars
from studies.old_logits.layout import Table
from studies.old_logits.results import Study
from studies.old_logits.show.completeness import missing
from studies.old_logits.show.figures import cost_figures, decision_figures, decision_legend, learning_figures
from studies.old_logits.show.reading import plain_reading
from studies.old_logits.show.tables import tables_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A part of the page: the legend of all its pictures, these row by row, then its tables."""

    name: str
    legend: Sequence[tuple[str, str]]
    groups: Sequence[Sequence[Figure]]
    tables: Sequence[Table]


def write_page(study: Study, path: Path) -> Path:
    """Write the page; returns its path."""
    text = page_template("study.html", "studies.old_logits.show").render(
        study=study,
        origin=origin(study),
        cards=_cards(study),
        missing=missing(study),
        reading=plain_reading(study),
        parts=_parts(study),
        recipe=json.dumps(study.recipe, indent=2, ensure_ascii=False),
    )
    write_atomic(path, text)
    return path


def origin(study: Study) -> str:
    """What code made the study, where, and what it took."""
    packages = study.machine.get("packages")
    installed = packages if isinstance(packages, Mapping) else {}
    machine = {name: value for name, value in study.machine.items() if name != "packages"}
    machine |= {name: value for name, value in installed.items() if value is not None and name != "oldlogits"}
    where = ", ".join(f"{name} {value}" for name, value in machine.items())
    code = re.sub(r"\b([0-9a-f]{7})[0-9a-f]{33}\b", r"\1", " ".join(study.code.values()))
    return f"oldlogits {code} · {where} · {study.budget.cpu_s / 3600:.2f} CPU hours, {study.budget.wall_s / 60:.0f} minutes"


def _parts(study: Study) -> list[Part]:
    tables = tables_of(study)
    figures = {
        "Learning": learning_figures(study),
        "Decision error": decision_figures(study.decision),
        "System cost": cost_figures(study),
    }
    legends = {"Decision error": decision_legend(study.decision)}
    return [
        Part(
            name=name,
            legend=legends.get(name, ()),
            groups=figures.get(name, ()),
            tables=[table for table in tables if table.part == name],
        )
        for name in dict.fromkeys(table.part for table in tables)
    ]


def _cards(study: Study) -> list[Card]:
    tests = [c for c in all_contrasts(study.declaration, study.learning) if c.adjusted is not None]
    shown = [c for c in tests if c.estimate and c.estimate.sign and c.adjusted is not None and c.adjusted < 0.05]
    bars = collapse_bars(study.learning)
    collapsed = sum(run.success < bars[run.regime] for run in study.learning)
    early = sum(bool(run.error) for run in study.learning)
    short = len(missing(study))
    traces = {(e.driver, e.trace, e.seed, e.window, e.lag, e.engine) for e in study.decision}
    return [
        Card(label="declared tests", value=f"{len(shown)} of {len(tests)}", detail="show a difference after Holm"),
        Card(label="learning runs", value=f"{len(study.learning):,}", detail=f"and {len(study.pilot):,} pilot runs"),
        Card(label="collapses", value=str(collapsed), detail=f"below {COLLAPSE:g} of the best; {early} ended early"),
        Card(label="traces", value=f"{len(traces):,}", detail=f"{len(study.decision):,} decision errors"),
        Card(
            label="as declared",
            value="complete" if not short else "incomplete",
            detail="nothing is missing" if not short else f"{short} of its parts",
            tone="good" if not short else "bad",
        ),
    ]
