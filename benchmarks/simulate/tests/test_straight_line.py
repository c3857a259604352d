"""Lines of seconds against size."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.simulate.fit import straight_line
from oldlogits.core.engine_stats import Line, piece

PIECES = st.lists(st.tuples(st.integers(0, 200), st.floats(0, 10)), min_size=1, max_size=20)


def total(pieces):
    return sum((piece(size, seconds) for size, seconds in pieces), Line())


@pytest.mark.slow
@given(PIECES)
def test_a_line_reproduces_the_sum_of_the_seconds_and_neither_part_is_below_0(pieces) -> None:
    fixed, unit = straight_line(total(pieces))
    assert fixed >= -1e-9
    assert unit >= 0
    expected = sum(seconds for _, seconds in pieces)
    assert len(pieces) * fixed + unit * sum(size for size, _ in pieces) == pytest.approx(expected, abs=1e-6)


@pytest.mark.slow
@given(st.lists(st.integers(0, 300), min_size=2, max_size=20, unique=True), st.floats(0.01, 5), st.floats(0.01, 5))
def test_points_on_a_line_give_the_line(sizes, fixed, unit) -> None:
    found = straight_line(total([(size, fixed + unit * size) for size in sizes]))
    assert found == pytest.approx((fixed, unit), rel=1e-6)


def test_the_slope_is_that_of_least_squares() -> None:
    sizes, seconds = [1, 4, 2, 9, 7], [1.0, 2.2, 1.1, 5.0, 3.9]
    slope, fixed = np.polyfit(sizes, seconds, 1)
    assert straight_line(total(zip(sizes, seconds, strict=True))) == pytest.approx((fixed, slope))


def test_nothing_takes_no_time() -> None:
    assert straight_line(Line()) == (0.0, 0.0)
    assert straight_line(piece(0, 2.0)) == (2.0, 0.0)
    assert math.isclose(straight_line(piece(4, 2.0))[0], 2.0)
