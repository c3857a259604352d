"""The report's figures: which recorded values each one shows. A figure without values is left out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from statistics import fmean
from typing import Final, cast

import numpy as np
import numpy.typing as npt

from oldlogits.record.events import Evaluated, Updated
from oldlogits.record.intervals import reward_of
from oldlogits.record.report import charts
from oldlogits.record.report.charts import Bar, Bound, Figure, Line, Whisker
from oldlogits.record.report.data import RunData, binned
from oldlogits.record.report.decisions import audit, resets

Floats = npt.NDArray[np.floating]
Bools = npt.NDArray[np.bool_]

_MAX_POINTS: Final = 240
_NUM_BINS: Final = 60
_MIN_TOKENS: Final = 20
_MARKS: Final = {"sampled": "c1", "greedy": "c3"}
_TIMES: Final = {
    "time/wait_batch_s": "wait for a batch",
    "time/score_s": "score the proximal policy",
    "time/step_s": "optimizer steps",
    "time/publish_s": "publish",
}


Draw = Callable[[RunData, Sequence[Updated]], Figure | None]
"""Draws a figure of a run and of its updates; None: nothing was recorded for it."""


def figures(run: RunData) -> dict[str, list[Figure]]:
    """The figures by section, in the order of the page; sections without figures are left out."""
    updates = binned(run.updates, _MAX_POINTS)
    found = {name: [figure for draw in group if (figure := draw(run, updates))] for name, group in _sections().items()}
    return {name: group for name, group in found.items() if group}


def _sections() -> dict[str, tuple[Draw, ...]]:
    """What each section shows, in order."""
    rho = {"mask/rho": "active", "mask/rho_band": "kept by the band", "mask/rho_clip": "kept by the clip"}
    tokens = {"throughput/engine_tokens_per_s": "engine, sampled", "throughput/trainer_tokens_per_s": "trainer, trained"}
    idle = {"idle/engine_share": "engine", "idle/trainer_share": "trainer"}
    queue = {"queue/running": "running", "queue/queued": "queued"}
    sizes = {"ratio/log_r_d_abs_mean": "|log r_d|", "ratio/log_r_s_abs_mean": "|log r_s|"}
    of_rho = "Share of loss tokens left after the discrepancy band and the PPO clip."
    of_ess = "Of the total ratio r_d r_s, as a share of the loss tokens before masking."
    of_sizes = "Mean over the loss tokens of each update."
    of_idle = "Share of the time in which a side waits for the other."
    of_queue = "Running in the engine, and finished but not yet trained."
    return {
        "Learning": (_learning, _metrics("Gradient norm", {"grad/norm": "norm"}, "")),
        "What the masks keep": (_metrics("Active tokens (rho)", rho, of_rho, percent=True), _staleness),
        "The two ratios": (
            _r_d,
            _r_s,
            _by_staleness,
            _metrics("Size of the ratios over the run", sizes, of_sizes, from_zero=True),
            _kl,
            _metrics("Effective sample size", {"ratio/ess": "share"}, of_ess, percent=True),
        ),
        "The system": (
            _metrics("Tokens per second", tokens, "", from_zero=True),
            _metrics("Idle time", idle, of_idle, percent=True, from_zero=True),
            _metrics("Trajectories in flight", queue, of_queue, from_zero=True),
            _times,
        ),
        "The engine's own noise": (_calibration,),
        "The exact audit": (audit,),
        "Resets of the average": (resets,),
    }


def _metrics(title: str, labels: Mapping[str, str], caption: str, *, percent: bool = False, from_zero: bool = False) -> Draw:
    """Draw the labelled metrics over versions, as recorded."""

    def draw(_: RunData, updates: Sequence[Updated]) -> Figure | None:
        found = {key: points for key in labels if (points := _series(updates, key))}
        if not found:
            return None
        text = ("{:.2%}" if percent else "{:.4g}").format
        lines = [
            Line(label=labels[key], points=points, colour=f"c{index % 5}", text=text)
            for index, (key, points) in enumerate(found.items())
        ]
        values = [value for points in found.values() for _, value in points]
        y = charts.y_axis(0.0 if from_zero else min(values), max(values), percent=percent)
        svg = charts.line_chart(_versions_axis(updates), y, lines, x_label="version")
        return Figure(title=title, caption=caption, svg=svg, legend=_legend(lines) if len(lines) > 1 else ())

    return draw


def _learning(run: RunData, updates: Sequence[Updated]) -> Figure | None:
    lines, legend = [], []
    for key, label, colour in (("reward/mean", "training reward", "c0"), ("reward/success", "training success", "c2")):
        points = _series(updates, key)
        if points:
            lines += [Line(label=label, points=points, colour=colour, style="raw"), _smooth(label, points, colour)]
            legend.append((colour, label))
    whiskers = [_evaluation_mark(evaluation) for evaluation in run.evaluations if math.isfinite(evaluation.mean)]
    legend += [(mark, f"held-out, {mode}") for mode, mark in _MARKS.items() if any(e.mode == mode for e in run.evaluations)]
    values = [value for line in lines for _, value in line.points] + [end for w in whiskers for end in (w.low, w.high)]
    if not values:
        return None
    versions = [update.version for update in updates] + [evaluation.version for evaluation in run.evaluations]
    y = charts.y_axis(min(0.0, *values), max(1.0, *values))
    caption = "Faint: each update; bold: moving average. Points: success in evaluations, with its 95% interval."
    svg = charts.line_chart(charts.x_axis(0, max(versions), whole=True), y, lines, x_label="version", whiskers=whiskers)
    return Figure(title="Reward", caption=caption, svg=svg, legend=tuple(legend))


def _evaluation_mark(evaluation: Evaluated) -> Whisker:
    tip = (
        f"{evaluation.stage}, {evaluation.mode}: {evaluation.mean:.3f} [{evaluation.low:.3f}, {evaluation.high:.3f}]\n"
        f"{evaluation.num_episodes} episodes at version {evaluation.version}; mean reward {reward_of(evaluation).plain}"
    )
    x, colour = evaluation.version + (0.0 if evaluation.mode == "sampled" else 0.4), _MARKS.get(evaluation.mode, "c4")
    return Whisker(x=x, mean=evaluation.mean, low=evaluation.low, high=evaluation.high, colour=colour, tip=tip)


def _staleness(run: RunData, _: Sequence[Updated]) -> Figure | None:
    counts = Counter[int]()
    for update in run.updates:
        counts.update({int(lag): num for lag, num in update.staleness_counts.items()})
    total = counts.total()
    if not total:
        return None
    bound = run.bound("max_staleness")
    last = max(max(counts), int(bound) if bound is not None and bound < 4 * max(counts) + 8 else 0)
    bars = [
        Bar(low=lag - 0.5, high=lag + 0.5, value=count / total, tip=f"staleness {lag}: {count:,} tokens, {count / total:.1%}")
        for lag, count in sorted(counts.items())
    ]
    bounds = [Bound(x=bound + 0.5, label=f"bound {bound:g}")] if bound is not None and bound <= last else []
    x, y = charts.x_axis(-0.5, last + 0.7, whole=True), charts.y_axis(0, max(bar.value for bar in bars), percent=True)
    return Figure(
        title="Staleness",
        caption="Trained tokens by trainer version minus the version that sampled them.",
        svg=charts.bar_chart(x, y, bars, x_label="staleness in versions", bounds=bounds),
    )


def _r_d(run: RunData, _: Sequence[Updated]) -> Figure | None:
    band = run.bound("band")
    bounds = [Bound(x=1 / band, label=f"1/{band:g}"), Bound(x=band, label=f"band {band:g}")] if band and band < math.inf else []
    kept = _column(run, "band_mask").astype(bool)
    if run.setting("r_d") == "old/mu":
        caption = "Same weights, two engines: numerics alone. The band masks what lies outside, whatever the advantage's sign."
    else:
        caption = "The proximal policy over the engine: numerics, and how far that policy is from the old logits, in one ratio."
    return _ratio_histogram(f"r_d = {run.setting('r_d')}", caption, _column(run, "log_r_d"), kept, bounds, "outside the band")


def _r_s(run: RunData, _: Sequence[Updated]) -> Figure | None:
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


def _by_staleness(run: RunData, _: Sequence[Updated]) -> Figure | None:
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


def _kl(run: RunData, updates: Sequence[Updated]) -> Figure | None:
    keys = sorted({key for update in updates for key in update.metrics if key.startswith("kl/") and "@" not in key})
    labels = {key: key.removeprefix("kl/") for key in keys}
    return _metrics("KL divergence", labels, "In nats, over all loss tokens before masking.")(run, updates)


def _times(_: RunData, updates: Sequence[Updated]) -> Figure | None:
    timed = [update for update in updates if any(key in update.metrics for key in _TIMES)]
    if not timed:
        return None
    lines = [
        Line(
            label=label,
            points=[(float(update.version), max(update.metrics.get(key, 0.0), 0.0)) for update in timed],
            colour=f"c{(4, 1, 0, 2)[index]}",
            text="{:.3f} s".format,
        )
        for index, (key, label) in enumerate(_TIMES.items())
    ]
    totals = [sum(value for _, value in column) for column in zip(*(line.points for line in lines), strict=True)]
    y = charts.y_axis(0, max(totals))
    svg = charts.stacked_chart(_versions_axis(timed), y, lines, x_label="version")
    return Figure(title="Seconds per update", caption="What the trainer's time goes into.", svg=svg, legend=_legend(lines))


def _calibration(run: RunData, _: Sequence[Updated]) -> Figure | None:
    """What each band would mask of the engine's own noise."""
    found = run.calibration
    if found is None:
        return None
    points = list(zip(found.bands, found.masked, strict=True))
    band = run.bound("band") if run.setting("r_d") != "1" else None
    own = [(at, share) for at, share in points if at == band]
    lines = [Line(label="masked", points=points, colour="c0", style="dots", text="{:.2%}".format)]
    lines += [Line(label="this run's band", points=own, colour="c1", style="dots", text="{:.2%}".format)] if own else []
    x = charts.x_axis(points[0][0], points[-1][0], transform="log")
    y = charts.y_axis(0, max(share for _, share in points), percent=True)
    caption = (
        f"r_d = old/mu of {found.num_tokens} tokens at lag 0, before the first step: the engine's numerics alone. "
        f"Mean |log r_d| {found.log_r_d_abs_mean:.2g} nats, largest {found.log_r_d_abs_max:.2g}; "
        f"mean r_d {found.r_d_mean:.5f} +- {found.r_d_mean_error:.1g}, and 1 is expected."
    )
    return Figure(
        title="Tokens that a band would mask at lag 0",
        caption=caption,
        svg=charts.line_chart(x, y, lines, x_label="band (log axis)"),
        legend=_legend(lines),
        table=(
            ("band", *(f"{at:g}" + (" (this run)" if at == band else "") for at, _ in points)),
            ("masked", *(f"{share:.2%}" for _, share in points)),
        ),
    )


def _series(updates: Sequence[Updated], key: str) -> list[charts.Point]:
    points = [(float(update.version), update.metrics[key]) for update in updates if key in update.metrics]
    return [point for point in points if math.isfinite(point[1])]


def _smooth(label: str, points: Sequence[charts.Point], colour: str) -> Line:
    """A centred moving average over about a fifteenth of the run."""
    half = len(points) // 30
    mean = [
        (at, fmean(value for _, value in points[max(0, index - half) : index + half + 1]))
        for index, (at, _) in enumerate(points)
    ]
    return Line(label=f"{label}, moving average", points=mean, colour=colour)


def _versions_axis(updates: Sequence[Updated]) -> charts.Axis:
    return charts.x_axis(updates[0].version, updates[-1].version, whole=True)


def _legend(lines: Sequence[Line]) -> tuple[tuple[str, str], ...]:
    return tuple((line.colour, line.label) for line in lines)


def _column(run: RunData, name: str) -> Floats:
    return cast(Floats, run.tokens[name])
