"""The table of a comparison: t intervals over seeds, differences paired by seed, and 80 columns."""

import pytest
from rich.console import Console

from oldlogits.compare.runs import METRICS, RunFigures
from oldlogits.compare.table import legend, markdown, mean_of, rows_of, terminal


def figures(name: str, seed: int, success: float | None, **values: float | None) -> RunFigures:
    return RunFigures(name=name, seed=seed, values={**dict.fromkeys(METRICS), "success": success, **values})


def test_the_interval_is_students_of_the_sleep_data():
    """Student 1908: ten differences of hours of sleep; 95% interval 0.70 to 2.46."""
    found = mean_of([1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4])
    assert found.mean == pytest.approx(1.58)
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((0.7001, 2.4599), abs=2e-4)


def test_one_seed_has_a_mean_and_no_interval():
    assert (mean_of([0.4]).mean, mean_of([0.4]).half) == (0.4, None)


def test_differences_are_paired_by_seed_and_only_over_seeds_that_both_have():
    rows = rows_of(
        [figures("a", 0, 0.1), figures("b", 0, 0.3), figures("a", 1, 0.9), figures("b", 1, 1.0), figures("b", 2, 0.0)]
    )
    assert list(rows) == ["1", "2", "2 - 1"]
    assert rows["2"]["success"].num_seeds == 3
    difference = rows["2 - 1"]["success"]
    assert (difference.mean, difference.num_seeds) == (pytest.approx(0.15), 2)
    assert difference.half == pytest.approx(12.706 * 0.1 / 2)


def test_what_was_not_measured_is_left_out_and_not_counted_as_zero():
    rows = rows_of([figures("a", 0, 0.5, reward=0.2), figures("b", 0, None, reward=0.3)])
    assert "success" not in rows["2"]
    assert "success" not in rows["2 - 1"]
    assert rows["2 - 1"]["reward"].mean == pytest.approx(0.1)


def test_the_table_fits_80_columns_and_the_document_has_every_run():
    measured = [
        figures(name, seed, 0.9 + seed / 100, reward=0.8 + seed / 50, decision_error=0.0123, seconds=110.0 + seed, bytes=1.5e9)
        for name in ("a long name of a recipe,lr=0.0001", "another,lr=0.0005")
        for seed in range(3)
    ]
    rows = rows_of(measured)
    console = Console(width=80, highlight=False)
    with console.capture() as capture:
        console.print(terminal(rows))
    lines = capture.get().splitlines()
    assert max(map(len, lines)) <= 80
    assert any(
        line.split() == ["1", "3", "0.910", "±0.025", "0.820", "±0.050", "1.23", "±0.00%", "111", "±2", "1.50", "±0.00", "GB"]
        for line in lines
    )
    assert legend(measured).splitlines() == ["1  a long name of a recipe,lr=0.0001", "2  another,lr=0.0005"]
    assert "| another,lr=0.0005, seed 2 | 1 | 0.920 | 0.840 | 1.23% | 112 | 1.50 GB |" in markdown(rows, measured)
