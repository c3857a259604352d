"""What comes with the package: recipes by name, and projects that train at once, from an installed wheel too."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from oldlogits.cli.main import run
from oldlogits.config.load import load_config, read_toml
from oldlogits.config.shipped import EXAMPLES, found_recipe, shipped, shipped_recipes

ROOT = Path(__file__).parents[2]


def oldlogits(*words, cwd):
    return subprocess.run([sys.executable, "-m", "oldlogits", *words], cwd=cwd, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_a_shipped_recipe_is_found_by_its_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_toml(Path(name)) == read_toml(ROOT / f"recipes/{name}.toml")


def test_a_file_of_that_name_comes_before_the_shipped_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "desk").write_text("band = 1.7\n")
    assert load_config(Path("desk")).band == 1.7
    assert found_recipe(Path("desk.toml")) == Path("desk.toml"), "a file name means a file"


def test_an_unknown_name_is_answered_with_the_shipped_ones(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(["train", "dask"]) == 2
    assert "desk, desk_lockstep" in capsys.readouterr().err


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_is_copied_whole_and_without_caches(name, tmp_path, capsys):
    assert run(["init", str(tmp_path / name), "--example", name]) == 0
    copied = {path.relative_to(tmp_path / name) for path in (tmp_path / name).rglob("*")}
    source = shipped("examples") / name
    there = {path.relative_to(source) for path in source.rglob("*")}
    assert copied == {path for path in there if "__pycache__" not in path.parts}
    assert f"wrote {tmp_path / name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, told",
    [
        (["there"], "something in the folder already"),
        (["new", "--example", "gess"], "allowed: guess, number_guess"),
        (["new", "--example", "openai_agent"], "a folder named openai_agent"),
        (["file/new"], "cannot be written"),
    ],
)
def test_a_project_that_cannot_be_written_is_refused_and_nothing_is_left(words, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("a file")
    assert run(["init", *words]) == 2
    assert told in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "mine.txt", "there"]


@pytest.mark.slow
def test_a_new_project_passes_its_test_and_trains_by_the_command_that_is_printed(tmp_path):
    said = oldlogits("init", "my-agent", cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    assert "  oldlogits train recipe.toml\n" in said.stdout
    assert "  python -m pytest test_environment.py" in said.stdout
    project = tmp_path / "my-agent"
    tested = subprocess.run([sys.executable, "-m", "pytest", "-q", "test_environment.py"], cwd=project, capture_output=True)
    assert tested.returncode == 0, tested.stdout
    small = ["--num-updates", "2", "--eval.num-episodes", "16", "--out", "run"]
    trained = oldlogits("train", "recipe.toml", *small, cwd=project)
    assert trained.returncode == 0, trained.stderr
    summary = json.loads((project / "run/summary.json").read_text())
    assert summary["ended"] == "done"
    played = oldlogits("play", "recipe.toml", "--model", "run", "--num-episodes", "1", cwd=project)
    assert played.returncode == 0, played.stderr


@pytest.mark.slow
def test_the_wheel_holds_recipes_and_examples_and_finds_them_outside_of_the_repository(tmp_path):
    built = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(built, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    for kind in ("recipes", *(f"examples/{name}" for name in EXAMPLES)):
        ours = {p.relative_to(ROOT / kind) for p in (ROOT / kind).rglob("*") if p.is_file() and "__pycache__" not in p.parts}
        inside = tmp_path / "site/oldlogits" / kind
        assert {p.relative_to(inside) for p in inside.rglob("*") if p.is_file()} == ours, kind
    outside = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    probe = (
        "import oldlogits; from oldlogits.cli.main import run; print(oldlogits.__file__); run(['train', 'desk', '--dry-run'])"
    )
    said = subprocess.run([sys.executable, "-c", probe], cwd=tmp_path, env=outside, capture_output=True, text=True, check=True)
    assert said.stdout.startswith(str(tmp_path / "site"))
    assert 'variant = "decoupled_exact"' in said.stdout
