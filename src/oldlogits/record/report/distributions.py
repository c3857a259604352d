"""The distributions of the two ratios, from the token tables of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Final, cast

import numpy as np
import numpy.typing as npt

from oldlogits.record.events import Updated
from oldlogits.record.report import charts
from oldlogits.record.report.charts import Bar, Bound, Figure, Line
from oldlogits.record.report.data import RunData

Floats = npt.NDArray[np.floating]
Bools = npt.NDArray[np.bool_]

_NUM_BINS: Final = 60
_MIN_TOKENS: Final = 20


def r_d(run: RunData, _: Sequence[Updated]) -> Figure | None:
    """Draw the distribution of r_d, with the band."""
    band = run.bound("band")
    bounds = [Bound(x=1 / band, label=f"1/{band:g}"), Bound(x=band, label=f"band {band:g}")] if band and band < math.inf else []
    kept = _column(run, "band_mask").astype(bool)
    if run.setting("r_d") == "old/mu":
        caption = "Same weights, two engines: numerics alone. The band masks what lies outside, whatever the advantage's sign."
    else:
        caption = "The proximal policy over the engine: numerics, and how far that policy is from the old logits, in one ratio."
    return _ratio_histogram(f"r_d = {run.setting('r_d')}", caption, _column(run, "log_r_d"), kept, bounds, "outside the band")


def r_s(run: RunData, _: Sequence[Updated]) -> Figure | None:
    """Draw the distribution of r_s, with the clip."""
    low, high = run.bound("eps_low"), run.bound("eps_high")
    bounds = [Bound(x=1 - low, label=f"1 - {low:g}")] if low is not None and low < 1 else []
    bounds += [Bound(x=1 + high, label=f"1 + {high:g}")] if high is not None else []
    cap = run.bound("truncation")
    bounds += [Bound(x=cap, label=f"truncated at {cap:g}")] if cap is not None else []
    kept = _column(run, "clip_mask").astype(bool)
    what = "Same engine, two versions: staleness." if run.setting("r_s") == "theta/old" else "Theta over the proximal policy."
    if run.setting("truncation"):
        caption = what + " No token is clipped: the weight of its gradient is truncated."
    else:
        caption = what + " The clip depends on the advantage's sign: a token beyond one bound may be kept."
    return _ratio_histogram(f"r_s = {run.setting('r_s')}", caption, _column(run, "log_r_s"), kept, bounds, "clipped")


def _ratio_histogram(
    title: str, caption: str, log_ratio: Floats, kept: Bools, bounds: Sequence[Bound], marked: str
) -> Figure | None:
    """A ratio's distribution on a log axis; shares on a log axis too, so that the tails can be seen."""
    finite = np.isfinite(log_ratio)
    log_ratio, kept = log_ratio[finite].astype(np.float64), kept[finite]
    if not len(log_ratio) or not np.any(log_ratio):
        return None
    low, high = (float(end) for end in np.quantile(log_ratio, (0.0005, 0.9995)))
    near = [bound for bound in bounds if abs(math.log(bound.x)) < 6 * max(-low, high)]
    if len(near) < len(bounds):
        caption += " All but one token in a thousand lie far inside " + ", ".join(bound.label for bound in bounds) + "."
    caption += " The outermost bars hold all that lies beyond them."
    ends = [1.15 * math.log(bound.x) for bound in near]
    low, high = min([low, *ends]), max([high, *ends])
    edges = np.linspace(low, high, _NUM_BINS + 1)
    total, dropped = len(log_ratio), float(np.mean(~kept))
    clipped = np.clip(log_ratio, low, high)
    shares = np.histogram(clipped, edges)[0] / total
    masked = np.histogram(clipped[~kept], edges)[0] / total
    bars = []
    for ends_of_bin, share, part in zip(pairwise(edges), shares, masked, strict=True):
        a, b = map(math.exp, ends_of_bin)
        tip = f"{a:.4g} to {b:.4g}\n{share:.3%} of the tokens\n{part:.3%} {marked}"
        bars.append(Bar(low=a, high=b, value=float(share), marked=float(part), tip=tip))
    x = charts.x_axis(math.exp(low), math.exp(high), transform="log")
    y = charts.y_axis(max(0.5 / total, 1e-7), float(shares.max()), transform="log")
    svg = charts.bar_chart(x, y, bars, x_label="ratio (log axis); bars: share of tokens (log axis)", bounds=near)
    legend = (("c0", "kept"), ("c1", f"{marked}: {dropped:.2%}"))
    return Figure(title=title, caption=caption, svg=svg, legend=legend)


def by_staleness(run: RunData, _: Sequence[Updated]) -> Figure | None:
    """Draw the size of both ratios by staleness."""
    lag = _column(run, "staleness")
    lines = []
    for name, label, colour in (("log_r_d", "|log r_d|", "c0"), ("log_r_s", "|log r_s|", "c1")):
        size = np.abs(_column(run, name))
        groups = {int(s): size[(lag == s) & np.isfinite(size)] for s in np.unique(lag)}
        kept = {s: values for s, values in groups.items() if len(values) >= _MIN_TOKENS and values.any()}
        mean = [(float(s), float(values.mean())) for s, values in kept.items()]
        tail = [(float(s), float(np.quantile(values, 0.95))) for s, values in kept.items()]
        lines.append(Line(label=f"{label} mean", points=mean, colour=colour, style="dots"))
        lines.append(Line(label=f"{label} 95% quantile", points=tail, colour=colour, style="dashed"))
    values = [value for line in lines for _, value in line.points if value > 0]
    if not values:
        return None
    lags = [at for line in lines for at, _ in line.points]
    x, y = charts.x_axis(min(lags) - 0.5, max(lags) + 0.5, whole=True), charts.y_axis(min(values), max(values), transform="log")
    shown = [line for line in lines if line.points]
    return Figure(
        title="Size of the ratios by staleness",
        caption="Mean (points) and 95% quantile (dashed). An r_d that grows with staleness measures more than numerics.",
        svg=charts.line_chart(x, y, shown, x_label="staleness"),
        legend=tuple((line.colour, line.label.removesuffix(" mean")) for line in shown if line.style == "dots"),
    )


def _column(run: RunData, name: str) -> Floats:
    return cast(Floats, run.tokens[name])
