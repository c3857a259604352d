"""`oldlogits compare` as a user meets it: runs that are done are kept, half-done ones go on, failed ones are told."""

import json
import shutil
from pathlib import Path

import pytest

from oldlogits.cli.main import FAILED, REFUSED, run
from oldlogits.compare.runs import perform, plan_runs, read_figures
from tests.runs import recipe, summary_of, write_recipe

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def recipes(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("recipes")
    small = {"num_updates": 2, "record": {"checkpoint_every": 1}, "eval": {"num_episodes": 8}, "engine": {"precision": "int4"}}
    exact = recipe(tiny_folder, **small)
    arrival = recipe(tiny_folder, variant="decoupled_async", proximal={"source": "arrival"}, audit={"share": 1.0}, **small)
    return [str(write_recipe(folder / f"{name}.toml", config)) for name, config in (("exact", exact), ("arrival", arrival))]


@pytest.fixture(scope="module")
def compared(recipes: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compared") / "out"
    assert run(["compare", *recipes, "--seeds", "0", "1", "--out", str(out), "--processes", "2"]) == 0
    return out


def test_every_recipe_runs_under_every_seed_in_a_run_folder_of_its_own(compared: Path):
    assert {str(path.parent.relative_to(compared)) for path in compared.glob("*/*/report.html")} == {
        f"{name}/seed{seed}" for name in ("exact", "arrival") for seed in (0, 1)
    }
    found = json.loads((compared / "compare.json").read_text())
    assert [(one["name"], one["seed"]) for one in found["runs"]] == [("exact", 0), ("arrival", 0), ("exact", 1), ("arrival", 1)]
    assert found["rows"].keys() == {"1", "2", "2 - 1"}


def test_the_figures_are_those_of_the_run_folders(compared: Path):
    for one in json.loads((compared / "compare.json").read_text())["runs"]:
        summary = summary_of(compared / one["name"] / f"seed{one['seed']}")
        values = one["values"]
        assert values["success"] == pytest.approx(summary["success_after"]["mean"])
        assert values["seconds"] == pytest.approx(summary["train_wall_s"])
        assert 0 < values["reward"] < 1
        assert values["bytes"] > 0
        assert (values["decision_error"] is None) == (one["name"] == "exact"), "only the audited recipe has decision errors"


def test_a_finished_comparison_runs_nothing_again_and_shows_the_same(compared: Path, recipes: list[str], capsys):
    before = {path: path.read_text() for path in [*compared.glob("*/*/events.jsonl"), compared / "compare.json"]}
    words = ["compare", *recipes, "--seeds", "0", "1", "--out", str(compared)]
    assert run([*words, "--dry-run"]) == 0
    assert "0 of 4 runs are missing" in capsys.readouterr().out
    assert run(words) == 0
    assert {path: path.read_text() for path in before} == before


def test_a_half_done_run_goes_on_from_its_checkpoint_and_one_without_begins_again(recipes: list[str], tmp_path: Path):
    [half] = plan_runs([Path(recipes[0])], [], [], [0], tmp_path)
    perform(half)
    (half.folder / "summary.json").unlink()  # as if it had been killed after its last checkpoint
    assert not half.is_done
    events = (half.folder / "events.jsonl").read_text()
    perform(half)
    assert half.is_done
    assert (half.folder / "events.jsonl").read_text().startswith(events), "it was resumed"
    (half.folder / "summary.json").unlink()
    shutil.rmtree(half.folder / "checkpoints")
    perform(half)
    assert half.is_done
    assert not (half.folder / "events.jsonl").read_text().startswith(events), "it began again"
    assert read_figures(half).values["success"] is not None


def test_a_run_that_fails_is_told_and_the_others_go_on(recipes: list[str], tmp_path: Path, capsys):
    (tmp_path / "out" / "exact" / "seed0").mkdir(parents=True)
    (tmp_path / "out" / "exact" / "seed0" / "mine.txt").write_text("no run folder")
    assert (
        run(["compare", recipes[0], "--seeds", "0", "1", "--out", str(tmp_path / "out"), "--eval.num-episodes", "0"]) == FAILED
    )
    shown = " ".join(capsys.readouterr().out.split())
    assert "exact, seed 0: FAILED" in shown
    assert "failed: exact, seed 0:" in shown
    assert (tmp_path / "out" / "exact" / "seed1" / "summary.json").is_file()
    assert (tmp_path / "out" / "exact" / "seed0" / "mine.txt").is_file(), "nothing of the user's is removed"


def test_varied_keys_multiply_and_name_their_runs(recipes: list[str], tmp_path: Path):
    vary = ["trainer.lr=1e-4,5e-4", "band=1.1,1.5"]
    planned = plan_runs([Path(recipes[0])], ["--num-updates", "1"], vary, [3], tmp_path)
    assert [(p.name, p.config.trainer.lr, p.config.band, p.config.seed, p.config.num_updates) for p in planned] == [
        (f"exact,lr={lr},band={band}", float(lr), float(band), 3, 1) for lr in ("1e-4", "5e-4") for band in ("1.1", "1.5")
    ]


@pytest.mark.parametrize(
    "words, said",
    [
        (["--seeds", "0"], "there is nothing to compare"),
        (["RECIPE", "--processes", "0"], "there is nothing to compare"),
        (["RECIPE", "--vary", "trainer.lr"], "names no values"),
        (["RECIPE", "RECIPE"], "two recipes have one name"),
        (["nowhere.toml"], "the recipe does not exist"),
    ],
)
def test_a_wrong_command_is_refused(words: list[str], said: str, recipes: list[str], tmp_path: Path, capsys):
    assert run(["compare", *(recipes[0] if word == "RECIPE" else word for word in words), "--out", str(tmp_path)]) == REFUSED
    assert said in capsys.readouterr().err


def test_a_folder_with_a_run_of_another_recipe_is_refused(compared: Path, recipes: list[str], capsys):
    assert run(["compare", recipes[0], "--out", str(compared), "--trainer.lr", "0.5"]) == REFUSED
    assert "a run of another recipe" in capsys.readouterr().err
