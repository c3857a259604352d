"""Rows: medians of ratios taken round by round, and bars that are met or missed."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.machine import Machine
from benchmarks.versions.bars import ANY, BY_NAME, FAST, QUANTITIES, SLOW
from benchmarks.versions.rows import Report, Seconds, Steps, Subject

SUBJECT = Subject(model="synthetic", lr=SLOW, num_params=100)
MACHINE = Machine(device="a CPU", features=("avx2",), num_cores=2, load=0.5, fast_path="numba", software="Python")


def seconds(*busy: float) -> list[Seconds]:
    return [Seconds(busy_s=busy_s, wall_s=2 * busy_s) for busy_s in busy]


def test_a_row_is_the_median_with_its_quartiles():
    row = SUBJECT.row("bytes.cold", [10, 1, 4, 2, 3])
    assert (row.low, row.median, row.high, row.num_samples, row.wall) == (2, 3, 4, 5, None)
    single = SUBJECT.row("bytes.cold", [7.0])
    assert (single.low, single.median, single.high) == (7, 7, 7)


def test_ratios_are_taken_within_a_round():
    """Medians of works and of units would be 3 / 2; the rounds' own ratios are 1/4, 3/2 and 8/1."""
    row = SUBJECT.ratios("switch.memory", seconds(1, 3, 8), seconds(4, 2, 1))
    assert (row.median, row.wall) == (1.5, 1.5)
    assert (row.low, row.high) == ((0.25 + 1.5) / 2, (1.5 + 8) / 2)


def test_seconds_are_added_and_scaled_on_both_clocks():
    a, b = Seconds(busy_s=1, wall_s=2), Seconds(busy_s=0.5, wall_s=1)
    assert a + b == Seconds(busy_s=1.5, wall_s=3)
    assert a - b == b == a * 0.5


def test_wall_time_stands_beside_busy_time():
    row = SUBJECT.ratios("switch.memory", [Seconds(busy_s=1, wall_s=9)], [Seconds(busy_s=2, wall_s=3)])
    assert (row.median, row.wall) == (0.5, 3)
    assert SUBJECT.milliseconds("memcpy", seconds(0.002)).median == 2
    assert SUBJECT.milliseconds("memcpy", seconds(0.002)).wall == 4


@pytest.mark.parametrize(
    "quantity, model, lr, value, met",
    [
        ("bytes.cold", "synthetic", 1e-6, 0.0070, True),
        ("bytes.cold", "synthetic", 1e-6, 0.0071, False),
        ("bytes.cold", "synthetic", 1e-5, 0.035, True),
        ("bytes.cold", "smollm2", 1e-6, 0.0041, False),
        ("bytes.of_xor", "smollm2", 1e-5, 0.55, True),
        ("switch.memory", "synthetic", 5e-6, 0.81, False),
        ("switch.memory", "synthetic", 1e-5, 0.99, True),
        ("switch.memory", "synthetic", 1e-4, 9.0, None),
        ("walk.pass", "synthetic", 1e-6, 0.45, True),
        ("ewma", "synthetic", ANY, 1.06, False),
        ("cast", "synthetic", 1e-6, 9.0, None),
    ],
)
def test_a_bar_is_met_up_to_its_value(quantity: str, model: str, lr: float, value: float, met: bool | None):
    assert Subject(model=model, lr=lr, num_params=1).row(quantity, [value]).is_met is met


def test_the_bars_of_an_accelerator_are_for_four_billion_parameters_and_grow_with_the_model():
    small = Subject(model="gpu", lr=FAST, num_params=1_000_000_000)
    assert small.row("ms.switch", [1.25]).bar == 1.25
    assert small.row("switch.memory", [9.0]).bar is None
    assert Subject(model="gpu", lr=ANY, num_params=4_000_000_000).row("ms.ewma", [15.0]).is_met is True


def test_every_quantity_has_a_name_of_its_own_and_bars_only_where_it_is_measured():
    assert len(BY_NAME) == len(QUANTITIES)
    assert {model for quantity in QUANTITIES for model, _ in quantity.bars} == {"synthetic", "smollm2", "gpu"}


def test_a_report_reads_back_as_it_was_written(tmp_path: Path):
    rows = (SUBJECT.row("bytes.cold", [0.0071]), SUBJECT.ratios("cast", seconds(1), seconds(2)))
    steps = (Steps(model="synthetic", lr=SLOW, shares=(0.01, 0.02), cold=(0.006, 0.007)),)
    report = Report(machine=MACHINE, is_smoke=True, took_s=3.5, rows=rows, steps=steps)
    path = tmp_path / "there" / "figures.json"
    report.write(path)
    assert Report.read(path) == report
    assert report.missed == rows[:1]
    written = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert [(row["quantity"], row["unit"], row["is_met"], row["num_samples"]) for row in written] == [
        ("bytes.cold", "share", False, 1),
        ("cast", "ratio", None, 1),
    ]
    assert replace(report, rows=()).missed == ()
