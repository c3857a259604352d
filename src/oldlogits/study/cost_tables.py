"""The tables of the system cost, ours beside the paper's, and which stand-in is worth which cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

from oldlogits.core.policies import OLD, SOURCES
from oldlogits.study.cost import RouteCost, cost_table
from oldlogits.study.decision import DecisionError
from oldlogits.study.decision_tables import main_band
from oldlogits.study.layout import DASH, Table
from oldlogits.study.pooling import frontier
from oldlogits.study.results import Study

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
"""The route that feeds a stand-in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A way to an update, with what it decides otherwise and what it costs, under one engine.

    Args:
        name: An exact route, or a stand-in.
        error: Median share of tokens decided otherwise than with the old logits; 0 for exact routes.
        extra_s: Seconds that its route adds to an update.
        on_frontier: Whether no other choice has a smaller error at no higher cost, or a lower cost at no larger error.
    """

    name: str
    error: float
    extra_s: float
    on_frontier: bool


def choices(study: Study) -> dict[str, tuple[Choice, ...]]:
    """By engine, every choice whose error and cost are both measured, cheapest first; empty without either."""
    if not study.decision or not study.cost:
        return {}
    band = main_band(study.decision)
    kept = [e for e in study.decision if e.band == band]
    engines = dict.fromkeys(e.engine for e in kept)
    return {engine: _choices([e for e in kept if e.engine == engine], study.cost) for engine in engines}


def _choices(errors: Sequence[DecisionError], cost: Sequence[RouteCost]) -> tuple[Choice, ...]:
    extra_s = {one.route: one.extra_s for one in cost}
    by_count: dict[str, list[float]] = {}
    for e in errors:
        by_count.setdefault(e.stand_in, []).append(e.by_count)
    points = [(route, 0.0, seconds) for route, seconds in extra_s.items() if OLD in SOURCES[route].provides]
    fed = [name for name in by_count if ROUTES[name] in extra_s]
    points += [(name, median(by_count[name]), extra_s[ROUTES[name]]) for name in fed]
    best = frontier(points)
    found = [Choice(name=name, error=error, extra_s=seconds, on_frontier=name in best) for name, error, seconds in points]
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
        "the weights on the trainer's side. Forwards: tokens read for the stand-in over tokens of the batch. Extra s: what the "
        "update waits for scores, and for storing or averaging. Stall s: the engine stands still. Hidden: scoring that nobody "
        "waited for.",
        legend=("Rows of the paper: as printed, on its own machines; a dash where it prints nothing.",),
    )
    return [cost, *_frontier(study)]


def _frontier(study: Study) -> list[Table]:
    by_engine = choices(study)
    if not by_engine:
        return []
    found = {(engine, choice.name): choice for engine, own in by_engine.items() for choice in own}
    names = dict.fromkeys(choice.name for own in by_engine.values() for choice in own)
    seconds = {choice.name: choice.extra_s for choice in found.values()}

    def cell(choice: Choice | None) -> str:
        return DASH if choice is None else f"{choice.error:.2%}" + (" ●" if choice.on_frontier else "")

    return [
        Table(
            part=PART,
            title="Which one is worth its cost",
            header=("exact route or stand-in", "extra s", *by_engine),
            rows=tuple(
                (name, f"{seconds[name]:.3f}", *(cell(found.get((engine, name))) for engine in by_engine))
                for name in sorted(names, key=seconds.__getitem__)
            ),
            caption="Seconds that the route adds to an update, and by engine the median share of tokens decided otherwise, "
            f"over all windows and lag shapes at band {main_band(study.decision):g}.",
            legend=(
                "●: on the frontier: no other one has a smaller error at no higher cost, or a lower cost at no larger error.",
            ),
        )
    ]
