"""Row charts and scatter charts put values where their axes say, and hide nothing behind something else."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oldlogits.record.report.charts import x_axis, y_axis
from studies.old_logits.show.charts import Dot, Mark, Row, row_chart, scatter_chart

shares = st.floats(0, 1).map(lambda share: round(share, 3))


def circles(svg):
    return [(float(x), float(y)) for x, y in re.findall(r'<circle class="[^"]*" cx="([-\d.]+)" cy="([-\d.]+)"', svg)]


def test_a_row_stands_where_its_axis_says():
    x = x_axis(-1.0, 1.0)
    rows = [Row(label="regime", is_heading=True), Row(label="a", mean=(-0.5, 0.0, 0.5)), Row(label="b", note="missing")]
    svg = row_chart(x, rows, x_label="difference", null=0.0)
    (centre, height) = circles(svg)[0]
    assert centre == pytest.approx((150 + 468) / 2)
    low, high = (replace(x, start=150.0).at(end) for end in (-0.5, 0.5))
    assert f"M{low:.1f},{height:.1f}H{high:.1f}" in svg, "the interval"
    assert f'class="bound" x1="{centre:.1f}"' in svg, "null"
    assert re.findall(r'class="(heading|rowlabel)">(\w+)<', svg) == [
        ("heading", "regime"),
        ("rowlabel", "a"),
        ("rowlabel", "b"),
    ]
    assert ">missing<" in svg


def test_dots_stand_beside_the_mean_of_their_row_and_rows_below_each_other():
    rows = [Row(label=name, dots=[Dot(x=0.5, colour="c0", tip="<t>")], mean=(0.4, 0.5, 0.6)) for name in "ab"]
    svg = row_chart(x_axis(0.0, 1.0), rows, x_label="success")
    heights = [y for _, y in circles(svg)]
    assert len(set(heights)) == 4
    assert heights[2] - heights[0] == heights[3] - heights[1] > 0
    assert 'data-tip="&lt;t&gt;"' in svg


def scatter(places):
    """A scatter of these points: where the labels stand, left and base line; each is 7 letters wide."""
    marks = [Mark(x=x, y=y, label=f"route {index}", colour="c0", tip="") for index, (x, y) in enumerate(places)]
    svg = scatter_chart(x_axis(0.0, 1.0), y_axis(0.0, 1.0), marks, x_label="cost", path=places[:1])
    return [(float(x), float(y)) for x, y in re.findall(r'<text x="([-\d.]+)" y="([-\d.]+)" class="boundlabel"', svg)]


@pytest.mark.parametrize(
    "places",
    [
        [(0.5, 0.5), (0.5, 0.51)],
        [(0.5, 0.5), (0.52, 0.5), (0.51, 0.52)],
        [(0.0, 0.0), (0.0, 0.02), (0.0, 0.04)],
        [(1.0, 0.5), (0.99, 0.5)],
        [(0.3, 0.5), (0.36, 0.5)],
    ],
)
def test_the_labels_of_near_points_do_not_cover_each_other(places):
    labels = scatter(places)
    assert len(labels) == len(places)
    for (left, base), (other, below) in combinations(labels, 2):
        assert abs(left - other) >= 6.2 * 7 - 0.2 or abs(base - below) >= 12 - 0.2


@given(st.lists(st.tuples(shares, shares), min_size=1, max_size=6))
def test_a_label_stands_beside_its_own_point(places):
    for (x, y), (left, base) in zip(places, scatter(places), strict=True):
        at, height = x_axis(0.0, 1.0).at(x), y_axis(0.0, 1.0).at(y)
        assert min(abs(left - at), abs(left + 6.2 * 7 - at)) <= 9.2
        assert abs(base - height) <= 48 + 4.2
