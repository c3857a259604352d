"""The table of a comparison: means over seeds with t intervals, and differences from the first recipe, paired by seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Final

from rich import box
from rich.table import Table

from oldlogits.compare.runs import METRICS, RunFigures

T_95: Final = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
"""The 0.975 quantile of Student's t for 1 to 30 degrees of freedom; beyond 30 the last one is used, which is too wide."""

CAPTION: Final = (
    "Means over n seeds, ± half of the 95% t interval; 2 - 1: the difference of two recipes, paired by seed. success: "
    "held-out, sampled, last evaluation. reward: of trained trajectories. dec. error: audited tokens that the proximal policy "
    "decides otherwise than the old logits. seconds: of training. bytes: most that was stored beside the live weights."
)
HEADINGS: Final = ("", "n", "success", "reward", "dec. error", "seconds", "bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mean:
    """A mean over seeds.

    Args:
        mean: The mean.
        half: Half of its 95% t interval; None where one seed alone gives no interval.
        num_seeds: How many seeds it is over.
    """

    mean: float
    half: float | None
    num_seeds: int


Rows = Mapping[str, Mapping[str, Mean]]
"""Means by row and metric; "1", "2" are recipes and "2 - 1" is a difference."""


def mean_of(values: Sequence[float]) -> Mean:
    """Return ``mean ± t(0.975, n - 1) stdev / sqrt(n)`` of at least one value.

    Example:
        >>> found = mean_of([0.1, 0.2, 0.3])
        >>> round(found.mean, 3), round(found.half, 3)
        (0.2, 0.248)
    """
    n = len(values)
    half = T_95[min(n, 31) - 2] * stdev(values) / math.sqrt(n) if n > 1 else None
    return Mean(mean=fmean(values), half=half, num_seeds=n)


def rows_of(figures: Sequence[RunFigures]) -> Rows:
    """Return a row for each recipe, and below each but the first one for its paired differences from the first."""
    by_name: dict[str, dict[int, RunFigures]] = {}
    for one in figures:
        by_name.setdefault(one.name, {})[one.seed] = one
    rows: dict[str, dict[str, Mean]] = {}
    first = next(iter(by_name.values()), {})
    for number, runs in enumerate(by_name.values(), start=1):
        rows[str(number)] = _means([(run.values, None) for run in runs.values()])
        if number > 1:
            rows[f"{number} - 1"] = _means([(run.values, first[seed].values) for seed, run in runs.items() if seed in first])
    return rows


Values = Mapping[str, float | None]


def _means(pairs: Sequence[tuple[Values, Values | None]]) -> dict[str, Mean]:
    found: dict[str, list[float]] = {metric: [] for metric in METRICS}
    for values, less in pairs:
        for metric in METRICS:
            value, base = values[metric], 0.0 if less is None else less[metric]
            if value is not None and base is not None:
                found[metric].append(value - base)
    return {metric: mean_of(values) for metric, values in found.items() if values}


def _cells(name: str, means: Mapping[str, Mean]) -> tuple[str, ...]:
    shown = [_shown(metric, means[metric], "+" if "-" in name else "") if metric in means else "" for metric in METRICS]
    return (name, str(max((mean.num_seeds for mean in means.values()), default=0)), *shown)


def _shown(metric: str, mean: Mean, sign: str = "") -> str:
    forms = {
        "success": (1, ".3f", ""),
        "reward": (1, ".3f", ""),
        "decision_error": (0.01, ".2f", "%"),
        "seconds": (1, ".0f", ""),
    }
    scale, form, unit = forms.get(metric) or ((1e9, ".2f", " GB") if abs(mean.mean) >= 1e9 else (1e6, ".1f", " MB"))
    half = "" if mean.half is None else f" ±{mean.half / scale:{form}}"
    return f"{mean.mean / scale:{sign}{form}}{half}{unit}"


def terminal(rows: Rows) -> Table:
    """Return the table for a terminal of 80 columns."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, caption=CAPTION, caption_justify="left")
    for heading in HEADINGS:
        table.add_column(heading, justify="right" if heading else "left", overflow="fold")
    for name, means in rows.items():
        table.add_row(*_cells(name, means))
    return table


def legend(figures: Sequence[RunFigures]) -> str:
    """Return the names of the recipes by their numbers."""
    return "\n".join(f"{i}  {name}" for i, name in enumerate(dict.fromkeys(one.name for one in figures), start=1))


def markdown(rows: Rows, figures: Sequence[RunFigures]) -> str:
    """Return a document: the table, and one line a run."""
    body = [_cells(name, means) for name, means in rows.items()]
    runs = [_cells(f"{one.name}, seed {one.seed}", _means([(one.values, None)])) for one in figures]
    lines = [HEADINGS, ("---",) * len(HEADINGS), *body, *runs]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"# Comparison\n\n```text\n{legend(figures)}\n```\n\n{table}\n\n{CAPTION}\n"
