"""Charts as inline SVG: axes, lines, bars and areas. Colours are CSS classes (``c0`` to ``c4``) of the page."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, Literal

from markupsafe import Markup

WIDTH: Final = 480
HEIGHT: Final = 250
LEFT, RIGHT, TOP, BOTTOM = 52, 468, 12, 208
"""The pixels of a picture, and of the box in it that its axes span."""

Point = tuple[float, float]
Transform = Literal["linear", "log"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """A range of values and the pixels that it is drawn on.

    Args:
        low: The value at the pixel `start`.
        high: The value at the pixel `end`, above `low`.
        start: The pixel where the axis begins.
        end: The pixel where it ends.
        ticks: The values to label.
        transform: "log" places values by their logarithm; `low` is then above 0.
        text: Writes a tick's value.
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
        label: The name in the legend and in tooltips.
        points: Pairs (x, y), x ascending.
        colour: A CSS class, "c0" to "c4".
        style: "raw" is drawn faint, "dashed" dashed, "dots" with its points marked.
        text: Writes a value in tooltips.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A chart with its title, its legend (colour class and label), a sentence on how to read it, and its numbers.

    A table is a row of column names and the rows below it.
    """

    title: str
    caption: str
    svg: Markup
    legend: tuple[tuple[str, str], ...] = ()
    table: tuple[tuple[str, ...], ...] = ()

    @property
    def labelled(self) -> Markup:
        """The picture with what a screen reader says of it; the keyboard reaches it, and arrow keys go from value to value."""
        before, found, after = str(self.svg).partition('role="img"')
        said = f"{self.title}. {self.caption} Arrow keys read the values."
        label = Markup(' tabindex="0" aria-label="{}"').format(said)
        return Markup(before) + Markup(found) + label + Markup(after)


def x_axis(low: float, high: float, *, transform: Transform = "linear", whole: bool = False) -> Axis:
    """A horizontal axis over exactly ``[low, high]``; `whole` labels integers only."""
    if high <= low:
        low, high = low - 0.5, high + 0.5
    ticks = log_ticks(low, high) if transform == "log" else nice_ticks(low, high, 6)
    kept = tuple(tick for tick in ticks if low <= tick <= high and not (whole and tick != round(tick)))
    text = "{:.7g}".format
    return Axis(low=low, high=high, start=LEFT, end=RIGHT, ticks=kept, transform=transform, text=text)


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
    return Axis(low=low, high=high, start=BOTTOM, end=TOP, ticks=ticks, transform=transform, text=text)


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
    parts = [draw_line(line, x, y) for line in lines]
    parts += _columns(lines, x, x_label)
    parts += [_whisker(whisker, x, y) for whisker in whiskers]
    return frame(x, y, parts, x_label)


def bar_chart(x: Axis, y: Axis, bars: Sequence[Bar], *, x_label: str, bounds: Sequence[Bound] = ()) -> Markup:
    """Bars, and bounds drawn over them."""
    parts = []
    for bar in bars:
        left, width = x.at(bar.low), max(x.at(bar.high) - x.at(bar.low) - 1, 0.5)
        for value, colour in ((bar.value, "c0"), (bar.marked, "c1")):
            if value > 0:
                top = y.at(value)
                parts.append(draw_rect(f"fill {colour}", left, top, width, max(BOTTOM - top, 1)))
        parts.append(draw_rect("hit", left, TOP, width + 1, BOTTOM - TOP, bar.tip))
    for index, bound in enumerate(bounds):
        at, row = x.at(bound.x), TOP + 10 + 13 * (index % 2)
        anchor, offset = ("end", -4) if at > (LEFT + RIGHT) / 2 else ("start", 4)
        parts.append(draw_segment("bound", (at, at), (TOP, BOTTOM)))
        parts.append(draw_text(at + offset, row, bound.label, f'class="boundlabel" text-anchor="{anchor}"'))
    return frame(x, y, parts, x_label)


def stacked_chart(x: Axis, y: Axis, lines: Sequence[Line], *, x_label: str) -> Markup:
    """Areas on top of each other, the first at the bottom. All lines have the same x; y is finite."""
    parts = []
    base = [0.0] * len(lines[0].points)
    for line in lines:
        top = [low + value for low, (_, value) in zip(base, line.points, strict=True)]
        upper, lower = (
            [f"{x.at(at):.1f},{y.at(value):.1f}" for (at, _), value in zip(line.points, edge, strict=True)]
            for edge in (top, base)
        )
        parts.append(f'<polygon class="fill {line.colour}" points="{" ".join(upper + lower[::-1])}"/>')
        base = top
    return frame(x, y, parts + _columns(lines, x, x_label), x_label)


def frame(x: Axis, y: Axis, parts: Sequence[str], x_label: str) -> Markup:
    """The picture: grid lines of y, ticks, labels, and the parts on top."""
    drawn = []
    for tick in y.ticks:
        at = y.at(tick)
        drawn.append(draw_segment("grid", (LEFT, RIGHT), (at, at)))
        drawn.append(draw_text(LEFT - 7, at + 4, y.text(tick), 'text-anchor="end"'))
    return svg(drawn + draw_x_axis(x, "tick", BOTTOM, BOTTOM, x_label) + [*parts], BOTTOM)


def draw_x_axis(x: Axis, style: str, top: float, bottom: float, label: str) -> list[str]:
    """The axis at `bottom`, its ticks from `top` on, and its label."""
    drawn = [draw_segment(style, (x.at(tick), x.at(tick)), (top, bottom + 4)) for tick in x.ticks]
    drawn += [draw_text(x.at(tick), bottom + 18, x.text(tick), 'text-anchor="middle"') for tick in x.ticks]
    drawn.append(draw_segment("base", (x.start, RIGHT), (bottom, bottom)))
    return [*drawn, draw_text((x.start + RIGHT) / 2, bottom + 36, label, 'text-anchor="middle" class="axislabel"')]


def svg(parts: Sequence[str], bottom: float) -> Markup:
    """The picture of parts above an axis at `bottom`."""
    return Markup(f'<svg viewBox="0 0 {WIDTH} {bottom + HEIGHT - BOTTOM}" role="img">{"".join(parts)}</svg>')


def draw_line(line: Line, x: Axis, y: Axis) -> str:
    """The line, interrupted where a value is not finite; and its points, where they are to be marked or there is only one."""
    commands, pen, dots = [], "M", []
    for at, value in line.points:
        if not math.isfinite(value):
            pen = "M"
            continue
        commands.append(f"{pen}{x.at(at):.1f},{y.at(value):.1f}")
        if line.style == "dots" or len(line.points) == 1:
            dots.append(draw_dot(line.colour, x.at(at), y.at(value), "3"))
        pen = "L"
    return f'<path class="line {line.colour} {line.style}" d="{"".join(commands)}"/>' + "".join(dots)


def draw_dot(colour: str, left: float, top: float, radius: str, tip: str = "") -> str:
    """A filled circle."""
    return f'<circle class="dot {colour}" cx="{left:.1f}" cy="{top:.1f}" r="{radius}"{_tip(tip)}/>'


def draw_rect(style: str, left: float, top: float, width: float, height: float, tip: str = "") -> str:
    """A rectangle; one of style "hit" is invisible and holds a tooltip."""
    size = f'width="{max(width, 0):.1f}" height="{height:.1f}"'
    return f'<rect class="{style}" x="{left:.1f}" y="{top:.1f}" {size}{_tip(tip)}/>'


def draw_segment(style: str, across: Point, down: Point) -> str:
    """A straight line from one corner of a box to the opposite one."""
    (x1, x2), (y1, y2) = across, down
    return f'<line class="{style}" x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}"/>'


def draw_text(left: float, top: float, text: str, attributes: str) -> str:
    """A text, escaped; `attributes` are SVG's."""
    return f'<text x="{left:.1f}" y="{top:.1f}" {attributes}>{Markup.escape(text)}</text>'


def _tip(text: str) -> str:
    return Markup(' data-tip="{}"').format(text) if text else ""


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
        draw_rect("hit", x.at(low), TOP, x.at(high) - x.at(low), BOTTOM - TOP, "\n".join([f"{name} {x.text(at)}", *values[at]]))
        for at, (low, high) in zip(places, pairwise(edges), strict=True)
    ]


def _whisker(whisker: Whisker, x: Axis, y: Axis) -> str:
    at, low, mean, high = x.at(whisker.x), y.at(whisker.low), y.at(whisker.mean), y.at(whisker.high)
    caps = f"M{at - 4:.1f},{low:.1f}h8M{at - 4:.1f},{high:.1f}h8M{at:.1f},{low:.1f}V{high:.1f}"
    hit = draw_rect("hit", at - 7, min(high, mean) - 5, 14, abs(low - high) + 10, whisker.tip)
    return f'<path class="whisker {whisker.colour}" d="{caps}"/>{draw_dot(whisker.colour, at, mean, "4.5")}{hit}'


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
