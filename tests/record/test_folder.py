from __future__ import annotations

import importlib.metadata
import json
import math
import subprocess
import tomllib
from pathlib import Path

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from oldlogits.core.errors import RunFolderError
from oldlogits.record import folder as folder_module
from oldlogits.record.folder import RunFolder, describe_environment, version_name, write_atomic

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
TOML = st.recursive(
    TEXT | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=15,
)


@pytest.mark.slow
@given(st.dictionaries(TEXT, TOML, max_size=5))
def test_what_is_written_as_toml_is_read_back_by_the_standard_library(table):
    assert tomllib.loads(tomli_w.dumps(table)) == table


def test_nan_survives_toml():
    assert math.isnan(tomllib.loads(tomli_w.dumps({"x": float("nan")}))["x"])


@pytest.mark.parametrize("exists", [False, True])
def test_an_absent_or_empty_folder_is_taken(tmp_path: Path, exists: bool):
    path = tmp_path / "run"
    if exists:
        path.mkdir()
    run = RunFolder.create(path)
    assert sorted(entry.name for entry in path.iterdir()) == ["checkpoints", "environment.json", "tokens", "versions"]
    assert run.latest_checkpoint() is None


def test_a_folder_with_any_file_is_refused_and_left_as_it_is(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunFolderError, match=r"got: notes\.txt"):
        RunFolder.create(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["notes.txt"]


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path):
    (tmp_path / "run").write_text("")
    with pytest.raises(RunFolderError, match="got: a file"):
        RunFolder.create(tmp_path / "run")


def test_only_a_folder_with_a_config_and_a_complete_checkpoint_is_resumed(tmp_path: Path):
    path = tmp_path / "run"
    with pytest.raises(RunFolderError, match=r"no config\.toml"):
        RunFolder.create(path, resume=True)
    run = RunFolder.create(path)
    run.write_config({"seed": 3})
    with pytest.raises(RunFolderError, match="no complete checkpoint"):
        RunFolder.create(path, resume=True)
    run.name_checkpoint(run.begin_checkpoint(40))
    assert RunFolder.create(path, resume=True).latest_checkpoint() == path / "checkpoints" / "v000040"
    assert tomllib.loads(run.config.read_text()) == {"seed": 3}


def test_a_checkpoint_gets_its_name_only_when_it_is_complete(tmp_path: Path):
    run = RunFolder.create(tmp_path / "run")
    checkpoint = run.begin_checkpoint(8)
    (checkpoint / "model" / "w").write_text("old")
    run.name_checkpoint(checkpoint)
    run.begin_checkpoint(9)
    assert run.latest_checkpoint() == run.checkpoints / "v000008"
    checkpoint = run.begin_checkpoint(8)
    assert list((checkpoint / "model").iterdir()) == []
    (checkpoint / "model" / "w").write_text("new")
    run.name_checkpoint(checkpoint)
    assert (run.checkpoints / "v000008" / "model" / "w").read_text() == "new"


def test_the_latest_checkpoint_is_that_of_the_highest_version_also_beyond_six_digits(tmp_path: Path):
    run = RunFolder.create(tmp_path / "run")
    for version in (2, 1_000_000, 999_999):
        run.name_checkpoint(run.begin_checkpoint(version))
    assert run.latest_checkpoint() == run.checkpoints / version_name(1_000_000)


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path: Path):
    path = tmp_path / "summary.json"
    write_atomic(path, "whole")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "half \ud800")
    assert path.read_text() == "whole"


def test_the_environment_names_the_versions_that_run(tmp_path: Path):
    RunFolder.create(tmp_path / "run")
    found = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert found["packages"]["torch"] == importlib.metadata.version("torch")
    assert found["num_cpus"] >= 1


def test_the_commit_is_that_of_the_code_wherever_it_runs_and_says_where_files_differ(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status = ""

    def answers(words, *, cwd, **kwargs):
        assert Path(cwd) in Path(folder_module.__file__).parents
        return subprocess.CompletedProcess(words, 0, stdout="abc123\n" if "rev-parse" in words else status)

    monkeypatch.setattr(folder_module.subprocess, "run", answers)
    assert describe_environment()["git_commit"] == "abc123"
    status = " M src/oldlogits/objective/masks.py\n"
    assert describe_environment()["git_commit"] == "abc123-dirty"

    def not_a_repository(words, **kwargs):
        return subprocess.CompletedProcess(words, 128, stdout="")

    monkeypatch.setattr(folder_module.subprocess, "run", not_a_repository)
    assert describe_environment()["git_commit"] is None

    def fails(*args, **kwargs):
        raise FileNotFoundError("git")

    monkeypatch.setattr(folder_module.subprocess, "run", fails)
    assert describe_environment()["git_commit"] is None
