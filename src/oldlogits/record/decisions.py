"""The report's section of the referee: where the stand-in decided otherwise than OLD, by staleness."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from markupsafe import Markup

from oldlogits.record import charts
from oldlogits.record.charts import Bar
from oldlogits.record.events import FIELDS, Event, EventKind
from oldlogits.record.figures import Figure
from oldlogits.record.jsonl import number
from oldlogits.record.report_data import RunData

Sums = Mapping[str, float]
"""The sums of a `referee` event at one staleness, or over several."""

_NAMES = tuple(sorted(FIELDS[EventKind.REFEREE] - {"policy", "seconds_s"}))

_COLUMNS = (
    "staleness",
    "tokens",
    "mean |log-prob error|",
    "kept wrongly",
    "masked wrongly",
    "kept, A ≠ 0",
    "masked, A ≠ 0",
    "kept, by weight",
    "masked, by weight",
)


def decisions(run: RunData) -> dict[str, list[Figure]]:
    """The section by its name; empty without a referee."""
    if not run.referee:
        return {}
    by_staleness = pooled(run.referee)
    policy = str(run.referee[-1].fields["policy"])
    caption = (
        f"Over {len(run.referee)} batches whose exact log-probs were computed beside the route. Shares are of the loss tokens, "
        "of those with A ≠ 0, and by weight: the sum of |R A| over the differing tokens over that of the tokens active under "
        "OLD, R = theta/mu."
    )
    everything = {name: sum(sums[name] for sums in by_staleness.values()) for name in _NAMES}
    rows = [_row(str(lag), sums) for lag, sums in by_staleness.items()] + [_row("all", everything)]
    figure = Figure(
        title=f"Tokens that {policy} decides otherwise than old",
        caption=caption,
        svg=_chart(by_staleness),
        legend=(("c0", "masked wrongly"), ("c1", "kept wrongly")),
        table=(_COLUMNS, *rows),
    )
    return {"The referee": [figure]}


def pooled(events: Iterable[Event]) -> dict[int, Sums]:
    """The sums of all events by staleness, ascending; only where there are tokens."""
    total: dict[int, dict[str, float]] = {}
    for event in events:
        for name in _NAMES:
            values = event.fields[name]
            for lag, value in enumerate(values if isinstance(values, list) else []):
                sums = total.setdefault(lag, dict.fromkeys(_NAMES, 0.0))
                sums[name] += number(value) or 0.0
    return {lag: sums for lag, sums in sorted(total.items()) if sums["num_tokens"]}


def _row(label: str, sums: Sums) -> tuple[str, ...]:
    error = sums["logp_error"] / sums["num_compared"] if sums["num_compared"] else float("nan")
    shares = (
        ("wrongly_kept", "num_tokens"),
        ("wrongly_masked", "num_tokens"),
        ("wrongly_kept_nonzero", "num_nonzero"),
        ("wrongly_masked_nonzero", "num_nonzero"),
        ("weight_wrongly_kept", "weight"),
        ("weight_wrongly_masked", "weight"),
    )
    return label, f"{sums['num_tokens']:,.0f}", f"{error:.2g}", *(_share(sums, top, bottom) for top, bottom in shares)


def _share(sums: Sums, top: str, bottom: str) -> str:
    return f"{sums[top] / sums[bottom]:.2%}" if sums[bottom] else "—"


def _chart(by_staleness: Mapping[int, Sums]) -> Markup:
    bars = []
    for lag, sums in by_staleness.items():
        kept, masked = (sums[name] / sums["num_tokens"] for name in ("wrongly_kept", "wrongly_masked"))
        tip = f"staleness {lag}: {sums['num_tokens']:,.0f} tokens\n{kept:.2%} kept wrongly, {masked:.2%} masked wrongly"
        bars.append(Bar(low=lag - 0.4, high=lag + 0.4, value=kept + masked, marked=kept, tip=tip))
    x = charts.x_axis(min(by_staleness) - 0.5, max(by_staleness) + 0.5, whole=True)
    y = charts.y_axis(0, max(bar.value for bar in bars), percent=True)
    return charts.bar_chart(x, y, bars, x_label="staleness in versions")
