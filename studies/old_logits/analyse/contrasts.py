"""What the learning runs of a study say: methods by regime and view, paired contrasts, collapses, the guarded reset.

A view is a way to make methods comparable (`Regime.knobs`); the runs that belong to it are found by their knobs, so one
run may serve several views. What is declared and not there is returned as missing, never left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import fmean, median
from typing import Final, Literal

from studies.old_logits.analyse.stats import Estimate, group_means, holm, mean_interval
from studies.old_logits.declare.methods import find_method
from studies.old_logits.results import VIEWS, Declaration, Knobs, LearningRun, Regime, View

Axis = Literal["update", "cpu_s"]
"""What is equal when two runs are compared: versions made, or CPU seconds, the route's cost included."""

COLLAPSE: Final = 0.5
"""A run collapsed when its final success is below this share of the mean that the best setting of its regime reaches."""

RESET_BAR: Final = -0.03
"""What the guarded reset may lose against no reset: the lower end of the 95% interval must lie above it."""

Blocks = Mapping[int, LearningRun]
"""The runs of one method, by block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodRow:
    """One method in one regime and view.

    Args:
        method: Its name.
        knobs: What it ran with.
        num_declared: Blocks that it was to be run in.
        runs: By block, ascending; on the even clock.
        num_collapses: Runs whose final success is below the bar of the regime, `collapse_bars`.
        equal_cpu: Success at the CPU seconds of the block's cheapest method, over the blocks that all methods ran in.
        differences: Final success minus that of the declaration's first method, over the blocks that both ran in.
    """

    method: str
    knobs: Knobs
    num_declared: int
    runs: tuple[LearningRun, ...]
    num_collapses: int
    equal_cpu: tuple[float, ...]
    differences: tuple[float, ...]

    @property
    def missing(self) -> tuple[int, ...]:
        """The declared blocks without a run."""
        return tuple(sorted(set(range(self.num_declared)) - {run.block for run in self.runs}))

    @property
    def success(self) -> Estimate | None:
        """Final success."""
        return estimated([run.success for run in self.runs])

    @property
    def worst(self) -> LearningRun | None:
        """The run of the lowest final success."""
        return min(self.runs, key=lambda run: run.success, default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Contrast:
    """A paired comparison, ``first - second`` over blocks.

    Args:
        regime: Its name.
        view: The view.
        axis: "update": final success; "cpu_s": at the CPU seconds of the cheaper of the two, in each block.
        first: Name of a method.
        second: Name of a method.
        num_declared: Blocks that it was declared for.
        estimate: None where no block has both.
        adjusted: Holm's p over the declared tests; None: exploratory.
    """

    regime: str
    view: View
    axis: Axis
    first: str
    second: str
    num_declared: int
    estimate: Estimate | None
    adjusted: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ResetEffect:
    """What a reset rule does to final success, over the runs in which it fired, against the same run without resets.

    Args:
        cells: Regime, block, and the difference in success.
        estimate: Over blocks, whose runs share warm start and seed in every regime: of the mean difference of each.
    """

    cells: tuple[tuple[str, int, float], ...]
    estimate: Estimate

    @property
    def worst(self) -> tuple[str, int, float]:
        """The cell of the lowest difference."""
        return min(self.cells, key=lambda cell: cell[2])

    @property
    def holds(self) -> bool:
        """Whether the rule loses no more than `RESET_BAR`."""
        return self.estimate.low > RESET_BAR


def runs_of(runs: Iterable[LearningRun], regime: Regime, view: View, method: str) -> Blocks:
    """The runs of a method in a view, by block; a method without a band is found at every band."""
    knobs, has_band = regime.knobs(view, method), find_method(method).has_band
    if knobs is None:
        return {}
    first = 0 if has_band else 1
    kept = (run for run in runs if (run.regime, run.method) == (regime.name, method))
    found = {run.block: run for run in kept if (run.band, run.eps_low, run.eps_high)[first:] == knobs[first:]}
    return dict(sorted(found.items()))


def success_at(run: LearningRun, axis: Axis, at: float) -> float | None:
    """Success where `axis` is `at`, linear between evaluations; None outside of the curve.

    A run that ended early keeps the success of its last evaluation from then on; without an evaluation, `success` from 0 on.
    """
    places = _places(run, axis)
    if at == places[-1][0] or (run.error and at > places[-1][0]):
        return places[-1][1]
    for (left, before), (right, after) in pairwise(places):
        if left <= at < right:
            return before + (after - before) * (at - left) / (right - left)
    return None


def at_equal(runs: Sequence[LearningRun], axis: Axis) -> list[float | None]:
    """Success of each run at the smallest total of those that did not end early; the last of each where all did."""
    end = _common_end(runs, axis)
    return [success_at(run, axis, end) for run in runs]


def mean_curve(runs: Sequence[LearningRun], axis: Axis, *, num_points: int = 24) -> tuple[tuple[float, float], ...]:
    """Mean success over runs against `axis`, where every run has one: at evaluations, or at even CPU seconds."""
    if not runs:
        return ()
    if axis == "update":
        places = sorted({place for run in runs for place, _ in _places(run, axis)})
    else:
        start, end = max(_places(run, axis)[0][0] for run in runs), _common_end(runs, axis)
        places = [start + (end - start) * index / (num_points - 1) for index in range(num_points)]
    columns = [(place, [success_at(run, axis, place) for run in runs]) for place in places]
    return tuple((place, fmean(v for v in values if v is not None)) for place, values in columns if None not in values)


def _places(run: LearningRun, axis: Axis) -> list[tuple[float, float]]:
    places = [(float(point.update) if axis == "update" else point.cpu_s, point.success) for point in run.curve]
    return places or [(0.0, run.success)]


def _common_end(runs: Sequence[LearningRun], axis: Axis) -> float:
    whole = [_places(run, axis)[-1][0] for run in runs if not run.error]
    return min(whole) if whole else max(_places(run, axis)[-1][0] for run in runs)


def collapse_bars(runs: Iterable[LearningRun]) -> Mapping[str, float]:
    """By regime: `COLLAPSE` times the largest mean final success of a method at its knobs, those of all views."""
    means = {setting: fmean(run.success for run in own) for setting, own in _by_setting(runs).items()}
    regimes = dict.fromkeys(setting[0] for setting in means)
    return {name: COLLAPSE * max(mean for setting, mean in means.items() if setting[0] == name) for name in regimes}


def on_even_clock(runs: Sequence[LearningRun]) -> list[LearningRun]:
    """The runs on the clock of their setting: ``update * median over blocks of (cpu_s / num_updates)``.

    A run's own seconds depend on what else its cores do; the median over the blocks of one method at one knobs less so.
    """
    timed = _by_setting(run for run in runs if run.num_updates)
    pace = {setting: median(run.cpu_s / run.num_updates for run in own) for setting, own in timed.items()}

    def evened(run: LearningRun) -> LearningRun:
        one_s = pace.get(_setting(run), 0.0)
        curve = tuple(replace(point, cpu_s=point.update * one_s) for point in run.curve)
        return replace(run, cpu_s=run.num_updates * one_s, curve=curve)

    return [evened(run) for run in runs]


def noise_floor(runs: Sequence[LearningRun]) -> float | None:
    """The largest ratio of CPU seconds on the even clock between runs that are one run under two names; None: there are none.

    One run: of one route and seed, with the same rho and the same success at every evaluation.
    """
    same: dict[tuple[object, ...], list[float]] = {}
    for run in on_even_clock(runs):
        if run.cpu_s:
            curve = tuple((point.update, point.success) for point in run.curve)
            same.setdefault((find_method(run.method).source, run.seed, run.rho, curve), []).append(run.cpu_s)
    return max((max(seconds) / min(seconds) for seconds in same.values() if len(seconds) > 1), default=None)


def _by_setting(runs: Iterable[LearningRun]) -> Mapping[tuple[str, ...], list[LearningRun]]:
    found: dict[tuple[str, ...], list[LearningRun]] = {}
    for run in runs:
        found.setdefault(_setting(run), []).append(run)
    return found


def _setting(run: LearningRun) -> tuple[str, ...]:
    """Regime, method and the knobs that act."""
    band = f"{run.band!r}" if find_method(run.method).has_band else ""
    return run.regime, run.method, band, f"{run.eps_low!r}", f"{run.eps_high!r}"


def method_rows(declaration: Declaration, runs: Sequence[LearningRun], regime: Regime, view: View) -> tuple[MethodRow, ...]:
    """The methods that the view holds, in the declaration's order; one without a run is there, too. On the even clock."""
    runs = on_even_clock(runs)
    knobs = {method: held for method in declaration.methods if (held := regime.knobs(view, method))}
    found = {method: runs_of(runs, regime, view, method) for method in knobs}
    bar, equal = collapse_bars(runs).get(regime.name, 0.0), _at_equal_cpu(found)
    first = found.get(declaration.methods[0], {})
    return tuple(
        MethodRow(
            method=method,
            knobs=knobs[method],
            num_declared=declaration.blocks_of(regime, method, view),
            runs=tuple(blocks.values()),
            num_collapses=sum(run.success < bar for run in blocks.values()),
            equal_cpu=tuple(equal[method]),
            differences=tuple(run.success - first[block].success for block, run in blocks.items() if block in first),
        )
        for method, blocks in found.items()
    )


