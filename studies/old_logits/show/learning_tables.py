"""The tables of the learning part: what was declared, the tests, every method in every regime and view, resets, pilot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from statistics import fmean
from typing import Final

from oldlogits.core.policies import find_variant
from studies.old_logits.analyse.contrasts import (
    COLLAPSE,
    RESET_BAR,
    Contrast,
    MethodRow,
    all_contrasts,
    collapse_bars,
    estimated,
    method_rows,
    noise_floor,
    reset_effect,
)
from studies.old_logits.analyse.stats import Estimate
from studies.old_logits.declare.methods import find_method
from studies.old_logits.layout import DASH, Table, blocks_named, counted, figure, interval, p_value, plus_minus
from studies.old_logits.results import VIEWS, Declaration, Knobs, LearningRun, Regime, Study, View
from studies.old_logits.show.check_tables import check_tables

PART: Final = "Learning"

VIEW_NAMES: Final[dict[View, str]] = {"band": "at equal band", "rho": "at equal rho", "tuned": "each tuned"}

RESET_RULES: Final = ("ewma-reset-guarded", "ewma-reset-paper")
"""Methods that are ewma with a rule for resets."""

_METHOD_COLUMNS: Final = (
    "method", "band", "eps", "runs", "success", "worst", "collapses", "rho", "CPU s", "at equal CPU s",
)  # fmt: skip

_BEYOND: Final = "*: the 95% interval does not hold 0."


def learning_tables(study: Study) -> list[Table]:
    """All tables of the part, those of the declared tests first."""
    declaration, runs = study.declaration, study.learning
    contrasts = all_contrasts(declaration, runs)
    tables = [_regimes(declaration), _tests(contrasts), _exploratory(contrasts, noise_floor(runs))]
    places = [(regime, view) for view in VIEWS for regime in declaration.regimes if view in regime.views]
    tables += [_methods(declaration, runs, regime, view) for regime, view in places]
    tables += [_resets(declaration, runs, rule) for rule in RESET_RULES if rule in declaration.methods]
    return tables + check_tables(study) + ([_pilot(study)] if study.pilot else [])


def _regimes(declaration: Declaration) -> Table:
    rows = []
    for regime in declaration.regimes:
        settings = ", ".join(f"{key} = {value}" for key, value in regime.settings.items())
        bands = [f"{method} {band:.4g}" for method, band in regime.rho_bands.items()]
        rho = ", ".join([*bands, *(f"{method} out of reach" for method in regime.rho_unreached)])
        name = regime.name + (" (exploratory)" if regime.exploratory else "")
        rows.append((name, settings or DASH, f"{regime.band:g}", f"{regime.eps_low:g}, {regime.eps_high:g}", rho or DASH))
    return Table(
        part=PART,
        title="Regimes",
        header=("regime", "settings", "band", "eps low, high", "bands at equal rho"),
        rows=tuple(rows),
        caption="As the recipe declares them; all methods see the same prompts, lags and updates.",
    )


def _tests(contrasts: Sequence[Contrast]) -> Table:
    declared = [contrast for contrast in contrasts if contrast.adjusted is not None]
    view = VIEW_NAMES[declared[0].view] if declared else ""
    return Table(
        part=PART,
        title=f"The {len(declared)} declared contrasts",
        header=("regime", "contrast", "difference [95% interval]", "p", "Holm p", "blocks", "reading"),
        rows=tuple(_test_row(contrast) for contrast in declared),
        caption=f"Final success {view}, first minus second, paired over blocks; t intervals; Holm over these {len(declared)}.",
        legend=_missing_contrasts(declared),
    )


def _test_row(contrast: Contrast) -> tuple[str, ...]:
    found = contrast.estimate
    return (
        contrast.regime,
        f"{contrast.first} - {contrast.second}",
        interval(found),
        p_value(found.p if found and found.n > 1 else None),
        p_value(contrast.adjusted if found and found.n > 1 else None),
        f"{found.n if found else 0} of {contrast.num_declared}",
        reading(contrast),
    )


def reading(contrast: Contrast) -> str:
    """What a contrast shows, in four words; a declared one is judged by Holm's p."""
    found = contrast.estimate
    if found is None:
        return "missing"
    if found.n < 2:
        return "one block only"
    if found.sign == 0:
        return "no difference shown"
    better = contrast.first if found.sign > 0 else contrast.second
    return f"{better} is better" if contrast.adjusted is None or contrast.adjusted < 0.05 else f"{better} leads, not after Holm"


