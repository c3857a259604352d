"""Charts as inline SVG: axes, lines, bars and areas. Colours are CSS classes (``c0`` to ``c4``) of the page."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Final, Literal

from markupsafe import Markup

WIDTH: Final = 480
HEIGHT: Final = 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 468, 12, 208
_ROW_LEFT, _ROW_HEIGHT = 150, 22

Point = tuple[float, float]
Transform = Literal["linear", "log"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """A range of values and the pixels that it is drawn on.

    Args:
        low: The value at `start`.
        high: The value at `end`, above `low`.
        start: Pixel.
        end: Pixel.
        ticks: Values to label.
        transform: "log" places values by their logarithm; `low` is then above 0.
        text: How a tick is written.
    """

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]
    transform: Transform = "linear"
    text: Callable[[float], str] = "{:g}".format

    def at(self, value: float) -> float:
        """The pixel of a value, kept within the axis."""
        value = min(max(value, self.low), self.high)
        if self.transform == "log":
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A series of points; a point that is not finite interrupts it.

    Args:
        label: Its name, in the legend and in tooltips.
        points: (x, y), x ascending.
        colour: A CSS class, "c0" to "c4".
        style: "raw" is drawn faint, "dashed" dashed, "dots" with its points marked.
        text: How a value is written in tooltips.
    """

    label: str
    points: Sequence[Point]
    colour: str
    style: Literal["plain", "raw", "dashed", "dots"] = "plain"
    text: Callable[[float], str] = "{:.4g}".format


@dataclass(frozen=True, slots=True, kw_only=True)
class Whisker:
    """A measured point with its interval."""

    x: float
    mean: float
    low: float
    high: float
    colour: str
    tip: str


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
        label: At the left.
        dots: In any order.
        mean: None: there is none.
        colour: A CSS class, of the mean.
        tip: Of the mean.
        note: In the place of dots and mean.
        is_heading: Of the rows below it.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """A bar of `value`, whose part `marked` is drawn in the second colour over it (log axes: from the same base)."""

    low: float
    high: float
    value: float
    tip: str
    marked: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """A vertical line with a label: a bound on the values of the x axis."""

    x: float
    label: str


def x_axis(low: float, high: float, *, transform: Transform = "linear", whole: bool = False) -> Axis:
    """A horizontal axis over exactly ``[low, high]``; `whole` labels integers only."""
    if high <= low:
        low, high = low - 0.5, high + 0.5
    ticks = log_ticks(low, high) if transform == "log" else nice_ticks(low, high, 6)
    kept = tuple(tick for tick in ticks if low <= tick <= high and not (whole and tick != round(tick)))
    text = "{:.7g}".format
    return Axis(low=low, high=high, start=_LEFT, end=_RIGHT, ticks=kept, transform=transform, text=text)


