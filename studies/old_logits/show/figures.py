"""The study's pictures: contrasts, every run, curves, decision errors by window, error against cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import Final, Literal

from oldlogits.core.loss import LOSSES
from oldlogits.record.report import charts
from oldlogits.record.report.charts import Figure, Line
from studies.old_logits.analyse.contrasts import (
    COLLAPSE,
    Axis,
    Contrast,
    MethodRow,
    all_contrasts,
    collapse_bars,
    mean_curve,
    method_rows,
)
from studies.old_logits.layout import interval, plus_minus
from studies.old_logits.measure.decision import DecisionError
from studies.old_logits.results import LearningRun, Regime, Study
from studies.old_logits.show.charts import Dot, Mark, Row, row_chart, scatter_chart
from studies.old_logits.show.cost_tables import choices
from studies.old_logits.show.decision_tables import main_band, proximal_policies
from studies.old_logits.show.learning_tables import VIEW_NAMES

Style = Literal["plain", "raw", "dashed", "dots"]

LOOKS: Final[dict[str, tuple[str, Style]]] = {
    "exact": ("c6", "plain"),
    "dedicated": ("c6", "raw"),
    "interruption": ("c6", "raw"),
    "eager": ("c6", "raw"),
    "arrival": ("c1", "plain"),
    "ewma": ("c0", "plain"),
    "ewma-mean-lag": ("c0", "raw"),
    "ewma-auto": ("c0", "dashed"),
    "ewma-reset-paper": ("c0", "raw"),
    "ewma-reset-guarded": ("c0", "dots"),
    "aged": ("c3", "plain"),
    "rescore": ("c5", "plain"),
    "linear": ("c2", "plain"),
    "log-linear": ("c2", "dashed"),
    "mu": ("c4", "plain"),
    "exact-r_d-1": ("c6", "dashed"),
    "truncated-is": ("c4", "dashed"),
    "mis-balance": ("c1", "dots"),
    "synchronous": ("c6", "dots"),
}
"""Colour and line of a method or proximal policy: one colour a family, the same on the whole page."""

_LINES: Final[tuple[Style, ...]] = ("plain", "dashed", "dots", "raw")


def look(method: str) -> tuple[str, Style]:
    """Colour and line of a method; a loss over its policies has its colour, and a line of the loss's own."""
    loss, _, base = method.rpartition("@")
    return (LOOKS[base][0], _LINES[LOSSES.names.index(loss) % len(_LINES)]) if loss else LOOKS[base]


_BAD: Final = "bad"


def learning_figures(study: Study) -> list[list[Figure]]:
    """Rows of pictures: the contrasts, then, regime by regime, every run and the curves."""
    if not study.learning:
        return []
    contrasts = all_contrasts(study.declaration, study.learning)
    primary = study.declaration.primary
    axes: tuple[Axis, Axis] = ("update", "cpu_s")
    shown = [[_forest(study, [c for c in contrasts if (c.view, c.axis) == (primary, axis)], axis) for axis in axes]]
    for regime in study.declaration.regimes:
        rows = method_rows(study.declaration, study.learning, regime, primary)
        if any(row.runs for row in rows):
            shown.append([_every_run(study, regime, rows), *(_curves(study, regime, rows, axis) for axis in axes)])
    return shown


def decision_figures(errors: Sequence[DecisionError]) -> list[list[Figure]]:
    """Error against window: a row an engine, a picture a lag shape, at the declared band; all on one scale."""
    if not errors:
        return []
    band = main_band(errors)
    kept = [e for e in errors if e.band == band]
    medians = {
        (engine, lag, name, window): median(found)
        for engine, lag, name, window in dict.fromkeys((e.engine, e.lag, e.proximal_policy, e.window) for e in kept)
        if (
            found := [e.by_count for e in kept if (e.engine, e.lag, e.proximal_policy, e.window) == (engine, lag, name, window)]
        )
    }
    positive = [value for value in medians.values() if value > 0]
    if not positive:
        return []
    windows = sorted({e.window for e in kept})
    x = charts.x_axis(max(windows[0], 1) * 0.9, windows[-1] * 1.1, transform="log")
    x = replace(x, ticks=tuple(float(window) for window in windows if window))
    low, high = 0.8 * min(positive), 1.25 * max(positive)
    ticks = tuple(tick for tick in charts.log_ticks(low, high) if low <= tick <= high)
    y = replace(charts.y_axis(low, high, transform="log"), low=low, high=high, ticks=ticks, text=lambda v: f"{100 * v:g}%")
    caption = f"Tokens decided otherwise than with the old logits, band {band:g}; median over traces."

    def picture(engine: str, lag: str) -> Figure:
        svg = charts.line_chart(x, y, _by_window(medians, engine, lag, windows), x_label="window (largest lag, versions)")
        return Figure(title=f"{engine}, {lag} lags", caption=caption, svg=svg)

    lags = {
        engine: dict.fromkeys(e.lag for e in kept if e.engine == engine) for engine in dict.fromkeys(e.engine for e in kept)
    }
    return [[picture(engine, lag) for lag in own] for engine, own in lags.items()]


def decision_legend(errors: Sequence[DecisionError]) -> tuple[tuple[str, str], ...]:
    """The look of every proximal policy, and its name."""
    return tuple((" ".join(LOOKS[name]), name) for name in proximal_policies(errors))


def _by_window(medians: dict[tuple[str, str, str, int], float], engine: str, lag: str, windows: Sequence[int]) -> list[Line]:
    lines = []
    for name in dict.fromkeys(key[2] for key in medians):
        points = [(float(w), medians[engine, lag, name, w]) for w in windows if w and (engine, lag, name, w) in medians]
        points = [(at, value if value > 0 else math.nan) for at, value in points]
        colour, style = LOOKS[name]
        lines.append(Line(label=name, points=points, colour=colour, style=style, text="{:.2%}".format))
    return lines


