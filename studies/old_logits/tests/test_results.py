"""study.json holds a study, and says where it does not."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace

import pytest

from oldlogits.record.jsonl import RecordError, encode
from studies.old_logits.results import LearningRun, Study, read_as
from studies.old_logits.tests.synthetic import run, study


def test_what_is_written_is_what_is_read(tmp_path):
    whole = study(pilot=(run("tight", "exact", 0, 0.5, rho=math.inf, error="NonFiniteError: loss"),))
    path = tmp_path / "study.json"
    whole.write(path)
    assert Study.read(path) == whole
    assert replace(whole, title="other") != whole


def test_the_names_of_decision_errors_stand_once(tmp_path):
    path = tmp_path / "study.json"
    study().write(path)
    assert path.read_text(encoding="utf-8").count("by_count") == 1


@pytest.mark.parametrize(
    "spoil, where",
    [
        (lambda plain: plain.pop("title"), "Study has another shape"),
        (lambda plain: plain["learning"][0].pop("rho"), r"Study\.learning\[\] has another shape"),
        (lambda plain: plain["learning"][0].update(block="first"), r"learning\[\]\.block"),
        (lambda plain: plain["learning"][0].update(block=True), r"learning\[\]\.block"),
        (lambda plain: plain["learning"][0]["curve"][0].update(success=None), r"curve\[\]\.success"),
        (lambda plain: plain["declaration"].update(primary="best"), r"declaration\.primary"),
        (lambda plain: plain["declaration"]["contrasts"].append(["exact"]), r"contrasts\[\]"),
        (lambda plain: plain.pop("decision"), "Study has another shape"),
    ],
)
def test_another_shape_is_refused_by_name(tmp_path, spoil, where):
    path = tmp_path / "study.json"
    study().write(path)
    plain = json.loads(path.read_text(encoding="utf-8"))
    spoil(plain)
    path.write_text(json.dumps(plain), encoding="utf-8")
    with pytest.raises(RecordError, match=where):
        Study.read(path)


def test_a_study_that_was_written_before_a_figure_was_measured_is_read_without_it(tmp_path):
    path = tmp_path / "study.json"
    study().write(path)
    plain = json.loads(path.read_text(encoding="utf-8"))
    for row in plain["learning"]:
        del row["checks"]
    path.write_text(json.dumps(plain), encoding="utf-8")
    assert Study.read(path) == study()


def test_a_row_is_read_back_as_its_own_kind():
    whole = run("tight", "ewma", 2, 0.25, rho=math.nan)
    found = read_as(LearningRun, json.loads(encode(asdict(whole))))
    assert math.isnan(found.rho)
    assert replace(found, rho=0.0) == replace(whole, rho=0.0)
