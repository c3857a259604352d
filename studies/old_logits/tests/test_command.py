"""The command as a reader meets it: a small study, whole, interrupted, gone on with, and shown again."""

import json
import os
import signal
import subprocess
import sys

import pytest
import tomli_w

from oldlogits.cli.main import attempt
from studies.old_logits.__main__ import command
from studies.old_logits.results import Study
from tests.runs import TARGET
from tests.waiting import HUNG_S, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # whole studies, in processes of their own

METHODS = ["exact", "arrival", "mu"]


@pytest.fixture(scope="module")
def recipe(tiny_folder, tmp_path_factory):
    """Two blocks of three methods, two traces, in a few seconds."""
    base = {
        "num_updates": 4,
        "model": {"path": str(tiny_folder)},
        "env": {"target": TARGET, "max_episode_tokens": 96, "max_tokens_per_turn": 12, "max_turns": 4},
        "engine": {"max_num_seqs": 32, "precision": "int4"},
        "rollout": {"group_size": 4, "prompts_per_update": 2},
        "trainer": {"lr": 1e-2, "warmup_steps": 0},
        "runtime": {"type": "lockstep"},
        "lockstep": {"tokens_per_version": 6},
        "eval": {"num_episodes": 0, "every": 2, "num_episodes_during": 8},
        "record": {"tokens_every": 0, "transcripts_every": 0, "checkpoint_every": 0},
    }
    regime = {"name": "even-2", "band": 1.1, "eps_low": 0.2, "eps_high": 0.28}
    plan = {
        "title": "a small study",
        "notes": "notes.txt",
        "base": base,
        "learning": {
            "regimes": ["even-2"],
            "methods": METHODS,
            "contrasts": [["exact", "arrival"]],
            "num_blocks": 2,
            "num_exploratory_blocks": 1,
        },
        "decision": {
            "windows": [2],
            "lags": ["even"],
            "engines": ["int4"],
            "bands": [1.05, 1.5],
            "drivers": ["exact", "arrival"],
            "num_updates_beyond_window": 2,
            "num_scored": 2,
        },
    }
    folder = tmp_path_factory.mktemp("study")
    settings = '\n[[regimes]]\nsettings = {"lockstep.max_lag" = 2, max_staleness = 2}\n'
    (folder / "small.toml").write_text(tomli_w.dumps(plan) + settings + tomli_w.dumps(regime))
    (folder / "notes.txt").write_text("What a person adds.")
    return folder / "small.toml"


@pytest.fixture(scope="module")
def study(recipe):
    """The folder of the study, after a run without error."""
    out = recipe.parent / "out"
    assert attempt(command, [str(recipe), "--out", str(out)]) == 0
    return out


def test_a_study_computes_every_cell_and_writes_what_people_read(study):
    found = Study.read(study / "study.json")
    runs = sorted((run.method, run.block, run.seed) for run in found.learning)
    assert runs == [("arrival", 0, 0), ("arrival", 1, 1), ("exact", 0, 0), ("exact", 1, 1), ("mu", 0, 0)]
    for run in found.learning:
        assert [point.update for point in run.curve] == [2, 4]
        assert run.success == run.curve[-1].success
        assert 0 < run.curve[0].cpu_s < run.curve[1].cpu_s == run.cpu_s
        assert run.num_updates == 4
        assert 0 < run.rho <= 1
    assert {(e.driver, e.trace, e.band) for e in found.decision} == {
        (driver, trace, band) for trace, driver in enumerate(["exact", "arrival"]) for band in (1.05, 1.5)
    }
    assert found.budget.cpu_s > 0
    assert "a small study" in (study / "report.html").read_text()
    assert "What a person adds." in (study / "study.md").read_text()


def test_a_finished_study_computes_nothing_again_and_is_the_same(study, recipe, capsys):
    before = Study.read(study / "study.json")
    assert attempt(command, [str(recipe), "--out", str(study), "--dry-run"]) == 0
    assert capsys.readouterr().out.split("\n")[:2] == ["learning: 0 cells to run", "decision: 0 cells to run"]
    assert attempt(command, [str(recipe), "--out", str(study)]) == 0
    after = Study.read(study / "study.json")
    assert (after.learning, after.decision) == (before.learning, before.decision)


def test_a_study_is_shown_again_from_its_file_alone(study, tmp_path):
    assert attempt(command, [str(study / "study.json"), "--out", str(tmp_path)]) == 0
    for name in ("report.html", "study.md"):
        assert (tmp_path / name).read_text() == (study / name).read_text()


def test_an_interrupted_study_says_how_to_go_on_and_keeps_what_it_has(recipe, tmp_path):
    words = [sys.executable, "-m", "studies.old_logits", str(recipe), "--out", str(tmp_path / "cut"), "--processes", "1"]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True)
    wait_until(lambda: list((tmp_path / "cut").glob("cells/learning/*.json")), "the first cell is there")
    os.killpg(process.pid, signal.SIGINT)
    _, told = process.communicate(timeout=HUNG_S)
    assert process.returncode == 130
    assert "the same command goes on: python -m studies.old_logits" in told
    kept = list((tmp_path / "cut").glob("cells/*/*.json"))
    assert 0 < len(kept) < 7
    for path in kept:
        (row, *_) = json.loads(path.read_text())["rows"]
        assert row["num_updates"] == 4, "a run that was cut short is no result"


def test_a_killed_study_leaves_no_process_behind(recipe, tmp_path):
    words = [sys.executable, "-m", "studies.old_logits", str(recipe), "--out", str(tmp_path / "cut")]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    wait_until(lambda: list((tmp_path / "cut").glob("cells/learning/*.json")), "the first cell is there")
    process.kill()
    process.communicate()
    try:
        wait_until(lambda: not lives(process.pid), "its workers have ended")
    except TimeoutError:
        os.killpg(process.pid, signal.SIGKILL)
        raise


def lives(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_wrong_study_is_refused_with_what_to_do(tmp_path, capsys):
    path = tmp_path / "wrong.toml"
    path.write_text('title = "x"\nbase = {}\n[learning]\nregimes = ["nowhere"]\n')
    assert attempt(command, [str(path)]) == 2
    told = capsys.readouterr().err
    assert "unknown regime" in told
    assert "[[regimes]]" in told
