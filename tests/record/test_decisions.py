"""The audit's section: numbers of the events, added up and divided."""

from pathlib import Path
from xml.etree import ElementTree

import pytest

from oldlogits.record.event_log import EventLog
from oldlogits.record.events import Audited, AverageWasReset
from oldlogits.record.report.data import read_run
from oldlogits.record.report.decisions import pooled
from oldlogits.record.report.figures import figures
from oldlogits.record.report.page import write_report

FIRST = {
    "num_tokens": [10, 20, 0], "num_nonzero": [5, 10, 0], "num_compared": [10, 20, 0], "logp_error": [0.0, 1.0, 0.0],
    "wrongly_kept": [0, 1, 0], "wrongly_masked": [0, 2, 0], "wrongly_kept_nonzero": [0, 1, 0],
    "wrongly_masked_nonzero": [0, 0, 0], "weight": [5.0, 8.0, 0.0],
    "weight_wrongly_kept": [0.0, 0.5, 0.0], "weight_wrongly_masked": [0.0, 0.0, 0.0],
}  # fmt: skip
SECOND = FIRST | {"wrongly_masked": [0, 4, 0], "logp_error": [0.0, 3.0, 0.0], "num_compared": [9, 20, 0]}


@pytest.fixture
def audited(fake_run) -> Path:
    run = fake_run(2)
    with EventLog(run / "events.jsonl") as log:
        for fields in (FIRST, SECOND):
            log.emit(Audited(version=2, policy="ewma", seconds_s=0.1, **fields))
    return run


def test_sums_add_up_by_staleness_and_a_staleness_without_tokens_is_left_out(audited):
    found = pooled(read_run(audited).audits)
    assert set(found) == {0, 1}
    assert found[1]["num_tokens"] == 40
    assert found[1]["wrongly_masked"] == 6
    assert found[0]["logp_error"] == 0


def test_the_table_divides_each_sum_by_its_own_denominator(audited):
    (figure,) = figures(read_run(audited))["The exact audit"]
    assert figure.table[0][:3] == ("staleness", "tokens", "mean |log-prob error|")
    assert figure.table[1:] == (
        ("0", "20", "0", "0.00%", "0.00%", "0.00%", "0.00%", "0.00%", "0.00%"),
        ("1", "40", "0.1", "5.00%", "15.00%", "10.00%", "0.00%", "6.25%", "0.00%"),
        ("all", "60", "0.068", "3.33%", "10.00%", "6.67%", "0.00%", "3.85%", "0.00%"),
    )


RESET = {"rule": "paper", "rho": 0.8, "tau": 0.9, "kept_average": 0.7, "kept_live": 0.85, "age": 1.25}
ERRORS = {"error_before": 0.04, "error_after": 0.02, "weight_error_before": 0.5, "weight_error_after": 0.25}


def test_resets_are_listed_with_their_decision_errors_and_the_mean_of_those_that_were_audited(fake_run):
    run = fake_run(2)
    with EventLog(run / "events.jsonl") as log:
        log.emit(AverageWasReset(version=1, **RESET, **ERRORS))
        log.emit(AverageWasReset(version=2, **RESET, **dict.fromkeys(ERRORS)))
        log.emit(AverageWasReset(version=2, **RESET, **ERRORS | {"error_before": 0.06}))
    (figure,) = figures(read_run(run))["Resets of the average"]
    row = ("paper", "80.00% < 90%", "1.2", "70.00%", "85.00%")
    assert figure.table[1:] == (
        ("1", *row, "4.00%", "2.00%", "50.00%", "25.00%"),
        ("2", *row, "—", "—", "—", "—"),
        ("2", *row, "6.00%", "2.00%", "50.00%", "25.00%"),
        ("mean of 2", "", "", "", "", "", "5.00%", "2.00%", "50.00%", "25.00%"),
    )
    assert {len(cells) for cells in figure.table} == {10}
    page = write_report(run).read_text(encoding="utf-8")
    assert "What each reset was worth" in page
    assert "the average to the live weights 3 times. The" in page


def test_of_many_resets_the_last_are_listed_and_all_are_counted(fake_run):
    run = fake_run(2)
    with EventLog(run / "events.jsonl") as log:
        for i in range(60):
            log.emit(AverageWasReset(version=2, **RESET, **ERRORS | {"error_after": i / 100}))
    (figure,) = figures(read_run(run))["Resets of the average"]
    assert [cells[7] for cells in figure.table[1:-1]] == [f"{i}.00%" for i in range(10, 60)]
    assert figure.table[-1][0] == "mean of 60"
    assert figure.table[-1][7] == "29.50%"
    assert "60 times; the last 50 are listed." in figure.caption


def test_the_report_shows_chart_and_table_and_a_run_without_an_audit_shows_neither(audited, fake_run):
    page = write_report(audited).read_text(encoding="utf-8")
    root = ElementTree.fromstring(page.removeprefix("<!doctype html>"))
    (section,) = [s for s in root.iter("section") if s.findtext("h2") == "The exact audit"]
    assert section.findtext(".//h3") == "Tokens that ewma decides otherwise than old"
    assert [row.findtext("td") for row in section.iter("tr")][1:] == ["0", "1", "all"]
    assert "staleness 1: 40 tokens&#10;5.00% kept wrongly, 15.00% masked wrongly" in page.replace("\n", "&#10;")
    assert not {"The exact audit", "Resets of the average"} & set(figures(read_run(fake_run(3))))
