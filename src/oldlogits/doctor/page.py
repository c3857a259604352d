"""The doctor's page: one self-contained HTML file with every verdict, its evidence and its remedy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np

from oldlogits.doctor.diagnose import Diagnosis, Examination
from oldlogits.doctor.tokens import UNKNOWN, Floats, Tokens
from oldlogits.record.folder import write_atomic
from oldlogits.record.report import charts
from oldlogits.record.report.charts import Bar, Figure, Line
from oldlogits.record.report.frame import page_template

_NUM_BINS: Final = 60
_MOST_FILES: Final = 6
"""Files that get figures of their own."""
_MOST_LAGS: Final = 64


def write_page(path: Path, found: Examination) -> None:
    """Write the page.

    Raises:
        RunWriteError: It cannot be written.
    """
    groups: dict[str, list[Diagnosis]] = {"finding": [], "cannot-tell": [], "healthy": []}
    for one in found.diagnoses:
        groups[one.verdict.outcome].append(one)
    text = page_template("doctor.html", "oldlogits.doctor").render(
        found=found,
        groups=groups,
        figures=[figure for tokens in found.files[:_MOST_FILES] for figure in _figures(tokens.sample)],
        num_tokens=sum(map(len, found.files)),
        num_checks=len(found.by_check()),
        lag_rows=found.lag_rows(),
        not_drawn=max(len(found.files) - _MOST_FILES, 0),
        split=_split(found),
    )
    write_atomic(path, text)


def _figures(tokens: Tokens) -> Iterator[Figure]:
    source = tokens.batch.source
    for name, ratio, caption in (
        (
            "theta / mu",
            tokens.theta - tokens.mu,
            "The total ratio: what engine and trainer disagree by, and what was learned since.",
        ),
        ("old / mu", tokens.old - tokens.mu, "What the trainer took for OLD, over the engine: numerics alone if OLD is OLD."),
        ("theta / old", tokens.theta - tokens.old, "What the trainer's clip looks at."),
    ):
        if (figure := _histogram(f"{source}: {name}", caption, ratio)) is not None:
            yield figure
    if (figure := _by_lag(tokens)) is not None:
        yield figure


def _histogram(title: str, caption: str, log_ratio: Floats) -> Figure | None:
    """The ratio's distribution, on log axes; None: there is none."""
    values = log_ratio[np.isfinite(log_ratio)].astype(np.float64)
    if not len(values):
        return None
    wide = max(float(np.quantile(np.abs(values), 0.999)), 1e-6)
    counts, edges = np.histogram(np.clip(values, -wide, wide), bins=_NUM_BINS, range=(-wide, wide))
    bars = [
        Bar(low=float(low), high=float(high), value=float(count), tip=f"{low:.3g} to {high:.3g} nats\n{count:,} tokens")
        for low, high, count in zip(edges, edges[1:], counts, strict=False)
    ]
    x, y = charts.x_axis(-wide, wide), charts.y_axis(0.9, float(counts.max()) + 1, transform="log")
    svg = charts.bar_chart(x, y, bars, x_label="log ratio, nats")
    return Figure(title=title, caption=f"{caption} {len(values):,} tokens; the outermost bars hold what lies beyond.", svg=svg)


def _by_lag(tokens: Tokens) -> Figure | None:
    """Mean disagreements at each lag; None: fewer than two lags."""
    lags = [int(lag) for lag in np.unique(tokens.lag) if lag != UNKNOWN and lag >= 0][:_MOST_LAGS]
    if len(lags) < 2:
        return None
    columns = {"|log theta - log mu|": (tokens.theta - tokens.mu, "c0"), "|log old - log mu|": (tokens.old - tokens.mu, "c1"),
               "|log theta - log old|": (tokens.theta - tokens.old, "c2")}  # fmt: skip
    lines = [
        Line(label=name, points=points, colour=colour, style="dots")
        for name, (values, colour) in columns.items()
        if (points := [(float(lag), mean) for lag in lags if np.isfinite(mean := _mean_abs(values[tokens.lag == lag]))])
    ]
    if not lines:
        return None
    highest = max(value for line in lines for _, value in line.points)
    svg = charts.line_chart(
        charts.x_axis(lags[0], lags[-1], whole=True), charts.y_axis(0, max(highest, 1e-9)), lines, x_label="lag, versions"
    )
    caption = "Mean over loss tokens. With the OLD of each token's own version the second line is flat: engines do not age."
    legend = tuple((line.colour, line.label) for line in lines)
    return Figure(title=f"{tokens.batch.source}: by lag", caption=caption, svg=svg, legend=legend)


def _split(found: Examination) -> Figure | None:
    """What the weights split at each lag; None: there were none."""
    rows = [row for row in found.lags if row.source == found.lags[0].source]
    if not rows:
        return None
    pairs = (("|log r_d|, exact", "c1", "log_r_d"), ("|log r_s|, exact", "c2", "log_r_s"))
    lines = [
        Line(label=label, colour=colour, style="dots", points=[(float(row.lag), float(getattr(row, name))) for row in rows])
        for label, colour, name in pairs
    ]
    finite = [value for line in lines for _, value in line.points if np.isfinite(value)]
    x, y = charts.x_axis(rows[0].lag, rows[-1].lag, whole=True), charts.y_axis(0, max([*finite, 1e-9]))
    caption = "OLD computed with the weights of each token's own version."
    legend = tuple((line.colour, line.label) for line in lines)
    title = f"{rows[0].source}: r_d and r_s apart"
    return Figure(title=title, caption=caption, svg=charts.line_chart(x, y, lines, x_label="lag, versions"), legend=legend)


def _mean_abs(values: Floats) -> float:
    finite = values[np.isfinite(values)]
    return float(np.abs(finite).mean()) if len(finite) else float("nan")
