"""``oldlogits fetch``: what it says, what it refuses, and that a folder that is there stays as it is."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from oldlogits.cli.main import run
from order_desk import smollm2


@pytest.fixture
def filled(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that were fetched into; a tiny model takes the place of SmolLM2."""
    into: list[Path] = []

    def fill(folder: Path, note) -> None:
        note("downloading")
        shutil.copytree(tiny_folder, folder, dirs_exist_ok=True)
        into.append(folder)

    monkeypatch.setattr(smollm2, "_fetch_into", fill)
    return into


def test_it_fetches_once_and_says_what_to_type_next(filled, tmp_path, capsys):
    out = tmp_path / "there"
    assert run(["fetch", "smollm2", "--out", str(out)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "downloading"
    assert said[1].startswith("fetched in ")
    assert said[1].endswith(f"s: {out}")
    assert said[2].endswith(f"oldlogits train RECIPE --model.path {out}")
    assert run(["fetch", "smollm2", "--out", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[0] == f"taken from the cache: {out}"
    assert len(filled) == 1


def test_its_place_is_the_cache_unless_given(filled, tmp_path, monkeypatch):
    monkeypatch.setenv("OLDLOGITS_CACHE", str(tmp_path))
    assert run(["fetch", "smollm2"]) == 0
    assert (tmp_path / "smollm2-135m-instruct" / "config.json").is_file()


def test_a_folder_of_something_else_is_refused_and_left_alone(filled, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert run(["fetch", "smollm2", "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "lacks config.json" in said
    assert "choose a folder that does not exist" in said
    assert filled == []
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("words", [[], ["gpt"]])
def test_another_model_is_refused(words, capsys):
    assert run(["fetch", *words]) == 2
    assert "allowed: model.path = tiny, tiny-moe, smollm2" in capsys.readouterr().err