def _missing_contrasts(contrasts: Sequence[Contrast]) -> tuple[str, ...]:
    short = [c for c in contrasts if (c.estimate.n if c.estimate else 0) < c.num_declared]
    names = ", ".join(f"{c.first} - {c.second} in {c.regime}" for c in short)
    return (f"Incomplete: {names}.",) if short else ()


def _exploratory(contrasts: Sequence[Contrast], floor: float | None) -> Table:
    """One row a regime and pair, one column a view and axis."""
    columns = list(dict.fromkeys((c.view, c.axis) for c in contrasts))
    pairs: dict[tuple[str, str, str], dict[tuple[str, str], Contrast]] = {}
    for contrast in contrasts:
        pairs.setdefault((contrast.regime, contrast.first, contrast.second), {})[contrast.view, contrast.axis] = contrast
    axes = {"update": "", "cpu_s": ", equal CPU s"}
    is_short = any(c.estimate and c.estimate.n < c.num_declared for c in contrasts)
    short = ("(n of N): pairs of the declared ones.",) if is_short else ()
    return Table(
        part=PART,
        title="Every contrast in every view",
        header=("regime", "contrast", *(f"{VIEW_NAMES[view]}{axes[axis]}" for view, axis in columns)),
        rows=tuple(
            (regime, f"{first} - {second}", *(_cell(found.get(column)) for column in columns))
            for (regime, first, second), found in pairs.items()
        ),
        caption="Differences with 95% t intervals, not adjusted; at equal updates, or at the CPU seconds of the cheaper run of "
        "each pair, the cost of the route included. Success between evaluations is interpolated, never extrapolated.",
        legend=("†: a declared test; all others are exploratory.", _BEYOND, *short, _rough(floor)),
    )


def _rough(floor: float | None) -> str:
    same = f" The same run under two names takes up to {floor:.2f} times as long." if floor else ""
    return "CPU s, a rough comparison: updates times the median over blocks of CPU seconds per update, on shared cores." + same


def _cell(contrast: Contrast | None) -> str:
    if contrast is None or contrast.estimate is None:
        return DASH
    found, num_declared = contrast.estimate, contrast.num_declared
    marks = ("†" if contrast.adjusted is not None else "") + ("*" if found.sign else "")
    pairs = f"({found.n} of {num_declared})" if found.n < num_declared else ""
    return " ".join(part for part in (interval(found, "+.2f"), marks, pairs) if part)


def _methods(declaration: Declaration, runs: Sequence[LearningRun], regime: Regime, view: View) -> Table:
    rows = method_rows(declaration, runs, regime, view)
    reference = declaration.methods[0]
    absent = [method for method in declaration.methods if method not in {row.method for row in rows}]
    short = [f"{row.method} {blocks_named(row.missing)}" for row in rows if row.missing]
    legend = [f"Missing: {'; '.join(short)}."] if short else []
    legend += [f"Not in this view: {', '.join(absent)}."] if absent else []
    num_shared = max((len(row.equal_cpu) for row in rows), default=0)
    bar = collapse_bars(runs).get(regime.name)
    updates = sorted({run.num_updates for row in rows for run in row.runs if not run.error})
    return Table(
        part=PART,
        title=f"{regime.name}, {VIEW_NAMES[view]}" + (" (exploratory)" if regime.exploratory else ""),
        header=(*_METHOD_COLUMNS, f"minus {reference} [95% interval]"),
        rows=tuple(_method_cells(row, reference) for row in rows),
        caption=f"Held-out success after {' or '.join(map(str, updates)) or 'no'} updates, mean ± half of the 95% t interval "
        f"over blocks. A collapse ends below {figure(bar)}, {COLLAPSE:g} of the best mean of the regime in any view. At equal "
        f"CPU s, a rough comparison: where the cheapest method of each block ends, over the {counted(num_shared, 'block')} "
        "that all methods ran in.",
        legend=(*legend, _BEYOND, *_early(rows)),
        is_detail=view != declaration.primary,
    )


