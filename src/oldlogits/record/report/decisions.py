"""The report's sections of the exact audit: where the proximal policy decided otherwise than OLD, and of resets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Final

from markupsafe import Markup

from oldlogits.record.bus import recorded_names
from oldlogits.record.events import Audited, AverageWasReset, Updated
from oldlogits.record.report import charts
from oldlogits.record.report.charts import Bar, Figure
from oldlogits.record.report.data import RunData

Sums = Mapping[str, float]
"""The sums of an `audit` event at one staleness, or over several."""

_NAMES = tuple(sorted(set(recorded_names(Audited)) - {"policy", "seconds_s"}))

_SHARES: Final = {
    "kept wrongly": ("wrongly_kept", "num_tokens"),
    "masked wrongly": ("wrongly_masked", "num_tokens"),
    "kept, A ≠ 0": ("wrongly_kept_nonzero", "num_nonzero"),
    "masked, A ≠ 0": ("wrongly_masked_nonzero", "num_nonzero"),
    "kept, by weight": ("weight_wrongly_kept", "weight"),
    "masked, by weight": ("weight_wrongly_masked", "weight"),
}
"""The columns of the table that are one sum over another."""

_ERRORS: Final = ("error_before", "error_after", "weight_error_before", "weight_error_after")

_RESET_COLUMNS: Final = (
    "version",
    "rule",
    "rho",
    "age given up",
    "band keeps: average",
    "band keeps: live",
    "decision error before",
    "after",
    "by weight, before",
    "after",
)

_MAX_RESETS: Final = 50


def audit(run: RunData, _: Sequence[Updated]) -> Figure | None:
    """Draw which tokens the source's policy decided otherwise than OLD, by staleness; None without an audit."""
    if not run.audits:
        return None
    by_staleness = pooled(run.audits)
    policy = run.audits[-1].policy
    caption = (
        f"Over {len(run.audits)} batches whose exact log-probs were computed beside the source's. Shares are of the loss "
        "tokens, of those with A ≠ 0, and by weight: the sum of |R A| over the differing tokens over that of the tokens active "
        "under OLD, R = theta/mu."
    )
    everything = {name: sum(sums[name] for sums in by_staleness.values()) for name in _NAMES}
    rows = [_row(str(lag), sums) for lag, sums in by_staleness.items()] + [_row("all", everything)]
    return Figure(
        title=f"Tokens that {policy} decides otherwise than old",
        caption=caption,
        svg=_chart(by_staleness),
        legend=(("c0", "masked wrongly"), ("c1", "kept wrongly")),
        table=(("staleness", "tokens", "mean |log-prob error|", *_SHARES), *rows),
    )


def resets(run: RunData, _: Sequence[Updated]) -> Figure | None:
    """List the newest resets, and the mean over all that were audited; None without a reset."""
    events = run.resets
    if not events:
        return None
    errors = [[getattr(event, name) for name in _ERRORS] for event in events if event.error_before is not None]
    means = tuple(f"{fmean(column):.2%}" for column in zip(*errors, strict=True)) or ("—",) * len(_ERRORS)
    shown = events[-_MAX_RESETS:]
    caption = (
        f"The rule reset the average to the live weights {len(events)} times"
        + (f"; the last {len(shown)} are listed. " if len(shown) < len(events) else ". ")
        + "The decision error is that of the batch whose update asked for the reset, which the audit must have seen: before, "
        "with the average as it was used; after, with the live weights in its place, under the same theta."
    )
    mean = (f"mean of {len(errors)}", *("",) * (len(_RESET_COLUMNS) - len(_ERRORS) - 1), *means)
    table = (_RESET_COLUMNS, *map(_reset_row, shown), mean)
    return Figure(title="What each reset was worth", caption=caption, svg=Markup(), table=table)


def _reset_row(event: AverageWasReset) -> tuple[str, ...]:
    errors = (getattr(event, name) for name in _ERRORS)
    return (
        str(event.version),
        event.rule,
        f"{event.rho:.2%}" + (f" < {event.tau:.0%}" if event.rho < event.tau else ""),
        f"{event.age:.1f}",
        f"{event.kept_average:.2%}",
        f"{event.kept_live:.2%}",
        *("—" if error is None else f"{error:.2%}" for error in errors),
    )


def pooled(events: Iterable[Audited]) -> dict[int, Sums]:
    """The sums of all events by staleness, ascending; only where there are tokens."""
    total: dict[int, dict[str, float]] = {}
    for event in events:
        for name in _NAMES:
            for lag, value in enumerate(getattr(event, name)):
                total.setdefault(lag, dict.fromkeys(_NAMES, 0.0))[name] += value
    return {lag: sums for lag, sums in sorted(total.items()) if sums["num_tokens"]}


def _row(label: str, sums: Sums) -> tuple[str, ...]:
    error = sums["logp_error"] / sums["num_compared"] if sums["num_compared"] else float("nan")
    shares = (f"{sums[top] / sums[bottom]:.2%}" if sums[bottom] else "—" for top, bottom in _SHARES.values())
    return label, f"{sums['num_tokens']:,.0f}", f"{error:.2g}", *shares


def _chart(by_staleness: Mapping[int, Sums]) -> Markup:
    bars = []
    for lag, sums in by_staleness.items():
        kept, masked = (sums[name] / sums["num_tokens"] for name in ("wrongly_kept", "wrongly_masked"))
        tip = f"staleness {lag}: {sums['num_tokens']:,.0f} tokens\n{kept:.2%} kept wrongly, {masked:.2%} masked wrongly"
        bars.append(Bar(low=lag - 0.4, high=lag + 0.4, value=kept + masked, marked=kept, tip=tip))
    x = charts.x_axis(min(by_staleness) - 0.5, max(by_staleness) + 0.5, whole=True)
    y = charts.y_axis(0, max(bar.value for bar in bars), percent=True)
    return charts.bar_chart(x, y, bars, x_label="staleness in versions")
