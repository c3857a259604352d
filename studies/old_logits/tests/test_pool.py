"""Cells over real processes: nothing is computed twice, nothing is lost, and a failure is told."""

import json
import os
from pathlib import Path

import pytest

from oldlogits.record.jsonl import RecordError
from studies.old_logits.measure.pool import Pool
from studies.old_logits.tests.plans import cell, job


def run(folder, cells, processes=2):
    started, done = [], []
    failed = Pool(folder, job, processes).run(cells, done.append, started.append)
    return failed, started, done


@pytest.mark.slow
def test_every_cell_is_computed_once_in_another_process_and_leaves_nothing_but_its_rows(tmp_path):
    cells = [cell(seed) for seed in range(4)]
    failed, started, done = run(tmp_path, cells[:3])
    assert failed == []
    assert started == cells[:3]
    assert sorted(d.rows[0]["seed"] for d in done) == [0, 1, 2]
    assert os.getpid() not in {d.rows[0]["pid"] for d in done}
    assert not any(Path(d.rows[0]["folder"]).parent.exists() for d in done)
    assert (tmp_path / "log.txt").read_text().count("heard in the log") == 3
    _, started, _ = run(tmp_path, cells)
    assert started == cells[3:], "only the new one is computed"
    known = Pool(tmp_path, job, 1).known(cells)
    assert [d.rows[0]["seed"] for d in known] == [0, 1, 2, 3]
    assert all(d.cpu_s >= 0 and d.wall_s > 0 for d in known)


@pytest.mark.slow
def test_a_cell_that_fails_is_told_and_tried_again_and_the_others_are_computed(tmp_path):
    cells = [cell(13), cell(1), cell(14)]
    failed, _, done = run(tmp_path, cells, processes=1)
    assert [d.cell for d in failed] == [cells[0], cells[2]]
    assert len(done) == 3
    assert "unlucky" in failed[0].error
    assert "ZeroDivisionError: a defect" in failed[1].error
    assert "Traceback" not in failed[0].error, "an error of this package says what to do without one"
    assert "unlucky" in (tmp_path / "failures" / f"{cells[0].key}.txt").read_text()
    assert [d.cell for d in Pool(tmp_path, job, 1).known(cells)] == [cells[1]]
    _, started, _ = run(tmp_path, cells, processes=1)
    assert started == [cells[0], cells[2]]


@pytest.mark.slow
def test_a_result_from_when_a_key_had_another_default_is_computed_anew(tmp_path):
    run(tmp_path, [cell(1)], processes=1)
    pool, (path,) = Pool(tmp_path, job, 1), tmp_path.glob("cells/learning/*.json")
    found = json.loads(path.read_text())
    del found["config"]["eval"]
    path.write_text(json.dumps(found))
    assert len(pool.known([cell(1)])) == 1, "a key that did not exist says nothing"
    found["config"]["trainer"]["lr"] = 0.5
    path.write_text(json.dumps(found))
    assert pool.known([cell(1)]) == []
    _, started, _ = run(tmp_path, [cell(1)], processes=1)
    assert started == [cell(1)]
    path.write_text('{"rows": []}')
    with pytest.raises(RecordError, match="delete the file"):
        pool.known([cell(1)])


@pytest.mark.slow
def test_a_killed_process_is_one_failed_cell_and_the_others_are_computed(tmp_path):
    cells = [cell(1), cell(15), cell(2)]
    failed, started, _ = run(tmp_path, cells)
    assert started == cells
    assert [d.cell for d in failed] == [cells[1]]
    assert "its process was killed" in failed[0].error
    assert "the same command tries it again" in (tmp_path / "failures" / f"{cells[1].key}.txt").read_text()
    assert [d.rows[0]["seed"] for d in Pool(tmp_path, job, 1).known(cells)] == [1, 2]
