"""The report's figures: which recorded values each one shows. A figure without values is left out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from typing import Final

from oldlogits.record.events import Evaluated, Updated
from oldlogits.record.intervals import reward_of
from oldlogits.record.report import charts
from oldlogits.record.report.charts import Bar, Bound, Figure, Line, Whisker
from oldlogits.record.report.data import RunData, binned
from oldlogits.record.report.decisions import audit, resets
from oldlogits.record.report.distributions import by_staleness, r_d, r_s
from oldlogits.record.report.series import Draw, legend, metrics, series, smooth, versions_axis

_MAX_POINTS: Final = 240
_MARKS: Final = {"sampled": "c1", "greedy": "c3"}
_TIMES: Final = {
    "time/wait_batch_s": "wait for a batch",
    "time/score_s": "score the proximal policy",
    "time/step_s": "optimizer steps",
    "time/publish_s": "publish",
}


def figures(run: RunData) -> dict[str, list[Figure]]:
    """The figures by section, in the order of the page; sections without figures are left out."""
    updates = binned(run.updates, _MAX_POINTS)
    found = {name: [figure for draw in group if (figure := draw(run, updates))] for name, group in _sections().items()}
    return {name: group for name, group in found.items() if group}


def _sections() -> dict[str, tuple[Draw, ...]]:
    """What each section shows, in order."""
    uniform, sampled = {"reward/uniform_groups": "share"}, {"episode/sampled_tokens": "tokens"}
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
        "Learning": (
            _learning,
            _over_time,
            metrics("Entropy of the policy", {"policy/entropy": "nats"}, "Mean over the loss tokens, in nats.", from_zero=True),
            metrics("Groups without a signal", uniform, "Groups whose rewards are all equal.", percent=True, from_zero=True),
            metrics("Gradient norm", {"grad/norm": "norm"}, "Before clipping.", from_zero=True),
            metrics("Learning rate", {"train/lr": "learning rate"}, "Of the update's first optimizer step.", from_zero=True),
        ),
        "Episodes": (
            metrics("Turns of an episode", {"episode/turns": "turns"}, "Mean over the batch.", from_zero=True),
            metrics("Sampled tokens of an episode", sampled, "Mean over the batch.", from_zero=True),
        ),
        "What the masks keep": (metrics("Active tokens (rho)", rho, of_rho, percent=True), _staleness),
        "The two ratios": (
            r_d,
            r_s,
            by_staleness,
            metrics("Size of the ratios over the run", sizes, of_sizes, from_zero=True),
            _kl,
            metrics("Effective sample size", {"ratio/ess": "share"}, of_ess, percent=True),
        ),
        "The system": (
            metrics("Tokens per second", tokens, "", from_zero=True),
            metrics("Idle time", idle, of_idle, percent=True, from_zero=True),
            metrics("Trajectories in flight", queue, of_queue, from_zero=True),
            _times,
        ),
        "The engine's own noise": (_calibration,),
        "The exact audit": (audit,),
        "Resets of the average": (resets,),
    }


def _learning(run: RunData, updates: Sequence[Updated]) -> Figure | None:
    lines, legend = [], []
    for key, label, colour in (("reward/mean", "training reward", "c0"), ("reward/success", "training success", "c2")):
        points = series(updates, key)
        if points:
            lines += [Line(label=label, points=points, colour=colour, style="raw"), smooth(label, points, colour)]
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


def _over_time(run: RunData, updates: Sequence[Updated]) -> Figure | None:
    """The training reward over minutes of training: what a person waits for."""
    minutes = {
        update.version: at / 60
        for update, at in zip(
            run.updates,
            accumulate(u.metrics.get("time/update_s", 0.0) + u.metrics.get("time/between_s", 0.0) for u in run.updates),
            strict=True,
        )
    }
    points = [(minutes[int(version)], value) for version, value in series(updates, "reward/mean") if int(version) in minutes]
    if not points or points[-1][0] <= 0:
        return None
    line = Line(label="training reward", points=points, colour="c0")
    y = charts.y_axis(min(0.0, *(value for _, value in points)), max(1.0, *(value for _, value in points)))
    svg = charts.line_chart(charts.x_axis(0.0, points[-1][0]), y, [line], x_label="minutes of training")
    return Figure(title="Reward over time", caption="Each update, without the evaluations before and after.", svg=svg)


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


def _kl(run: RunData, updates: Sequence[Updated]) -> Figure | None:
    keys = sorted({key for update in updates for key in update.metrics if key.startswith("kl/") and "@" not in key})
    labels = {key: key.removeprefix("kl/") for key in keys}
    return metrics("KL divergence", labels, "In nats, over all loss tokens before masking.")(run, updates)


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
    later = totals[1:]
    is_beyond = bool(later) and totals[0] > 2 * max(later)
    y = charts.y_axis(0, max(later) if is_beyond else max(totals))
    caption = "What the trainer's time goes into." + (f" The first update took {totals[0]:.0f} s." if is_beyond else "")
    svg = charts.stacked_chart(versions_axis(timed), y, lines, x_label="version")
    return Figure(title="Seconds per update", caption=caption, svg=svg, legend=legend(lines))


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
        legend=legend(lines),
        table=(
            ("band", *(f"{at:g}" + (" (this run)" if at == band else "") for at, _ in points)),
            ("masked", *(f"{share:.2%}" for _, share in points)),
        ),
    )