def cost_figures(study: Study) -> list[list[Figure]]:
    """Decision error against cost, a picture an engine; the dashed line joins the choices on the frontier."""
    shown = []
    for engine, own in choices(study).items():
        x = charts.x_axis(0.0, 1.15 * max(choice.extra_s for choice in own) or 1.0)
        y = charts.y_axis(0.0, max(choice.error for choice in own), percent=True)
        marks = [
            Mark(
                x=choice.extra_s,
                y=choice.error,
                label=choice.name,
                colour=LOOKS.get(choice.name, LOOKS["exact"])[0],
                tip=f"{choice.name}\n{choice.error:.2%} of tokens\n{choice.extra_s:.3f} s",
            )
            for choice in own
        ]
        path = [(choice.extra_s, choice.error) for choice in own if choice.on_frontier]
        shown.append(
            Figure(
                title=f"{engine}: decision error against cost",
                caption="Left and low is better. The dashed line joins those that no other one beats; costs within the "
                "noise count as equal. Overlapped work and stalls of the engine are not in the seconds.",
                svg=scatter_chart(x, y, marks, x_label="seconds that the route adds to an update", path=path),
            )
        )
    return [shown[at : at + 2] for at in range(0, len(shown), 2)]


def _forest(study: Study, contrasts: Sequence[Contrast], axis: Axis) -> Figure:
    """One row a contrast, under its regime."""
    rows = []
    for name in dict.fromkeys(contrast.regime for contrast in contrasts):
        rows.append(Row(label=name, is_heading=True))
        own = [contrast for contrast in contrasts if contrast.regime == name]
        for index, contrast in enumerate(own):
            found, label = contrast.estimate, f"{contrast.first} - {contrast.second}"
            if found is None:
                rows.append(Row(label=label, note="missing"))
                continue
            ends = [found.mean if math.isinf(end) else end for end in (found.low, found.high)]
            tip = f"{label}\n{interval(found)}, {found.n} of {contrast.num_declared} blocks"
            rows.append(Row(label=label, mean=(ends[0], found.mean, ends[1]), colour=f"c{(0, 1, 2, 3)[index % 4]}", tip=tip))
    values = [value for row in rows if row.mean for value in row.mean] or [0.0]
    x = charts.x_axis(*_padded(min(0.0, *values), max(0.0, *values)))
    primary = VIEW_NAMES[study.declaration.primary]
    title, how = {
        "update": ("The declared contrasts", "Final success"),
        "cpu_s": (
            "The same at equal CPU seconds (exploratory)",
            "A rough comparison: success where the cheaper run of each pair ends",
        ),
    }[axis]
    return Figure(
        title=title,
        caption=f"{how}, {primary}: first minus second, paired over blocks, with 95% t intervals.",
        svg=row_chart(x, rows, x_label="difference in success", null=0.0),
    )


def _every_run(study: Study, regime: Regime, rows: Sequence[MethodRow]) -> Figure:
    bar = collapse_bars(study.learning)[regime.name]
    shown = []
    for row in rows:
        found = row.success
        if found is None:
            shown.append(Row(label=row.method, note="missing"))
            continue
        colour = look(row.method)[0]
        ends = [found.mean if math.isinf(end) else end for end in (found.low, found.high)]
        tip = f"{row.method}: {plus_minus(found)}, {found.n} of {row.num_declared} blocks"
        dots = [_dot(run, bar, colour) for run in row.runs]
        shown.append(Row(label=row.method, dots=dots, mean=(ends[0], found.mean, ends[1]), colour=colour, tip=tip))
    return Figure(
        title=f"{regime.name}: every run",
        caption=f"Final success, {VIEW_NAMES[study.declaration.primary]}: each run, and the mean with its 95% interval. "
        f"Collapsed: below {bar:.3f}, {COLLAPSE:g} of the best mean of the regime in any view.",
        svg=row_chart(charts.x_axis(0.0, 1.0), shown, x_label="held-out success"),
        legend=((_BAD, "collapsed"),),
    )


def _dot(run: LearningRun, bar: float, colour: str) -> Dot:
    collapsed = run.success < bar
    tip = (
        f"block {run.block}: {run.success:.3f}" + (", collapsed" if collapsed else "") + (f"\n{run.error}" if run.error else "")
    )
    return Dot(x=run.success, colour=_BAD if collapsed else f"{colour} faint", tip=tip)


def _curves(study: Study, regime: Regime, rows: Sequence[MethodRow], axis: Axis) -> Figure:
    compared = {method for pair in study.declaration.contrasts for method in pair}
    lines = []
    for row in rows:
        points = mean_curve(row.runs, axis)
        colour, style = look(row.method)
        if points:
            shown: Style = style if row.method in compared else "raw"
            lines.append(Line(label=row.method, points=points, colour=colour, style=shown, text="{:.3f}".format))
    end = max((at for line in lines for at, _ in line.points), default=0.0) or 1.0
    what = {"update": "updates", "cpu_s": "CPU seconds"}[axis]
    bold = [line for line in lines if line.label in compared]
    return Figure(
        title=f"{regime.name}: success by {what}",
        caption=f"Mean over blocks, {VIEW_NAMES[study.declaration.primary]}. Faint: methods outside of the contrasts; hover to "
        "see them all.",
        svg=charts.line_chart(charts.x_axis(0.0, end), charts.y_axis(0.0, 1.0), lines, x_label=what),
        legend=tuple((line.colour, line.label) for line in bold),
    )


def _padded(low: float, high: float) -> tuple[float, float]:
    margin = 0.05 * (high - low or 1.0)
    return low - margin, high + margin
