"""Decision errors over traces: ratios to those of arrival, the declared checks, and the frontier of error and cost."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import median
from typing import Final, Literal

from oldlogits.core.errors import ConfigError
from studies.old_logits.analyse.stats import Estimate, geometric_mean, group_means
from studies.old_logits.measure.decision import DecisionError
from studies.old_logits.results import Cross

Measure = Literal["by_count", "by_weight"]

HALF: Final = 0.5
"""Tokens added to both counts of a ratio, in every trace, so that a trace without errors has a ratio too; it draws ratios
of a few tokens towards 1. By weight: half a token of mean weight."""

EWMA_BAR: Final = 0.95
AUTO_BAR: Final = 1.02
CHECKED_BAND: Final = 1.1

_WIDE: Final = range(8, 33)

SeedRatio = tuple[int, float]
"""A trace's seed, and a ratio found on it."""

StandIns = Mapping[str, DecisionError]
"""The rows of one trace under one band, by proximal policy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pooled:
    """One proximal policy in one setting, over the traces of that setting.

    Args:
        engine: The engine's numerics.
        lag: How lags are spread over the window.
        window: The largest lag, in versions.
        band: The discrepancy band.
        proximal_policy: Its name.
        ratio: Geometric mean over seeds, and over the traces of each, of ``(error + h) / (arrival's error + h)``, h = `HALF`
            a token, with the t interval of the logarithm over seeds; n is the number of seeds.
        num_traces: That it is over.
        median: Of the error, over traces; a share.
        median_arrival: The same of arrival.
        num_zero: Traces in which this error or arrival's is 0.
    """

    engine: str
    lag: str
    window: int
    band: float
    proximal_policy: str
    ratio: Estimate
    num_traces: int
    median: float
    median_arrival: float
    num_zero: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """A declared statement about decision errors, and what was found.

    Args:
        claim: The statement.
        bar: What the value is compared with.
        value: What was found; None: no trace says anything about it, and it does not hold.
        ratio: Of a claim about a ratio: its interval over seeds.
        num_traces: That say something about it.
        num_declared: Traces that were to say something about it.
        holds: Whether the value keeps the bar.
    """

    claim: str
    bar: float
    value: float | None
    ratio: Estimate | None
    num_traces: int
    num_declared: int
    holds: bool


def pooled(errors: Iterable[DecisionError], measure: Measure = "by_count") -> tuple[Pooled, ...]:
    """Every proximal policy beside arrival, by engine, lag, window and band, in the order in which they come up.

    Args:
        errors: Of any traces; those of one setting are pooled whatever their driver.
        measure: Which error.

    Raises:
        ConfigError: A trace has no row of arrival, or two rows of one proximal policy.
    """
    cells: dict[tuple[str, str, int, float, str], list[StandIns]] = {}
    for rows in _traces(errors):
        for name, e in rows.items():
            if name != "arrival":
                cells.setdefault((e.engine, e.lag, e.window, e.band, name), []).append(rows)
    return tuple(
        Pooled(
            engine=engine,
            lag=lag,
            window=window,
            band=band,
            proximal_policy=name,
            ratio=_over_seeds([_ratio(rows, name, ("arrival",), measure) for rows in traces]),
            num_traces=len(traces),
            median=median(_error(rows[name], measure) for rows in traces),
            median_arrival=median(_error(rows["arrival"], measure) for rows in traces),
            num_zero=sum(not _error(rows[name], measure) or not _error(rows["arrival"], measure) for rows in traces),
        )
        for (engine, lag, window, band, name), traces in cells.items()
    )


def declared_checks(errors: Iterable[DecisionError], cross: Cross, measure: Measure = "by_count") -> tuple[Check, ...]:
    """The declared statements about the averages, each over all of its traces at band `CHECKED_BAND`.

    Geometric means are over seeds, and over the traces of each.

    1. ``ewma / arrival <= EWMA_BAR``: geometric mean; even lags, windows 8 to 32, engine fp8.
    2. ``ewma-auto / the better of arrival and ewma <= AUTO_BAR``: geometric mean; every engine, lag shape and window. The
       better one is that of the smaller geometric mean over the traces of the setting: what one could have chosen for it.
       Auto's beta follows from what lies before the recorded updates.
    3. ``ewma-auto / min(arrival, ewma) <= AUTO_BAR``: the same with the smaller error of every single trace. The smaller
       of two noisy errors is too small on average, so that even the better one of each setting has a ratio above 1.
    4. The smallest beta of ewma-auto is above 0; even lags, every engine and window above 0.
    """
    traces = [rows for rows in _traces(errors) if rows["arrival"].band == CHECKED_BAND]
    of_ewma = [
        _ratio(rows, "ewma", ("arrival",), measure)
        for rows in traces
        if "ewma" in rows and _is_even_fp8(rows["arrival"]) and rows["arrival"].window in _WIDE
    ]
    with_auto = [rows for rows in traces if "ewma-auto" in rows and "ewma" in rows]
    of_auto = [_ratio(rows, "ewma-auto", (better,), measure) for rows, better in _with_better(with_auto, measure)]
    of_auto_by_trace = [_ratio(rows, "ewma-auto", ("arrival", "ewma"), measure) for rows in with_auto]
    betas = [rows["ewma-auto"].beta for rows in with_auto if rows["arrival"].lag == "even" and rows["arrival"].window]
    known = [beta for beta in betas if beta is not None]
    settings = [(w, lag, engine) for w, lag, engine in product(cross.windows, cross.lags, cross.engines)]
    settings *= cross.num_traces * (CHECKED_BAND in cross.bands)
    num_ewma = sum(w in _WIDE and (lag, engine) == ("even", "fp8") for w, lag, engine in settings)
    return (
        _bounded("ewma / arrival: even lags, windows 8 to 32, fp8, band 1.1", EWMA_BAR, of_ewma, num_ewma),
        _bounded("ewma-auto / the better of arrival and ewma in each setting: band 1.1", AUTO_BAR, of_auto, len(settings)),
        _bounded("ewma-auto / the better of the two on each trace: band 1.1", AUTO_BAR, of_auto_by_trace, len(settings)),
        Check(
            claim="smallest beta of ewma-auto above 0: even lags",
            bar=0.0,
            value=min(known, default=None),
            ratio=None,
            num_traces=len(known),
            num_declared=sum(lag == "even" and w > 0 for w, lag, _ in settings),
            holds=bool(known) and min(known) > 0,
        ),
    )


def frontier(points: Sequence[tuple[str, float, float]], tolerance: float = 0.0) -> tuple[str, ...]:
    """The routes that no other one beats: none has a smaller error at no higher cost, or a lower cost at an equal error.

    Args:
        points: Name, decision error and cost of each route, in any units.
        tolerance: Costs that differ by no more count as equal.

    Returns:
        Names by ascending cost, then error; equal points are all on the frontier.

    Example:
        >>> frontier([("exact", 0.0, 9.0), ("ewma", 0.03, 4.0), ("arrival", 0.04, 4.0), ("mu", 0.01, 0.0)])
        ('mu', 'exact')
    """

    def is_beaten(error: float, cost: float) -> bool:
        return any((e < error and c <= cost + tolerance) or (e == error and c < cost - tolerance) for _, e, c in points)

    by_cost = sorted(points, key=lambda point: (point[2], point[1]))
    return tuple(name for name, error, cost in by_cost if not is_beaten(error, cost))


def _traces(errors: Iterable[DecisionError]) -> list[StandIns]:
    """The rows of each trace under each band, by proximal policy."""
    traces: dict[tuple[object, ...], dict[str, DecisionError]] = {}
    for e in errors:
        rows = traces.setdefault((e.engine, e.lag, e.window, e.band, e.driver, e.trace, e.seed), {})
        if e.proximal_policy in rows:
            raise ConfigError(
                f"two rows of proximal policy '{e.proximal_policy}' on one trace",
                got=f"driver {e.driver}, trace {e.trace}, seed {e.seed}, band {e.band}",
                allowed="one",
                fix="number the traces",
            )
        rows[e.proximal_policy] = e
    for rows in traces.values():
        if "arrival" not in rows:
            raise ConfigError(
                "a trace without the proximal policy that the others are compared with",
                got=", ".join(rows),
                allowed="rows with arrival",
                fix="pass all rows of `decision_errors`",
            )
    return list(traces.values())


def _is_even_fp8(e: DecisionError) -> bool:
    return e.lag == "even" and e.engine == "fp8"


def _error(e: DecisionError, measure: Measure) -> float:
    return e.by_count if measure == "by_count" else e.by_weight


def _ratio(rows: StandIns, name: str, others: Sequence[str], measure: Measure) -> SeedRatio:
    """A proximal policy's error over the smallest of the others', half a token added to both."""
    half = HALF / rows[name].num_tokens
    ratio = (_error(rows[name], measure) + half) / (min(_error(rows[other], measure) for other in others) + half)
    return rows[name].seed, ratio


def _with_better(traces: Sequence[StandIns], measure: Measure) -> Iterator[tuple[StandIns, str]]:
    """Each trace, and which of arrival and ewma has the smaller geometric mean over the traces of its setting."""
    settings: dict[tuple[object, ...], list[StandIns]] = {}
    for rows in traces:
        e = rows["arrival"]
        settings.setdefault((e.engine, e.lag, e.window, e.band), []).append(rows)
    for own in settings.values():
        log_ratio = sum(math.log(_ratio(rows, "ewma", ("arrival",), measure)[1]) for rows in own)
        yield from ((rows, "ewma" if log_ratio < 0 else "arrival") for rows in own)


def _over_seeds(ratios: Sequence[SeedRatio]) -> Estimate:
    """The geometric mean of the seeds' geometric means: traces of one seed are not independent."""
    return geometric_mean([math.exp(mean) for mean in group_means((seed, math.log(ratio)) for seed, ratio in ratios)])


def _bounded(claim: str, bar: float, ratios: Sequence[SeedRatio], num_declared: int) -> Check:
    found = _over_seeds(ratios) if ratios else None
    return Check(
        claim=claim,
        bar=bar,
        value=found.mean if found else None,
        ratio=found,
        num_traces=len(ratios),
        num_declared=num_declared,
        holds=found is not None and found.mean <= bar,
    )