def _at_equal_cpu(found: Mapping[str, Blocks]) -> Mapping[str, list[float]]:
    """By method, its successes at the CPU seconds of the cheapest run of each block that all methods with runs ran in."""
    present = {method: blocks for method, blocks in found.items() if blocks}
    shared = set.intersection(*map(set, present.values())) if present else set()
    values: dict[str, list[float]] = {method: [] for method in found}
    for block in sorted(shared):
        reached = at_equal([blocks[block] for blocks in present.values()], "cpu_s")
        for method, value in zip(present, reached, strict=True):
            if value is not None:
                values[method].append(value)
    return values


def all_contrasts(declaration: Declaration, runs: Sequence[LearningRun]) -> tuple[Contrast, ...]:
    """Every declared pair in every regime, view and axis, on the even clock. The tests: the primary view at equal updates.

    A pair with a method that the regime declares to be out of reach of the equal rho is none of that view; one with a method
    that the regime does not run is none of that regime.
    """
    runs = on_even_clock(runs)
    found = [
        _contrast(declaration, runs, regime, view, axis, pair)
        for view in sorted(VIEWS, key=lambda view: view != declaration.primary)
        for axis in ("update", "cpu_s")
        for regime in declaration.regimes
        if view in regime.views
        for pair in declaration.contrasts
        if not (view == "rho" and set(pair) & set(regime.rho_unreached))
        if not regime.methods or set(pair) <= set(regime.methods)
    ]
    exploratory = {regime.name for regime in declaration.regimes if regime.exploratory}
    declared = [
        index
        for index, contrast in enumerate(found)
        if (contrast.view, contrast.axis) == (declaration.primary, "update") and contrast.regime not in exploratory
    ]
    adjusted = holm([1.0 if (estimate := found[index].estimate) is None else estimate.p for index in declared])
    for index, p in zip(declared, adjusted, strict=True):
        found[index] = replace(found[index], adjusted=p)
    return tuple(found)


