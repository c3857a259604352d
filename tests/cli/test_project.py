"""Recipes by name, and the project that `oldlogits init` writes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from oldlogits.cli.init import FILES
from oldlogits.cli.main import REFUSED, run
from oldlogits.config.load import load_config, read_toml, shipped_recipes

from ..waiting import HUNG_S

ROOT = Path(__file__).parents[2]


def call(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT / "src", ROOT / "examples")))}
    return subprocess.run([sys.executable, "-m", *words], cwd=cwd, env=env, capture_output=True, text=True, timeout=HUNG_S)


def test_a_recipe_is_found_by_its_bare_name_unless_there_is_such_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config(Path("desk")) == load_config(ROOT / "recipes" / "desk.toml")
    (tmp_path / "desk").write_text("num_updates = 3")
    assert read_toml(Path("desk")) == {"num_updates": 3}
    assert set(shipped_recipes()) == {path.stem for path in (ROOT / "recipes").glob("*.toml")}


def test_init_writes_a_project_once(tmp_path, capsys):
    folder = tmp_path / "my agent"
    assert run(["init", str(folder)]) == 0
    assert f"cd '{folder}' && oldlogits train recipe.toml" in capsys.readouterr().out
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    (folder / "agent.py").write_text("mine")
    assert run(["init", str(folder)]) == REFUSED
    assert (folder / "agent.py").read_text() == "mine"


@pytest.mark.slow
def test_the_project_passes_its_test_and_learns_with_the_command_of_its_readme(tmp_path):
    assert run(["init", str(tmp_path / "p")]) == 0
    tested = call("pytest", "-p", "no:cacheprovider", cwd=tmp_path / "p")
    assert tested.returncode == 0, tested.stdout
    assert "oldlogits train recipe.toml" in (tmp_path / "p" / "README.md").read_text()
    trained = call("oldlogits", "train", "recipe.toml", "--out", "run", cwd=tmp_path / "p")
    assert trained.returncode == 0, trained.stderr
    summary = json.loads((tmp_path / "p" / "run" / "summary.json").read_text())
    assert summary["reward_gain"]["low"] > 0, summary["reward_gain"]

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "p" / "run").rglob("*")}
    again = call("oldlogits", "train", "--resume", "run", cwd=tmp_path / "p")
    assert again.returncode == 0, again.stderr
    assert "nothing was changed. To go on:  oldlogits train --resume run --num-updates 160" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "p" / "run").rglob("*")} == before