def _method_cells(row: MethodRow, reference: str) -> tuple[str, ...]:
    difference = estimated(row.differences)
    shown = "reference" if row.method == reference else interval(difference)
    return (
        shown_name(row.method),
        f"{row.knobs[0]:.4g}" if find_method(row.method).has_band else DASH,
        f"{row.knobs[1]:g}, {row.knobs[2]:g}",
        f"{len(row.runs)} of {row.num_declared}" if len(row.runs) <= row.num_declared else f"{len(row.runs)}",
        plus_minus(row.success),
        f"{row.worst.success:.3f}" if row.worst else DASH,
        str(row.num_collapses) if row.runs else DASH,
        figure(_mean([run.rho for run in row.runs])),
        figure(_mean([run.cpu_s for run in row.runs]), ".1f"),
        plus_minus(estimated(row.equal_cpu)),
        shown + (" *" if difference and difference.sign and shown != "reference" else ""),
    )


def shown_name(method: str) -> str:
    """A method's name, with what its variant leaves out."""
    return method + ("" if find_variant(find_method(method).variant).corrects_mismatch else " (mismatch uncorrected)")


def _early(rows: Sequence[MethodRow]) -> Iterator[str]:
    for row in rows:
        ended = [run for run in row.runs if run.error]
        if ended:
            blocks = blocks_named([run.block for run in ended])
            yield f"Ended early and counted with the last success: {row.method}, {blocks} ({ended[0].error})."


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def _resets(declaration: Declaration, runs: Sequence[LearningRun], rule: str) -> Table:
    effect = reset_effect(declaration, runs, method=rule)
    cells = effect.cells if effect else ()
    groups = [(regime, list(group)) for regime, group in groupby(cells, key=lambda cell: cell[0])]
    verdict = f"Bar of the guarded rule: the lower end above {RESET_BAR:g}. " if rule == RESET_RULES[0] else ""
    verdict += ("Held." if effect.holds else "Not held.") if effect and verdict else ""
    return Table(
        part=PART,
        title=f"{rule} against ewma without resets",
        header=("regime", "runs in which it fired", "difference [95% interval]", "worst", "its difference"),
        rows=(
            *(_reset_row(name, group, estimated([cell[2] for cell in group])) for name, group in groups),
            *([_reset_row("all", cells, effect.estimate)] if effect else []),
        ),
        caption=f"Final success {VIEW_NAMES[declaration.primary]}, paired with the run of the same regime and block. All: the "
        f"mean of each block first, then over {counted(effect.estimate.n if effect else 0, 'block')}. " + verdict,
        legend=() if cells else ("It fired in no run that can be compared.",),
    )


def _reset_row(name: str, cells: Sequence[tuple[str, int, float]], estimate: Estimate | None) -> tuple[str, ...]:
    regime, block, difference = min(cells, key=lambda cell: cell[2])
    return name, str(len(cells)), interval(estimate), f"{regime}, block {block}", f"{difference:+.3f}"


def _pilot(study: Study) -> Table:
    by_knobs: dict[tuple[str, str], dict[Knobs, list[LearningRun]]] = {}
    for run in study.pilot:
        tried = by_knobs.setdefault((run.regime, run.method), {})
        tried.setdefault((run.band, run.eps_low, run.eps_high), []).append(run)
    tuned = {(regime.name, method): k for regime in study.declaration.regimes for method, k in regime.tuned.items()}
    settings = sorted({len(tried) for tried in by_knobs.values()})
    shared = {run.seed for run in study.pilot} & {run.seed for run in study.learning}
    seeds = "No seed is shared with the confirmation runs." if not shared else f"Seeds shared with them: {sorted(shared)}."
    return Table(
        part="Pilot",
        title="Pilot runs",
        header=("regime", "method", "band", "eps", "runs", "success", "rho"),
        rows=tuple(row for place, tried in by_knobs.items() for row in _pilot_rows(place, tried, tuned.get(place))),
        caption=f"By regime and method, best first; settings tried per method: {' to '.join(map(str, settings))}. {seeds}",
        legend=("‡: taken as the tuned setting.",),
        is_detail=True,
    )


def _pilot_rows(
    place: tuple[str, str], tried: Mapping[Knobs, list[LearningRun]], tuned: Knobs | None
) -> Iterator[tuple[str, ...]]:
    regime, method = place
    means = {knobs: fmean(run.success for run in runs) for knobs, runs in tried.items()}
    for knobs in sorted(means, key=means.__getitem__, reverse=True):
        mark, rho = " ‡" if knobs == tuned else "", fmean(run.rho for run in tried[knobs])
        acting = f"{knobs[0]:g}", f"{knobs[1]:g}, {knobs[2]:g}"
        yield regime, shown_name(method), *acting, str(len(tried[knobs])), f"{means[knobs]:.3f}{mark}", f"{rho:.3f}"
