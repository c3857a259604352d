"""Lines of seconds against size."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oldlogits.core.engine_stats import Line, piece

PIECES = st.lists(st.tuples(st.integers(0, 200), st.floats(0, 10)), min_size=1, max_size=20)


def total(pieces):
    return sum((piece(size, seconds) for size, seconds in pieces), Line())


@given(PIECES)
def test_a_line_reproduces_the_sum_of_the_seconds_and_neither_part_is_below_0(pieces) -> None:
    fixed, unit = total(pieces).fit()
    assert fixed >= -1e-9
    assert unit >= 0
    expected = sum(seconds for _, seconds in pieces)
    assert len(pieces) * fixed + unit * sum(size for size, _ in pieces) == pytest.approx(expected, abs=1e-6)


@given(st.lists(st.integers(0, 300), min_size=2, max_size=20, unique=True), st.floats(0.01, 5), st.floats(0.01, 5))
def test_points_on_a_line_give_the_line(sizes, fixed, unit) -> None:
    found = total([(size, fixed + unit * size) for size in sizes]).fit()
    assert found == pytest.approx((fixed, unit), rel=1e-6)


def test_the_slope_is_that_of_least_squares() -> None:
    sizes, seconds = [1, 4, 2, 9, 7], [1.0, 2.2, 1.1, 5.0, 3.9]
    slope, fixed = np.polyfit(sizes, seconds, 1)
    assert total(zip(sizes, seconds, strict=True)).fit() == pytest.approx((fixed, slope))


def test_the_difference_of_two_sums_is_what_lies_between() -> None:
    before, between = total([(3, 1.0)]), total([(5, 2.0), (2, 1.5)])
    assert (before + between) - before == between


def test_nothing_takes_no_time() -> None:
    assert Line().fit() == (0.0, 0.0)
    assert piece(0, 2.0).fit() == (2.0, 0.0)
    assert math.isclose(piece(4, 2.0).fit()[0], 2.0)
