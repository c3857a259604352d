"""The command line as a person meets it: help, wrong words, wrong recipes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from oldlogits import __version__
from oldlogits.cli.main import REFUSED, VERBS, run

from ..waiting import HUNG_S

ROOT = Path(__file__).parents[2]
DESK = ROOT / "recipes/desk.toml"


SLOW = ("torch", "transformers", "numba", "pyarrow", "peft", "ray", "fastapi")
"""Libraries that take long to import: whoever is refused need not wait for them."""
COMMAND = f"""
import runpy, sys
try:
    runpy.run_module("oldlogits", run_name="__main__", alter_sys=True)
finally:
    print(*(name for name in {SLOW} if name in sys.modules))
"""


def refused(*words: object, cwd: Path) -> str:
    """What a command that must be refused says; it ends before anything slow is imported."""
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *map(str, words)],
        cwd=cwd,
        env={**os.environ, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=HUNG_S,
    )
    assert done.returncode == 2
    assert done.stdout == "\n", "it says nothing there, and nothing slow is imported"
    assert "Traceback" not in done.stderr
    return done.stderr


WRONG_RECIPES = {  # content -> what is wrong, got, allowed, fix
    "bandd = 2.0": ("unknown key in the recipe", "bandd", "'band'", "did you mean band?"),
    "[trainer]\nlr = 'fast'": ("trainer.lr takes a number", "'fast'", "a number", "correct the value"),
    "band = = 2": ("the recipe is no TOML", "line 1", "TOML", "correct that line"),
    "band = 0.9": ("band is out of range", "band = 0.9", "a number > 1", "band = 1.5"),
    "band = 1": ("band is out of range", "band = 1.0", "a number > 1", "band = 1.5"),
    "variant = 'decoupled_async'\n[proximal]\nsource = 'snapshot'": (
        "variant 'decoupled_async' needs log-probs of ASYNC, but source 'snapshot' provides OLD",
        "proximal.source = 'snapshot'",
        "a source that provides ASYNC: arrival",
        "use source 'arrival', or variant 'decoupled_exact'",
    ),
    "variant = 'ppo_ewma'\n[proximal]\nsource = 'snapshot'": (
        "needs log-probs of EWMA",
        "variant = 'ppo_ewma'",
        "provides EWMA",
        "use ",
    ),
    "[sampling]\ntop_p = 0.95": ("sampling.top_p is out of range", "sampling.top_p = 0.95", "1.0 in training", "remove it"),
    "[model]\npath = 'nowhere'": ("model.path is no folder", "nowhere", "a folder with config.json", "--model.path tiny"),
    "[runtime]\ntype = 'slurm'": ("unknown backend", "'slurm'", "runtime.type = lockstep, local, ray", "choose one of these"),
    "[env]\ntarget = 'nope:Shop'\n[model]\npath = 'model'": (
        "the module of the environment 'nope:Shop' cannot be imported",
        "No module named 'nope'",
        "env.target = desk",
        "install the package that holds it",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("content", WRONG_RECIPES, ids=lambda content: content.replace("\n", " "))
def test_a_wrong_recipe_ends_soon_and_says_what_got_allowed_and_fix(content, tiny_folder, tmp_path):
    (tmp_path / "model").symlink_to(tiny_folder)
    (tmp_path / "r.toml").write_text(content)
    said = refused("train", "r.toml", "--out", "run", cwd=tmp_path)
    lines = dict(line.strip().split(": ", 1) for line in said.strip().splitlines())
    assert list(lines) == ["error", "got", "allowed", "fix"]
    for text, expected in zip(lines.values(), WRONG_RECIPES[content], strict=True):
        assert expected in text
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_missing_recipe_names_those_that_are_there(tmp_path):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/mine.toml").touch()
    said = refused("train", "yours.toml", cwd=tmp_path)
    assert "got: yours.toml" in said
    assert "fix: try one of: recipes/mine.toml" in said
    assert "the first word names no recipe" in refused("train", cwd=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, says",
    [
        (["--bandd", "2"], ["--bandd", "Perhaps you meant", "--band"]),
        (["--trainer.lrr", "3"], ["--trainer.lrr", "--trainer.lr"]),
        (["--num-updates", "six"], ["--num-updates", "'six'", "batches to train on"]),
        (["--runtime.type", "slurm"], ["runtime.type", "lockstep", "local", "ray"]),
        (["--band", "1"], ["band is out of range", "a number > 1"]),
    ],
)
def test_a_wrong_flag_says_what_was_meant(flags, says, tmp_path):
    said = refused("train", DESK, *flags, cwd=tmp_path)
    assert all(text in said for text in says)


def test_an_unknown_verb_names_those_that_exist(capsys):
    assert run(["trian"]) == 2
    said = capsys.readouterr().err
    assert "got: trian" in said
    assert f"allowed: {', '.join(VERBS)}" in said


def test_help_and_version_are_printed(capsys):
    for words in (["--help"], ["-h"], ["help"]):
        assert run(words) == 0
        shown = capsys.readouterr().out
        assert all(verb in shown and text in shown for verb, text in VERBS.items())
        assert "begin with:  oldlogits demo" in shown
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"oldlogits {__version__}\n"


def test_the_bare_command_says_what_to_type_next(capsys):
    assert run([]) == 0
    shown = capsys.readouterr().out
    assert "oldlogits demo" in shown
    assert "oldlogits init my-agent" in shown


def test_windows_is_refused_in_one_sentence(capsys, monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    assert run(["--help"]) == REFUSED
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == ["oldlogits runs on Linux and macOS; on Windows, use it in WSL 2"]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_a_command_with_help(verb, capsys):
    try:
        status = run([verb, "--help"])
    except SystemExit as ended:
        status = ended.code
    assert status == 0
    assert f"usage: oldlogits {verb}" in capsys.readouterr().out


@pytest.mark.parametrize("verb", ["report", "show", "eval", "doctor", "replay"])
def test_a_path_that_no_file_system_takes_is_one_error(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([verb, "a" * 300]) == REFUSED
    said = capsys.readouterr().err
    assert "too long" in said
    assert len(said.splitlines()) == 4
