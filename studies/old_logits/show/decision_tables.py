"""The tables of the decision errors: the declared checks, what moves the errors, every setting, kept and masked apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import geometric_mean, median
from typing import Final

from studies.old_logits.analyse.pooling import CHECKED_BAND, Check, Pooled, declared_checks, pooled
from studies.old_logits.layout import DASH, Table, counted, figure, interval
from studies.old_logits.measure.decision import DecisionError
from studies.old_logits.results import Cross, Study

PART: Final = "Decision error"

FORM: Final = (
    "Every proximal policy X in the form r_d = X/mu, r_s = theta/X; "
    "the learning runs of linear and log-linear have r_d = 1 instead."
)
STAGE: Final = "A longer window is a later stage of training: a trace ends soon after its window is full."

_NOT_ONE: Final = "*: the 95% interval does not hold 1."

FACTORS: Final[Mapping[str, Callable[[DecisionError], str]]] = {
    "window": lambda e: str(e.window),
    "lags": lambda e: e.lag,
    "engine": lambda e: e.engine,
    "band": lambda e: f"{e.band:g}",
}
"""What differs between the traces of one seed, and its level; drivers do not: each seed has one."""


def decision_tables(study: Study) -> list[Table]:
    """All tables of the part; empty without decision errors."""
    errors = study.decision
    if not errors:
        return []
    main = main_band(errors)
    cells = pooled(errors)
    tables = [_checks(declared_checks(errors, study.declaration.cross)), _by_factor(errors), _kinds(errors, main)]
    bands = sorted({e.band for e in errors}, key=lambda band: (band != main, band))
    tables += [_settings(cells, band, study.declaration.cross, is_detail=band != main) for band in bands]
    return tables


def main_band(errors: Iterable[DecisionError]) -> float:
    """The band that is shown first: that of the declared checks, or the tightest."""
    bands = {e.band for e in errors}
    return CHECKED_BAND if CHECKED_BAND in bands else min(bands)


def proximal_policies(errors: Iterable[DecisionError]) -> list[str]:
    """The names in the order in which they come up."""
    return list(dict.fromkeys(e.proximal_policy for e in errors))


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """The traces of one level of a factor.

    Args:
        factor: One of `FACTORS`.
        level: Its level.
        arrival: Median error of arrival, by count.
        ratios: By proximal policy, the geometric mean of its ratio to arrival over the settings of the level.
    """

    factor: str
    level: str
    arrival: float
    ratios: Mapping[str, float]


def levels(errors: Sequence[DecisionError]) -> tuple[Level, ...]:
    """Every factor at every level."""
    return tuple(
        _level(factor, level, [e for e in errors if level_of(e) == level])
        for factor, level_of in FACTORS.items()
        for level in dict.fromkeys(level_of(e) for e in errors)
    )


def _level(factor: str, level: str, errors: Sequence[DecisionError]) -> Level:
    by_name: dict[str, list[float]] = {}
    for cell in pooled(errors):
        by_name.setdefault(cell.proximal_policy, []).append(cell.ratio.mean)
    return Level(
        factor=factor,
        level=level,
        arrival=median(e.by_count for e in errors if e.proximal_policy == "arrival"),
        ratios={name: geometric_mean(ratios) for name, ratios in by_name.items()},
    )


def _checks(checks: Sequence[Check]) -> Table:
    def found(check: Check) -> str:
        return interval(check.ratio, ".3f") if check.ratio else figure(check.value)

    def row(check: Check) -> tuple[str, ...]:
        seeds, traces = str(check.ratio.n) if check.ratio else DASH, f"{check.num_traces} of {check.num_declared}"
        return check.claim, f"{check.bar:g}", found(check), seeds, traces, "holds" if check.holds else "does not hold"

    return Table(
        part=PART,
        title="The declared checks",
        header=("claim", "bar", "found [95% interval]", "seeds", "declared traces", "reading"),
        rows=tuple(map(row, checks)),
        caption="Share of tokens decided otherwise than with the old logits. Geometric means, over the traces of each seed "
        f"first, since these are not independent; intervals over seeds. {FORM}",
    )


def _by_factor(errors: Sequence[DecisionError]) -> Table:
    names = [name for name in proximal_policies(errors) if name != "arrival"]
    return Table(
        part=PART,
        title="What moves the error",
        header=("factor", "level", "arrival, median", *(f"{name} / arrival" for name in names)),
        rows=tuple(
            (at.factor, at.level, f"{at.arrival:.2%}", *(figure(at.ratios.get(name), ".2f") for name in names))
            for at in levels(errors)
        ),
        caption="Error by count. Ratios: geometric mean over all settings of the level, each setting's over its traces. "
        f"{STAGE} {_drivers(errors)}{FORM}",
    )


def _drivers(errors: Sequence[DecisionError]) -> str:
    drivers = dict.fromkeys(e.driver for e in errors)
    return f"Drivers ({', '.join(drivers)}) are not compared: each has seeds of its own. " if len(drivers) > 1 else ""


def _kinds(errors: Sequence[DecisionError], band: float) -> Table:
    rows = []
    for engine in dict.fromkeys(e.engine for e in errors):
        for name in proximal_policies(errors):
            kept = [e for e in errors if (e.engine, e.proximal_policy, e.band) == (engine, name, band)]
            if kept:
                rows.append((engine, name, f"{median(e.log_error for e in kept):.4f}", *_shares(kept)))
    return Table(
        part=PART,
        title=f"Kinds of error, band {band:g}",
        header=(
            "engine", "proximal policy", "|log-prob error|", "by count", "by weight", "kept wrongly", "masked wrongly",
            "kept, A ≠ 0", "masked, A ≠ 0", "kept, by weight", "masked, by weight",
        ),
        rows=tuple(rows),
        caption="Medians over the traces of all windows and lag shapes. Shares of the loss tokens, of those with A ≠ 0, and by "
        "weight: the sum of |R A| over the differing tokens over that of the tokens active under the old logits, R = theta/mu. "
        + FORM,
    )  # fmt: skip


def _shares(kept: Sequence[DecisionError]) -> list[str]:
    columns = [
        [e.by_count for e in kept],
        [e.by_weight for e in kept],
        [e.wrongly_kept for e in kept],
        [e.wrongly_masked for e in kept],
        [e.wrongly_kept_nonzero for e in kept],
        [e.wrongly_masked_nonzero for e in kept],
        [e.by_weight_kept for e in kept],
        [e.by_weight_masked for e in kept],
    ]
    return [f"{median(column):.2%}" for column in columns]


def _settings(cells: Sequence[Pooled], band: float, cross: Cross, *, is_detail: bool) -> Table:
    """One row an engine, lag shape and proximal policy, one column a window: arrival's error, and the others' ratios to it."""
    here = [cell for cell in cells if cell.band == band]
    windows = sorted({cell.window for cell in here} | set(cross.windows))
    found = {(cell.engine, cell.lag, cell.proximal_policy, cell.window): cell for cell in here}
    rows = []
    for engine, lag in dict.fromkeys((cell.engine, cell.lag) for cell in here):
        names = dict.fromkeys(cell.proximal_policy for cell in here)
        by_window = {w: next((c for c in here if (c.engine, c.lag, c.window) == (engine, lag, w)), None) for w in windows}
        own = [f"{cell.median_arrival:.2%}" if cell else DASH for cell in by_window.values()]
        rows.append((engine, lag, "arrival", *own))
        rows += [(engine, lag, name, *(_ratio(found.get((engine, lag, name, w))) for w in windows)) for name in names]
    traces, seeds = (sorted(found) for found in ({cell.num_traces for cell in here}, {cell.ratio.n for cell in here}))
    zeros = sum(cell.num_zero for cell in here)
    return Table(
        part=PART,
        title=f"Error of each proximal policy over that of arrival, band {band:g}",
        header=("engine", "lags", "proximal policy", *(f"window {w}" for w in windows)),
        rows=tuple(rows),
        caption="Rows of arrival: its own error by count, median over traces. Other rows: geometric mean over traces of the "
        f"ratio to it, with the 95% t interval of the logarithm over seeds. {FORM}",
        legend=(
            _NOT_ONE,
            f"{_ends(traces)} traces of {_ends(seeds)} seeds a cell. Half a token is added to both counts; "
            f"{counted(zeros, 'ratio')} of {sum(cell.num_traces for cell in here)} have a count of 0.",
        ),
        is_detail=is_detail,
    )


def _ends(ascending: Sequence[int]) -> str:
    return " to ".join(map(str, sorted({ascending[0], ascending[-1]})))


def _ratio(cell: Pooled | None) -> str:
    return DASH if cell is None else interval(cell.ratio, ".2f") + (" *" if cell.ratio.sign else "")
