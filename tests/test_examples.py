"""Every folder of examples/ has a row in their README with a command and a test that runs it, and its recipes can be read."""

import re
from pathlib import Path

import pytest

from oldlogits.cli.main import run as command_line
from oldlogits.config.load import config_from_table, read_toml
from oldlogits.config.schema import RunConfig

from .runs import check_accounting, summary_of

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
FOLDERS = sorted(path.name for path in EXAMPLES.iterdir() if path.is_dir() and not path.name.startswith(("_", ".")))
ROWS = {
    re.match(r"\[?(\w+)", row)[1]: row.split(" | ")
    for row in re.findall(r"^\| (\[?\w+.+) \|$", (EXAMPLES / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    if not row.startswith("folder")
}


def test_every_folder_has_a_row_and_every_row_a_folder():
    assert set(ROWS) == set(FOLDERS)


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_row_names_a_command_what_one_sees_and_a_test_of_it(folder):
    _, command, seen, test = ROWS[folder]
    named = [word for words in re.findall(r"`([^`]+)`", command) for word in words.split()]
    assert {"oldlogits", "python"} & set(named)
    for path in (word for word in named if "/" in word or word.endswith(".toml")):
        assert (ROOT / path).exists() or (EXAMPLES / folder / path).exists(), path
    assert len(seen.split()) > 5
    file, _, function = test.strip("`").partition("::")
    text = (ROOT / file).read_text(encoding="utf-8")
    assert f"\ndef {function}(" in text or not function
    assert folder in text or folder == "order_desk", f"{file} does not speak of {folder}"


@pytest.mark.parametrize("recipe", sorted(EXAMPLES.rglob("*.toml")), ids=lambda path: path.name)
def test_every_recipe_of_an_example_is_read(recipe):
    assert isinstance(config_from_table(read_toml(recipe)), RunConfig)


SHORT = """--num-updates 2 --model.warm-start-steps 20 --eval.num-episodes 8 --eval.every 0 --eval.num-calibration 4
--rollout.prompts-per-update 4 --rollout.group-size 4 --rollout.max-running-groups 8 --env.latency-s 0.001"""


@pytest.mark.slow
def test_the_order_desk_trains_by_its_recipe(tmp_path, monkeypatch):
    monkeypatch.setenv("OLDLOGITS_CACHE", str(tmp_path / "cache"))
    words = ["train", str(ROOT / "recipes" / "desk.toml"), "--out", str(tmp_path / "run"), *SHORT.split()]
    assert command_line(words) == 0
    summary = summary_of(tmp_path / "run")
    assert (summary["ended"], summary["num_updates"]) == ("done", 2)
    assert set(summary["provenance"]) == {"exact"}
    assert check_accounting(tmp_path / "run")["trained"] == 2 * 4 * 4
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000
