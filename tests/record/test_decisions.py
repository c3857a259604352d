"""The referee's section: numbers of the events, added up and divided."""

from pathlib import Path
from xml.etree import ElementTree

import pytest

from oldlogits.record.decisions import decisions, pooled
from oldlogits.record.events import EventKind, EventLog
from oldlogits.record.report import write_report
from oldlogits.record.report_data import read_run

FIRST = {
    "num_tokens": [10, 20, 0], "num_nonzero": [5, 10, 0], "num_compared": [10, 20, 0], "logp_error": [0.0, 1.0, 0.0],
    "wrongly_kept": [0, 1, 0], "wrongly_masked": [0, 2, 0], "wrongly_kept_nonzero": [0, 1, 0],
    "wrongly_masked_nonzero": [0, 0, 0], "weight": [5.0, 8.0, 0.0],
    "weight_wrongly_kept": [0.0, 0.5, 0.0], "weight_wrongly_masked": [0.0, 0.0, 0.0],
}  # fmt: skip
SECOND = FIRST | {"wrongly_masked": [0, 4, 0], "logp_error": [0.0, 3.0, 0.0], "num_compared": [9, 20, 0]}


@pytest.fixture
def refereed(fake_run) -> Path:
    run = fake_run(2)
    with EventLog(run / "events.jsonl") as log:
        for fields in (FIRST, SECOND):
            log.emit(EventKind.REFEREE, version=2, policy="ewma", seconds_s=0.1, **fields)
    return run


def test_sums_add_up_by_staleness_and_a_staleness_without_tokens_is_left_out(refereed):
    found = pooled(read_run(refereed).referee)
    assert set(found) == {0, 1}
    assert found[1]["num_tokens"] == 40
    assert found[1]["wrongly_masked"] == 6
    assert found[0]["logp_error"] == 0


def test_the_table_divides_each_sum_by_its_own_denominator(refereed):
    (figure,) = decisions(read_run(refereed))["The referee"]
    assert figure.table[0][:3] == ("staleness", "tokens", "mean |log-prob error|")
    assert figure.table[1:] == (
        ("0", "20", "0", "0.00%", "0.00%", "0.00%", "0.00%", "0.00%", "0.00%"),
        ("1", "40", "0.1", "5.00%", "15.00%", "10.00%", "0.00%", "6.25%", "0.00%"),
        ("all", "60", "0.068", "3.33%", "10.00%", "6.67%", "0.00%", "3.85%", "0.00%"),
    )


def test_the_report_shows_chart_and_table_and_a_run_without_a_referee_shows_neither(refereed, fake_run):
    page = write_report(refereed).read_text(encoding="utf-8")
    root = ElementTree.fromstring(page.removeprefix("<!doctype html>"))
    (section,) = [s for s in root.iter("section") if s.findtext("h2") == "The referee"]
    assert section.findtext(".//h3") == "Tokens that ewma decides otherwise than old"
    assert [row.findtext("td") for row in section.iter("tr")][1:] == ["0", "1", "all"]
    assert "staleness 1: 40 tokens&#10;5.00% kept wrongly, 15.00% masked wrongly" in page.replace("\n", "&#10;")
    assert decisions(read_run(fake_run(3))) == {}