def y_axis(low: float, high: float, *, transform: Transform = "linear", percent: bool = False) -> Axis:
    """A vertical axis that covers ``[low, high]``, widened to whole ticks."""
    if transform == "log":
        low, high = 10.0 ** math.floor(math.log10(low)), 10.0 ** math.ceil(math.log10(high) + 1e-9)
        exponents = range(round(math.log10(low)), round(math.log10(high)) + 1)
        ticks = tuple(10.0**exponent for exponent in exponents[:: max(1, len(exponents) // 4)])
    else:
        if high <= low:
            high = low + (abs(low) or 1.0)
        ticks = nice_ticks(low, high, 5)
        low, high = min(ticks[0], low), max(ticks[-1], high)
    text = _percent if percent else _power if transform == "log" else _short
    return Axis(low=low, high=high, start=_BOTTOM, end=_TOP, ticks=ticks, transform=transform, text=text)


def nice_ticks(low: float, high: float, count: int) -> tuple[float, ...]:
    """About `count` steps of 1, 2 or 5 times a power of ten that cover ``[low, high]``.

    Example:
        >>> nice_ticks(0.0, 0.93, 5)
        (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    """
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    digits = max(0, -math.floor(math.log10(step)) + 1)
    first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
    return tuple(round(index * step, digits) for index in range(first, last + 1))


def log_ticks(low: float, high: float) -> tuple[float, ...]:
    """Ticks of a ratio's axis: even ones where the range is narrow, 1, 2, 5 times powers of ten where it is wide."""
    if high / low < 4:
        return nice_ticks(low, high, 5)
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if last - first <= 3 else (1,)
    return tuple(factor * 10.0**exponent for exponent in range(first, last + 1) for factor in factors)


def line_chart(x: Axis, y: Axis, lines: Sequence[Line], *, x_label: str, whiskers: Sequence[Whisker] = ()) -> Markup:
    """Lines over x, points with intervals on top, and a tooltip for every x."""
    parts = [_path(line, x, y) for line in lines]
    parts += _columns(lines, x, x_label)
    parts += [_whisker(whisker, x, y) for whisker in whiskers]
    return _svg(x, y, parts, x_label)


def bar_chart(x: Axis, y: Axis, bars: Sequence[Bar], *, x_label: str, bounds: Sequence[Bound] = ()) -> Markup:
    """Bars, and bounds drawn over them."""
    parts = []
    for bar in bars:
        left, width = x.at(bar.low), max(x.at(bar.high) - x.at(bar.low) - 1, 0.5)
        for value, colour in ((bar.value, "c0"), (bar.marked, "c1")):
            if value > 0:
                top = y.at(value)
                parts.append(_rect(left, top, width, max(_BOTTOM - top, 1), f"fill {colour}", ""))
        parts.append(_rect(left, _TOP, width + 1, _BOTTOM - _TOP, "hit", bar.tip))
    for index, bound in enumerate(bounds):
        at, row = x.at(bound.x), _TOP + 10 + 13 * (index % 2)
        anchor, offset = ("end", -4) if at > (_LEFT + _RIGHT) / 2 else ("start", 4)
        parts.append(f'<line class="bound" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{_BOTTOM}"/>')
        parts.append(_text(at + offset, row, bound.label, f'class="boundlabel" text-anchor="{anchor}"'))
    return _svg(x, y, parts, x_label)


def row_chart(x: Axis, rows: Sequence[Row], *, x_label: str, null: float | None = None) -> Markup:
    """Rows over one x axis, the first at the top; `null` is a vertical line to compare with."""
    x = replace(x, start=_ROW_LEFT)
    bottom = _TOP + _ROW_HEIGHT * len(rows)
    parts = []
    if null is not None:
        parts.append(f'<line class="bound" x1="{x.at(null):.1f}" x2="{x.at(null):.1f}" y1="{_TOP}" y2="{bottom}"/>')
    for index, row in enumerate(rows):
        parts += _row(row, x, _TOP + _ROW_HEIGHT * (index + 0.5))
    return _frame(x, None, parts, x_label, bottom=bottom)


def _row(row: Row, x: Axis, middle: float) -> list[str]:
    """Label, mean and interval; dots stand above the interval so that neither hides the other."""
    style = "heading" if row.is_heading else "rowlabel"
    parts = [_text(_ROW_LEFT - 8, middle + 4, row.label, f'text-anchor="end" class="{style}"')]
    if row.note:
        parts.append(_text(_ROW_LEFT + 8, middle + 4, row.note, ""))
    if row.mean is not None:
        at = middle + (4 if row.dots else 0)
        low, mean, high = (x.at(value) for value in row.mean)
        path = f"M{low:.1f},{at - 4:.1f}v8M{high:.1f},{at - 4:.1f}v8M{low:.1f},{at:.1f}H{high:.1f}"
        parts.append(f'<path class="whisker {row.colour}" d="{path}"/>')
        parts.append(f'<circle class="dot {row.colour}" cx="{mean:.1f}" cy="{at:.1f}" r="4.5"/>')
        parts.append(_rect(low - 5, at - 5, high - low + 10, 10, "hit", row.tip))
    for dot in row.dots:
        tip = Markup(' data-tip="{}"').format(dot.tip)
        parts.append(f'<circle class="dot {dot.colour}" cx="{x.at(dot.x):.1f}" cy="{middle - 5:.1f}" r="3.5"{tip}/>')
    return parts


def scatter_chart(x: Axis, y: Axis, marks: Sequence[Mark], *, x_label: str, path: Sequence[Point] = ()) -> Markup:
    """Labelled points, and under them a dashed line along `path`. A label stands where it covers no other."""
    parts = [_path(Line(label="", points=path, colour="c4", style="dashed"), x, y)] if path else []
    taken = [(x.at(mark.x) - 6, y.at(mark.y) - 6, x.at(mark.x) + 6, y.at(mark.y) + 6) for mark in marks]
    for mark in marks:
        at, height, width = x.at(mark.x), y.at(mark.y), 6.2 * len(mark.label)
        places = [
            (at + 9 if side > 0 else at - 9 - width, height + 4 + shift)
            for shift in (0, -12, 12, -24, 24, -36, 36, -48, 48)
            for side in (1, -1)
        ]
        boxes = [(left, top - 10, left + width, top + 2) for left, top in places]
        inside = [box for box in boxes if box[0] >= _LEFT and box[2] <= WIDTH and box[1] >= 0 and box[3] <= _BOTTOM] or boxes
        free = next((box for box in inside if not any(_overlap(box, other) for other in taken)), inside[0])
        taken.append(free)
        parts.append(f'<circle class="dot {mark.colour}" cx="{at:.1f}" cy="{height:.1f}" r="5"/>')
        parts.append(_text(free[0], free[3] - 2, mark.label, 'class="boundlabel"'))
        parts.append(_rect(at - 8, height - 8, 16, 16, "hit", mark.tip))
    return _svg(x, y, parts, x_label)


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def stacked_chart(x: Axis, y: Axis, lines: Sequence[Line], *, x_label: str) -> Markup:
    """Areas on top of each other, the first at the bottom. All lines have the same x; y is finite."""
    parts = []
    base = [0.0] * len(lines[0].points)
    for line in lines:
        top = [low + value for low, (_, value) in zip(base, line.points, strict=True)]
        upper = [f"{x.at(at):.1f},{y.at(value):.1f}" for (at, _), value in zip(line.points, top, strict=True)]
        lower = [f"{x.at(at):.1f},{y.at(value):.1f}" for (at, _), value in zip(line.points, base, strict=True)]
        parts.append(f'<polygon class="fill {line.colour}" points="{" ".join(upper + lower[::-1])}"/>')
        base = top
    return _svg(x, y, parts + _columns(lines, x, x_label), x_label)


def _svg(x: Axis, y: Axis, parts: Sequence[str], x_label: str) -> Markup:
    return _frame(x, y, parts, x_label, bottom=_BOTTOM)


def _frame(x: Axis, y: Axis | None, parts: Sequence[str], x_label: str, *, bottom: float) -> Markup:
    """The picture: grid lines of y, or of x where there is no y axis; ticks, labels, and the parts on top."""
    frame = []
    if y is not None:
        for tick in y.ticks:
            at = y.at(tick)
            frame.append(f'<line class="grid" x1="{_LEFT}" x2="{_RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
            frame.append(_text(_LEFT - 7, at + 4, y.text(tick), 'text-anchor="end"'))
    for tick in x.ticks:
        at = x.at(tick)
        style, top = ("tick", bottom) if y else ("grid", _TOP)
        frame.append(f'<line class="{style}" x1="{at:.1f}" x2="{at:.1f}" y1="{top}" y2="{bottom + 4}"/>')
        frame.append(_text(at, bottom + 18, x.text(tick), 'text-anchor="middle"'))
    frame.append(f'<line class="base" x1="{x.start}" x2="{_RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    frame.append(_text((x.start + _RIGHT) / 2, bottom + 36, x_label, 'text-anchor="middle" class="axislabel"'))
    size = f"0 0 {WIDTH} {bottom + HEIGHT - _BOTTOM}"
    return Markup(f'<svg viewBox="{size}" role="img">{"".join(frame)}{"".join(parts)}</svg>')


def _path(line: Line, x: Axis, y: Axis) -> str:
    commands, pen, dots = [], "M", []
    for at, value in line.points:
        if not math.isfinite(value):
            pen = "M"
            continue
        commands.append(f"{pen}{x.at(at):.1f},{y.at(value):.1f}")
        if line.style == "dots" or len(line.points) == 1:
            dots.append(f'<circle class="dot {line.colour}" cx="{x.at(at):.1f}" cy="{y.at(value):.1f}" r="3"/>')
        pen = "L"
    return f'<path class="line {line.colour} {line.style}" d="{"".join(commands)}"/>' + "".join(dots)


def _columns(lines: Sequence[Line], x: Axis, name: str) -> list[str]:
    """One invisible column per x with the values of all lines as its tooltip."""
    values: dict[float, list[str]] = {}
    for line in lines:
        for at, value in line.points:
            values.setdefault(at, []).append(f"{line.label}: {line.text(value)}")
    if not values:
        return []
    places = sorted(values)
    edges = [x.low, *((a + b) / 2 for a, b in pairwise(places)), x.high]
    return [
        _rect(
            x.at(left), _TOP, x.at(right) - x.at(left), _BOTTOM - _TOP, "hit", "\n".join([f"{name} {x.text(at)}", *values[at]])
        )
        for at, (left, right) in zip(places, pairwise(edges), strict=True)
    ]


def _whisker(whisker: Whisker, x: Axis, y: Axis) -> str:
    at, low, mean, high = x.at(whisker.x), y.at(whisker.low), y.at(whisker.mean), y.at(whisker.high)
    caps = f"M{at - 4:.1f},{low:.1f}h8M{at - 4:.1f},{high:.1f}h8M{at:.1f},{low:.1f}V{high:.1f}"
    dot = f'<circle class="dot {whisker.colour}" cx="{at:.1f}" cy="{mean:.1f}" r="4.5"/>'
    hit = _rect(at - 7, min(high, mean) - 5, 14, abs(low - high) + 10, "hit", whisker.tip)
    return f'<path class="whisker {whisker.colour}" d="{caps}"/>{dot}{hit}'


def _rect(left: float, top: float, width: float, height: float, style: str, tip: str) -> str:
    label = Markup(' data-tip="{}"').format(tip) if tip else ""
    return f'<rect class="{style}" x="{left:.1f}" y="{top:.1f}" width="{max(width, 0):.1f}" height="{height:.1f}"{label}/>'


def _text(left: float, top: float, text: str, attributes: str) -> str:
    return f'<text x="{left:.1f}" y="{top:.1f}" {attributes}>{Markup.escape(text)}</text>'


def _percent(value: float) -> str:
    return f"{100 * value:.6g}%"


def _power(value: float) -> str:
    """`0.1`, `1e-4`: a power of ten."""
    return f"{value:g}" if 0.001 <= value <= 1000 else f"1e{round(math.log10(value))}"


def _short(value: float) -> str:
    """`12.5k`, `0.02`: a number in few characters."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"