def _contrast(
    declaration: Declaration, runs: Sequence[LearningRun], regime: Regime, view: View, axis: Axis, pair: tuple[str, str]
) -> Contrast:
    first, second = (runs_of(runs, regime, view, method) for method in pair)
    pairs = [(run, second[block]) for block, run in first.items() if block in second]
    values = [[run.success for run in both] if axis == "update" else at_equal(both, axis) for both in pairs]
    differences = [a - b for a, b in values if a is not None and b is not None]
    return Contrast(
        regime=regime.name,
        view=view,
        axis=axis,
        first=pair[0],
        second=pair[1],
        num_declared=declaration.blocks_of(regime, pair[0], view),
        estimate=estimated(differences),
    )


def reset_effect(
    declaration: Declaration, runs: Sequence[LearningRun], *, method: str = "ewma-reset-guarded", without: str = "ewma"
) -> ResetEffect | None:
    """The effect of a reset rule, over the runs of the primary view in which it fired; None where it fired in none."""
    cells = []
    for regime in declaration.regimes:
        base = runs_of(runs, regime, declaration.primary, without)
        for block, run in runs_of(runs, regime, declaration.primary, method).items():
            if run.num_resets and block in base:
                cells.append((regime.name, block, run.success - base[block].success))
    if not cells:
        return None
    by_block = group_means((block, difference) for _, block, difference in cells)
    return ResetEffect(cells=tuple(cells), estimate=mean_interval(by_block))


def estimated(values: Sequence[float]) -> Estimate | None:
    """The mean with its interval; None without a value."""
    return mean_interval(values) if values else None
