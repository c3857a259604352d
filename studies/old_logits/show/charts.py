"""Row charts and scatter charts, beside those of a run's report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from markupsafe import Markup

from oldlogits.record.report.charts import (
    BOTTOM,
    LEFT,
    TOP,
    WIDTH,
    Axis,
    Line,
    Point,
    draw_dot,
    draw_line,
    draw_rect,
    draw_segment,
    draw_text,
    draw_x_axis,
    frame,
    svg,
)

ROW_LEFT: Final = 150
ROW_HEIGHT: Final = 22
"""Pixels: where the axis of a row chart begins, and how high a row is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dot:
    """A value, drawn as a dot."""

    x: float
    colour: str
    tip: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A line of a row chart: its dots, and over them a mean with its interval ``(low, mean, high)``.

    Args:
        label: The text at the left.
        dots: Single values, in any order.
        mean: The mean with the ends of its interval; None: there is none.
        colour: The CSS class of the mean.
        tip: The tooltip of the mean.
        note: A text in the place of dots and mean.
        is_heading: Whether the label is a heading over the rows below it.
    """

    label: str
    dots: Sequence[Dot] = ()
    mean: tuple[float, float, float] | None = None
    colour: str = "c0"
    tip: str = ""
    note: str = ""
    is_heading: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """A labelled point of a scatter chart."""

    x: float
    y: float
    label: str
    colour: str
    tip: str


def row_chart(x: Axis, rows: Sequence[Row], *, x_label: str, null: float | None = None) -> Markup:
    """Rows over one x axis, the first at the top; `null` is a vertical line to compare with."""
    x = replace(x, start=ROW_LEFT)
    bottom = TOP + ROW_HEIGHT * len(rows)
    parts = []
    if null is not None:
        parts.append(draw_segment("bound", (x.at(null), x.at(null)), (TOP, bottom)))
    for index, row in enumerate(rows):
        parts += _row(row, x, TOP + ROW_HEIGHT * (index + 0.5))
    return svg([*draw_x_axis(x, "grid", TOP, bottom, x_label), *parts], bottom)


def _row(row: Row, x: Axis, middle: float) -> list[str]:
    """Label, mean and interval; dots stand above the interval so that neither hides the other."""
    style = "heading" if row.is_heading else "rowlabel"
    parts = [draw_text(ROW_LEFT - 8, middle + 4, row.label, f'text-anchor="end" class="{style}"')]
    if row.note:
        parts.append(draw_text(ROW_LEFT + 8, middle + 4, row.note, ""))
    if row.mean is not None:
        at = middle + (4 if row.dots else 0)
        low, mean, high = (x.at(value) for value in row.mean)
        path = f"M{low:.1f},{at - 4:.1f}v8M{high:.1f},{at - 4:.1f}v8M{low:.1f},{at:.1f}H{high:.1f}"
        parts.append(f'<path class="whisker {row.colour}" d="{path}"/>')
        parts.append(draw_dot(row.colour, mean, at, "4.5"))
        parts.append(draw_rect("hit", low - 5, at - 5, high - low + 10, 10, row.tip))
    parts += [draw_dot(dot.colour, x.at(dot.x), middle - 5, "3.5", dot.tip) for dot in row.dots]
    return parts


def scatter_chart(x: Axis, y: Axis, marks: Sequence[Mark], *, x_label: str, path: Sequence[Point] = ()) -> Markup:
    """Labelled points, and under them a dashed line along `path`. A label stands where it covers no other."""
    parts = [draw_line(Line(label="", points=path, colour="c4", style="dashed"), x, y)] if path else []
    taken = [(x.at(mark.x) - 6, y.at(mark.y) - 6, x.at(mark.x) + 6, y.at(mark.y) + 6) for mark in marks]
    for mark in marks:
        at, height, width = x.at(mark.x), y.at(mark.y), 6.2 * len(mark.label)
        places = [
            (at + 9 if side > 0 else at - 9 - width, height + 4 + shift)
            for shift in (0, -12, 12, -24, 24, -36, 36, -48, 48)
            for side in (1, -1)
        ]
        boxes = [(left, top - 10, left + width, top + 2) for left, top in places]
        inside = [box for box in boxes if box[0] >= LEFT and box[2] <= WIDTH and box[1] >= 0 and box[3] <= BOTTOM] or boxes
        free = next((box for box in inside if not any(_overlap(box, other) for other in taken)), inside[0])
        taken.append(free)
        parts.append(draw_dot(mark.colour, at, height, "5"))
        parts.append(draw_text(free[0], free[3] - 2, mark.label, 'class="boundlabel"'))
        parts.append(draw_rect("hit", at - 8, height - 8, 16, 16, mark.tip))
    return frame(x, y, parts, x_label)


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
