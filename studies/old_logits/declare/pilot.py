"""What a pilot says: the best band and eps of each method, and the band at which it has the rho of the exact one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Final

from studies.old_logits.declare.methods import find_method
from studies.old_logits.declare.plan import Plan
from studies.old_logits.results import Knobs, LearningRun, Regime

REFERENCE: Final = "exact"
"""The method whose rho at the regime's band the others shall have."""

RHO_TOLERANCE: Final = 0.005
"""How near "equal rho" is."""

Runs = Sequence[LearningRun]


def best_knobs(plan: Plan, runs: Runs) -> Mapping[tuple[str, str], Knobs]:
    """For each (regime, method) the knobs of the highest mean final success over the pilot's seeds.

    Of equals, the band and eps nearest to the regime's own.
    """
    best: dict[tuple[str, str], Knobs] = {}
    for regime in plan.regimes:
        own: Knobs = (regime.band, regime.eps_low, regime.eps_high)
        for method in plan.pilot.methods:
            found = _mean_by_knobs(runs, regime, method, lambda run: run.success)
            if found:
                best[regime.name, method] = max(found, key=lambda knobs: (found[knobs], -_distance(knobs, own)))
    return best


def rho_bands(plan: Plan, runs: Runs) -> Mapping[tuple[str, str], float]:
    """For each (regime, method with a band) the band at which its pilot rho is that of `REFERENCE` at the regime's band.

    Linear in log band between the pilot's bands, or the nearest of these if its rho is within `RHO_TOLERANCE`. A method
    that does not reach that rho is left out.
    """
    found: dict[tuple[str, str], float] = {}
    for regime in plan.regimes:
        target = _rho_by_band(runs, regime, REFERENCE).get(regime.band)
        for method in plan.pilot.methods:
            rho = _rho_by_band(runs, regime, method)
            if target is not None and rho and find_method(method).has_band:
                band = regime.band if method == REFERENCE else _band_at(rho, target)
                if band is not None:
                    found[regime.name, method] = band
    return found


def suggestion(plan: Plan, runs: Runs) -> str:
    """The keys of every regime's table that the pilot answers, to be written into the recipe."""
    best, bands = best_knobs(plan, runs), rho_bands(plan, runs)
    lines = []
    for regime in plan.regimes:
        rho = {method: f"{band:.4g}" for (name, method), band in bands.items() if name == regime.name}
        tuned = {m: f"[{', '.join(f'{value:g}' for value in k)}]" for (name, m), k in best.items() if name == regime.name}
        if rho or tuned:
            lines += [f"# {regime.name}", f"rho_bands = {_inline(rho)}", f"tuned = {_inline(tuned)}", ""]
    return "\n".join(lines)


def _inline(values: Mapping[str, str]) -> str:
    return "{" + ", ".join(f"{name} = {value}" for name, value in values.items()) + "}"


def _mean_by_knobs(
    runs: Iterable[LearningRun], regime: Regime, method: str, value: Callable[[LearningRun], float]
) -> dict[Knobs, float]:
    values: dict[Knobs, list[float]] = {}
    for run in runs:
        if (run.regime, run.method) == (regime.name, method):
            values.setdefault((run.band, run.eps_low, run.eps_high), []).append(value(run))
    return {knobs: fmean(found) for knobs, found in values.items()}


def _rho_by_band(runs: Runs, regime: Regime, method: str) -> dict[float, float]:
    found = _mean_by_knobs(runs, regime, method, lambda run: run.rho)
    return {k[0]: rho for k, rho in sorted(found.items()) if k[1:] == (regime.eps_low, regime.eps_high)}


def _band_at(rho_by_band: Mapping[float, float], target: float) -> float | None:
    """Where rho, taken as linear in log band between neighbours, first reaches the target."""
    bands = list(rho_by_band)
    for low, high in itertools.pairwise(bands):
        a, b = rho_by_band[low], rho_by_band[high]
        if min(a, b) <= target <= max(a, b):
            share = 0.0 if a == b else (target - a) / (b - a)
            return math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
    nearest = min(bands, key=lambda band: abs(rho_by_band[band] - target))
    return nearest if abs(rho_by_band[nearest] - target) <= RHO_TOLERANCE else None


def _distance(knobs: Knobs, own: Knobs) -> float:
    return sum(abs(math.log(a / b)) for a, b in zip(knobs, own, strict=True))
