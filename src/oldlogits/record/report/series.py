"""Metrics of updates as lines over versions: what most figures of the report are."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Final

from oldlogits.record.events import Updated
from oldlogits.record.report import charts
from oldlogits.record.report.charts import Figure, Line
from oldlogits.record.report.data import RunData

Draw = Callable[[RunData, Sequence[Updated]], Figure | None]
"""Draws a figure of a run and of its updates; None: nothing was recorded for it."""

_OUTLIER: Final = 2.0
"""A first update of more than this times all others does not set the axis."""


def metrics(title: str, labels: Mapping[str, str], caption: str, *, percent: bool = False, from_zero: bool = False) -> Draw:
    """Draw the labelled metrics over versions, as recorded."""

    def draw(_: RunData, updates: Sequence[Updated]) -> Figure | None:
        found = {key: points for key in labels if (points := series(updates, key))}
        if not found:
            return None
        text = ("{:.2%}" if percent else "{:.4g}").format
        lines = [
            Line(label=labels[key], points=points, colour=f"c{index % 5}", text=text)
            for index, (key, points) in enumerate(found.items())
        ]
        values, beyond = within_axis(list(found.values()))
        y = charts.y_axis(0.0 if from_zero else min(values), max(values), percent=percent)
        svg = charts.line_chart(versions_axis(updates), y, lines, x_label="version")
        said = " ".join(filter(None, (caption, beyond)))
        return Figure(title=title, caption=said, svg=svg, legend=legend(lines) if len(lines) > 1 else ())

    return draw


def within_axis(found: Sequence[Sequence[charts.Point]]) -> tuple[list[float], str]:
    """Return the values that set an axis, and what to say where the first update, which compiles, goes beyond it."""
    later = [value for points in found for _, value in points[1:]]
    first = max((points[0][1] for points in found), default=0.0)
    if later and max(later) > 0 and first > _OUTLIER * max(later):
        return later, f"The first update, {first:.3g}, goes beyond the axis."
    return [value for points in found for _, value in points], ""


def series(updates: Sequence[Updated], key: str) -> list[charts.Point]:
    """Return the points (version, value) of a metric, where it was recorded and is finite."""
    points = [(float(update.version), update.metrics[key]) for update in updates if key in update.metrics]
    return [point for point in points if math.isfinite(point[1])]


def smooth(label: str, points: Sequence[charts.Point], colour: str) -> Line:
    """A centred moving average over about a fifteenth of the run."""
    half = len(points) // 30
    mean = [
        (at, fmean(value for _, value in points[max(0, index - half) : index + half + 1]))
        for index, (at, _) in enumerate(points)
    ]
    return Line(label=f"{label}, moving average", points=mean, colour=colour)


def versions_axis(updates: Sequence[Updated]) -> charts.Axis:
    """Return the axis from the first to the last of these updates."""
    return charts.x_axis(updates[0].version, updates[-1].version, whole=True)


def legend(lines: Sequence[Line]) -> tuple[tuple[str, str], ...]:
    """Return the colour and the label of each line."""
    return tuple((line.colour, line.label) for line in lines)
