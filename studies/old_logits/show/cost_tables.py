"""The tables of the system cost, ours beside the paper's, and which proximal policy is worth which cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

from oldlogits.core.policies import OLD
from oldlogits.core.source import SOURCES
from studies.old_logits.analyse.pooling import frontier
from studies.old_logits.layout import DASH, Table
from studies.old_logits.measure.cost import RouteCost, cost_table
from studies.old_logits.measure.decision import DecisionError
from studies.old_logits.results import Study
from studies.old_logits.show.decision_tables import FORM, main_band

PART: Final = "System cost"

ROUTES: Final[Mapping[str, str]] = {
    "arrival": "arrival",
    "linear": "none",
    "log-linear": "none",
    "ewma": "ewma",
    "ewma-mean-lag": "ewma",
    "ewma-auto": "ewma",
    "aged": "aged",
    "rescore": "rescore",
    "mu": "none",
}
"""The route that feeds a proximal policy."""

NOISE: Final = 0.05
"""Costs that differ by no more than this share of the median update are not told apart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A way to an update, with what it decides otherwise and what it costs, under one engine.

    Args:
        name: An exact route, or a proximal policy.
        error: Median share of tokens decided otherwise than with the old logits; 0 for exact routes.
        cost: Of its route.
        on_frontier: Whether no other choice has a smaller error at no higher cost, or a lower cost at an equal error; costs
            that differ by no more than `NOISE` of an update count as equal.
    """

    name: str
    error: float
    cost: RouteCost
    on_frontier: bool

    @property
    def extra_s(self) -> float:
        """Seconds that its route adds to an update."""
        return self.cost.extra_s


def choices(study: Study) -> dict[str, tuple[Choice, ...]]:
    """By engine, every choice whose error and cost are both measured, cheapest first; empty without either."""
    if not study.decision or not study.cost:
        return {}
    band = main_band(study.decision)
    kept = [e for e in study.decision if e.band == band]
    engines = dict.fromkeys(e.engine for e in kept)
    return {engine: _choices([e for e in kept if e.engine == engine], study.cost) for engine in engines}


def _choices(errors: Sequence[DecisionError], cost: Sequence[RouteCost]) -> tuple[Choice, ...]:
    routes = {one.route: one for one in cost}
    by_count: dict[str, list[float]] = {}
    for e in errors:
        by_count.setdefault(e.proximal_policy, []).append(e.by_count)
    points = [(name, 0.0, one) for name, one in routes.items() if SOURCES.find(name).provides is OLD]
    points += [(name, median(own), routes[ROUTES[name]]) for name, own in by_count.items() if ROUTES[name] in routes]
    tolerance = NOISE * median(one.update_s for one in cost)
    best = frontier([(name, error, one.extra_s) for name, error, one in points], tolerance)
    found = [Choice(name=name, error=error, cost=one, on_frontier=name in best) for name, error, one in points]
    return tuple(sorted(found, key=lambda choice: (choice.extra_s, choice.error)))


def cost_tables(study: Study) -> list[Table]:
    """All tables of the part; empty where no cost is measured."""
    if not study.cost:
        return []
    header, *rows = cost_table(study.cost)
    cost = Table(
        part=PART,
        title="System cost by route",
        header=header,
        rows=tuple(rows),
        caption="Runtime local, one run at a time; by update, after the first two. Stored: beside the live weights. Copies: of "
        "the weights on the trainer's side. Forwards: tokens read for the proximal policy over tokens of the batch. "
        "Extra s: what the update waits for scores, and for storing or averaging. Stall s: the engine stands still. "
        "Hidden: scoring that nobody waited for.",
        legend=("Rows of the paper: as printed, on its own machines; a dash where it prints nothing.",),
    )
    return [cost, *_frontier(study)]


def _frontier(study: Study) -> list[Table]:
    by_engine = choices(study)
    if not by_engine:
        return []
    found = {(engine, choice.name): choice for engine, own in by_engine.items() for choice in own}
    costs = {choice.name: choice.cost for choice in found.values()}

    def cell(choice: Choice | None) -> str:
        return DASH if choice is None else f"{choice.error:.2%}" + (" ●" if choice.on_frontier else "")

    return [
        Table(
            part=PART,
            title="Which one is worth its cost",
            header=("exact route or proximal policy", "extra s", "update s", "copies", *by_engine),
            rows=tuple(
                (
                    name,
                    f"{one.extra_s:.3f}",
                    f"{one.update_s:.2f}",
                    f"{one.resident_copies:.1f}",
                    *(cell(found.get((engine, name))) for engine in by_engine),
                )
                for name, one in sorted(costs.items(), key=lambda item: item[1].extra_s)
            ),
            caption="Seconds that the route adds to an update, the whole update, copies of the weights; by engine the median "
            f"share of tokens decided otherwise, over all windows and lag shapes at band {main_band(study.decision):g}. Work "
            f"that overlaps with the update and stalls of the engine are not in the extra seconds. {FORM}",
            legend=(
                "●: on the frontier: no other one has a smaller error at no higher cost, or a lower cost at an equal error; "
                f"costs that differ by no more than {NOISE:.0%} of the median update count as equal.",
            ),
        )
    ]
