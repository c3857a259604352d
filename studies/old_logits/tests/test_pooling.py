"""Pooled decision errors, the declared checks and the frontier, against hand-computed figures."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oldlogits.core.errors import ConfigError
from studies.old_logits.analyse.pooling import declared_checks, frontier, pooled
from studies.old_logits.measure.decision import DecisionError
from studies.old_logits.results import Cross

N = 1000
CROSS = Cross(windows=(0, 8, 32), lags=("even", "skewed"), engines=("fp8", "int4"), bands=(1.1, 3.0), num_traces=5)


def error(
    proximal_policy: str, count: int, *, trace: int = 0, by_weight: float = 0.0, beta: float | None = None, **more
) -> DecisionError:
    """`count` wrong decisions among 1,000 tokens."""
    row = DecisionError(
        window=8,
        lag="even",
        engine="fp8",
        driver="exact",
        trace=trace,
        seed=trace,
        band=1.1,
        proximal_policy=proximal_policy,
        num_tokens=N,
        num_nonzero=N,
        staleness=4.0,
        beta=beta,
        log_error=0.01,
        by_count=count / N,
        by_weight=by_weight,
        wrongly_kept=0.0,
        wrongly_masked=count / N,
        wrongly_kept_nonzero=0.0,
        wrongly_masked_nonzero=count / N,
        by_weight_kept=0.0,
        by_weight_masked=by_weight,
    )
    return replace(row, **more)


def test_a_ratio_is_the_geometric_mean_over_traces_with_half_a_token_added_to_both():
    """Traces of 20/40 and 80/60 wrong tokens: sqrt(20.5/40.5 * 80.5/60.5); t(1) at 95% is 12.706."""
    rows = [error("arrival", 40), error("ewma", 20), error("arrival", 60, trace=1), error("ewma", 80, trace=1)]
    [found] = pooled(rows)
    first, second = math.log(20.5 / 40.5), math.log(80.5 / 60.5)
    assert found.ratio.mean == pytest.approx(math.exp((first + second) / 2))
    half = 12.7062 * abs(first - second) / 2
    assert found.ratio.low == pytest.approx(math.exp((first + second) / 2 - half), rel=1e-4)
    assert found.ratio.high == pytest.approx(math.exp((first + second) / 2 + half), rel=1e-4)
    assert (found.ratio.n, found.num_zero) == (2, 0)
    assert (found.median, found.median_arrival) == (0.05, 0.05)
    assert (found.engine, found.lag, found.window, found.band, found.proximal_policy) == ("fp8", "even", 8, 1.1, "ewma")


def test_a_trace_without_errors_counts_and_is_named():
    rows = [
        error("arrival", 4),
        error("mu", 0),
        error("arrival", 0, trace=1),
        error("mu", 0, trace=1),
        error("arrival", 1, trace=2),
    ]
    [found] = pooled([*rows, error("mu", 3, trace=2)])
    assert found.ratio.mean == pytest.approx((0.5 / 4.5 * 1 * 3.5 / 1.5) ** (1 / 3))
    assert (found.ratio.n, found.num_zero) == (3, 2)
    assert (found.median, found.median_arrival) == (0.0, 0.001)


def test_by_weight_the_errors_by_weight_are_pooled():
    [found] = pooled([error("arrival", 4, by_weight=0.02), error("mu", 400, by_weight=0.01)], "by_weight")
    assert found.ratio.mean == pytest.approx(0.0105 / 0.0205)
    assert (found.median, found.median_arrival) == (0.01, 0.02)


def test_traces_of_one_seed_are_averaged_before_the_interval_over_seeds():
    """Seed 0 has two traces of 20/40 and 80/60 wrong tokens, seed 1 one of 30/50; t(1) at 95% is 12.706."""
    counts = [(0, 0, 20, 40), (1, 0, 80, 60), (2, 1, 30, 50)]
    rows = [
        error(name, count, trace=trace, seed=seed)
        for trace, seed, ewma, arrival in counts
        for name, count in (("ewma", ewma), ("arrival", arrival))
    ]
    [found] = pooled(rows)
    first, second = (math.log(20.5 / 40.5) + math.log(80.5 / 60.5)) / 2, math.log(30.5 / 50.5)
    assert found.ratio.mean == pytest.approx(math.exp((first + second) / 2))
    assert found.ratio.high == pytest.approx(math.exp((first + second) / 2 + 12.7062 * abs(first - second) / 2), rel=1e-4)
    assert (found.ratio.n, found.num_traces) == (2, 3)
    check = declared_checks(rows, CROSS)[0]
    assert (check.value, check.ratio.n, check.num_traces) == (pytest.approx(found.ratio.mean), 2, 3)


def test_a_check_knows_how_many_traces_were_declared_for_it():
    assert [check.num_declared for check in declared_checks([], CROSS)] == [10, 60, 60, 20]
    assert [check.num_declared for check in declared_checks([], replace(CROSS, bands=(1.5,)))] == [0, 0, 0, 0]
    assert [check.num_declared for check in declared_checks([], replace(CROSS, lags=("skewed",)))] == [0, 30, 30, 0]


def test_settings_are_kept_apart_and_drivers_are_pooled():
    kinds = [{"band": 1.5}, {"window": 16}, {"lag": "skewed"}, {"engine": "int4"}, {}, {"driver": "mu"}]
    rows = [error(name, count, **kind) for kind in kinds for name, count in (("ewma", 5), ("arrival", 10), ("mu", 1))]
    found = pooled(rows)
    assert [p.proximal_policy for p in found] == ["ewma", "mu"] * 5
    assert [p.num_traces for p in found] == [1] * 8 + [2] * 2
    assert [p.ratio.mean for p in found[::2]] == pytest.approx([5.5 / 10.5] * 5)


@pytest.mark.parametrize(
    "rows", [[error("ewma", 3)], [error("arrival", 1), error("ewma", 3), error("ewma", 3)]], ids=["no arrival", "twice"]
)
def test_rows_that_do_not_make_up_a_trace_are_refused(rows):
    with pytest.raises(ConfigError):
        pooled(rows)


def rows_of(arrival: int, ewma: int, auto: int, beta: float = 0.7, **more) -> list[DecisionError]:
    return [
        error("arrival", arrival, **more),
        error("ewma", ewma, beta=0.8, **more),
        error("ewma-auto", auto, beta=beta, **more),
    ]


def test_the_first_check_is_over_even_lags_windows_8_to_32_fp8_and_band_1_1():
    inside = rows_of(100, 80, 90) + rows_of(100, 90, 90, window=32, trace=1)
    outside = [rows_of(10, 900, 10, **kind) for kind in ({"lag": "skewed"}, {"window": 4}, {"engine": "int4"}, {"band": 1.5})]
    check, *_ = declared_checks([*inside, *(row for rows in outside for row in rows)], CROSS)
    assert check.value == pytest.approx(math.sqrt(80.5 / 100.5 * 90.5 / 100.5))
    assert (check.num_traces, check.bar, check.holds) == (2, 0.95, True)
    assert not declared_checks(rows_of(100, 96, 90), CROSS)[0].holds


def test_the_second_check_compares_auto_with_the_better_of_both_in_each_setting():
    """Of the first setting ewma is the better one, sqrt(80.5 * 50.5) < sqrt(100.5 * 45.5), though not on the second trace."""
    rows = rows_of(100, 80, 82) + rows_of(45, 50, 48, trace=1) + rows_of(40, 60, 38, trace=2, lag="skewed", engine="int4")
    check = declared_checks(rows + rows_of(1, 1, 500, band=1.5), CROSS)[1]
    assert check.value == pytest.approx((82.5 / 80.5 * 48.5 / 50.5 * 38.5 / 40.5) ** (1 / 3))
    assert (check.num_traces, check.bar, check.holds) == (3, 1.02, True)
    assert not declared_checks(rows_of(100, 80, 90), CROSS)[1].holds


def test_the_third_check_compares_auto_with_the_better_of_both_on_each_trace():
    """The better one is ewma with 80 on the first trace, and arrival with 40 on the second."""
    rows = rows_of(100, 80, 82) + rows_of(40, 60, 38, trace=1)
    check = declared_checks(rows + rows_of(1, 1, 500, band=1.5), CROSS)[2]
    assert check.value == pytest.approx(math.sqrt(82.5 / 80.5 * 38.5 / 40.5))
    assert (check.num_traces, check.bar, check.holds) == (2, 1.02, True)
    assert not declared_checks(rows_of(100, 80, 90), CROSS)[2].holds


def test_the_fourth_check_is_the_smallest_beta_over_even_lags():
    rows = rows_of(9, 9, 9, beta=0.4) + rows_of(9, 9, 9, beta=0.0, lag="skewed", trace=1) + rows_of(9, 9, 9, beta=0.6, trace=2)
    check = declared_checks(rows, CROSS)[3]
    assert (check.value, check.num_traces, check.holds) == (0.4, 2, True)
    assert not declared_checks(rows_of(9, 9, 9, beta=0.0), CROSS)[3].holds


def test_what_no_trace_speaks_of_does_not_hold():
    for check in declared_checks([error("arrival", 3), error("mu", 1)], CROSS):
        assert (check.value, check.ratio, check.num_traces, check.holds) == (None, None, 0, False)


points = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=8)


@given(points)
def test_the_frontier_is_what_no_route_beats(pairs):
    named = [(str(i), float(error), float(cost)) for i, (error, cost) in enumerate(pairs)]
    assert frontier(named), "some route is unbeaten"
    assert frontier(named, tolerance=9.0)

    def beats(a, b):
        return a[1] <= b[1] and a[2] <= b[2] and a[1:] != b[1:]

    expected = {b[0] for b in named if not any(beats(a, b) for a in named)}
    found = frontier(named)
    assert len(found) == len(set(found))
    assert set(found) == expected
    costs = {name: cost for name, _, cost in named}
    assert [costs[name] for name in found] == sorted(costs[name] for name in found)


def test_costs_within_the_tolerance_are_equal_on_the_frontier():
    named = [("snapshot", 0.0, 0.30), ("eager", 0.0, 0.22), ("ewma", 0.03, 0.21), ("arrival", 0.05, 0.19), ("mu", 0.02, 0.0)]
    assert frontier(named) == ("mu", "eager")
    assert frontier(named, tolerance=0.1) == ("mu", "eager", "snapshot")
    assert frontier(named, tolerance=0.25) == ("eager", "snapshot"), "both beat mu: no error at a cost that counts as equal"
