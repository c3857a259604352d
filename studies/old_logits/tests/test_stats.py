"""Intervals and tests against published results and their own laws."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t as student

from oldlogits.compare.table import T_95
from oldlogits.core.errors import ConfigError
from studies.old_logits.analyse.stats import geometric_mean, holm, mean_interval

numbers = st.floats(-1, 1).map(lambda x: round(x, 6))
p_values = st.lists(st.floats(0, 1), min_size=1, max_size=9)


def test_the_products_table_of_student_is_scipys():
    assert [round(float(student.ppf(0.975, dof)), 3) for dof in range(1, 31)] == list(T_95)
    assert student.ppf(0.975, 31) < T_95[-1], "beyond the table intervals are too wide, never too narrow"


def test_the_sleep_data_of_student_give_his_result():
    """Student 1908, "The probable error of a mean": ten patients, two drugs; t = 4.0621 with 9 degrees of freedom."""
    first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    found = mean_interval([b - a for a, b in zip(first, second, strict=True)])
    assert (round(found.mean, 2), round(found.low, 7), round(found.high, 6)) == (1.58, 0.7001142, 2.459886)
    assert found.p == pytest.approx(0.00283289, abs=1e-8)
    assert (found.n, found.sign) == (10, 1)


@given(st.lists(numbers, min_size=2, max_size=12), st.floats(-2, 2), st.floats(0.1, 3))
def test_intervals_move_with_a_shift_and_grow_with_a_scale(values, shift, scale):
    plain = mean_interval(values)
    moved = mean_interval([shift + scale * value for value in values])
    for name in ("mean", "low", "high"):
        assert getattr(moved, name) == pytest.approx(shift + scale * getattr(plain, name), abs=1e-6)


@given(st.lists(numbers, min_size=2, max_size=12))
def test_p_is_below_5_percent_exactly_where_the_interval_leaves_0(values):
    found = mean_interval(values)
    if min(abs(found.low), abs(found.high)) > 1e-9:
        assert (found.p < 0.05) == (found.sign != 0)


def test_one_value_has_no_interval_and_equal_values_have_none_either_way():
    one = mean_interval([0.3])
    assert (one.mean, one.low, one.high, one.p, one.sign) == (0.3, -math.inf, math.inf, 1.0, 0)
    same, zero = mean_interval([0.25, 0.25]), mean_interval([0.0, 0.0, 0.0])
    assert (same.low, same.high, same.p, same.sign) == (0.25, 0.25, 0.0, 1)
    assert (zero.low, zero.high, zero.p, zero.sign) == (0.0, 0.0, 1.0, 0)


@pytest.mark.parametrize("values", [[], [0.1, math.nan], [math.inf]])
def test_no_mean_of_nothing_or_of_what_is_not_finite(values):
    with pytest.raises(ConfigError):
        mean_interval(values)


def test_holm_gives_his_example():
    """Holm 1979: the sorted p values times m, m - 1, ..., made monotone."""
    assert holm([0.01, 0.02, 0.005, 0.9]) == pytest.approx((0.03, 0.04, 0.02, 0.9))
    assert holm([0.04, 0.03]) == pytest.approx((0.06, 0.06))
    assert holm([]) == ()


@given(p_values)
def test_holm_rejects_what_his_step_down_procedure_rejects(found):
    for level in (0.01, 0.05, 0.2):
        rejected: set[int] = set()
        for rank, index in enumerate(sorted(range(len(found)), key=lambda i: found[i])):
            if found[index] > level / (len(found) - rank) * (1 - 1e-12):
                break
            rejected.add(index)
        adjusted = holm(found)
        assert all(adjusted[index] <= level * (1 + 1e-9) for index in rejected)
        assert all(adjusted[i] > level * (1 - 1e-9) for i in set(range(len(found))) - rejected)


def test_holm_does_not_depend_on_the_order():
    p = (0.001, 0.04, 0.03, 0.5)
    by_value = dict(zip(p, holm(p), strict=True))
    assert all(holm(order) == tuple(by_value[value] for value in order) for order in permutations(p))


@given(st.lists(st.floats(0.01, 100), min_size=2, max_size=10))
def test_a_geometric_mean_is_that_of_logarithms_and_inverts_with_the_ratios(ratios):
    found, inverse = geometric_mean(ratios), geometric_mean([1 / ratio for ratio in ratios])
    assert found.mean == pytest.approx(math.prod(ratios) ** (1 / len(ratios)), rel=1e-9)
    assert inverse.mean == pytest.approx(1 / found.mean, rel=1e-9)
    assert (inverse.low, inverse.high) == pytest.approx((1 / found.high, 1 / found.low), rel=1e-6)
    assert inverse.p == pytest.approx(found.p, abs=1e-9)


def test_a_geometric_mean_is_judged_against_1():
    below = geometric_mean([0.5, 0.6, 0.55])
    assert (below.sign, below.null) == (-1, 1.0)
    assert below.high < 1
    one = geometric_mean([0.5])
    assert (one.low, one.high, one.sign) == (0.0, math.inf, 0)
    with pytest.raises(ConfigError):
        geometric_mean([0.0, 1.0])
