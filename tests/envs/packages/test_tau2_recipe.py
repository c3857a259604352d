"""The recipes of examples/tau2_airline train: one update of the small one, with a random model of Qwen's vocabulary."""

from pathlib import Path

import pytest

from oldlogits.cli.main import run as command
from tau2_airline.environment import Airline

from ...runs import check_accounting, summary_of

pytestmark = [pytest.mark.envs, pytest.mark.slow, pytest.mark.timeout(400)]

FOLDER = Path(__file__).parents[3] / "examples" / "tau2_airline"
RANDOM = ("--model.path", "tau2_airline.random_qwen3:random_qwen3", "--model.lora-rank", "0")


def test_the_small_recipe_trains_the_airline(tmp_path):
    words = ["train", str(FOLDER / "small.toml"), *RANDOM, "--num-updates", "1", "--out", str(tmp_path / "run")]
    assert command(words) == 0
    account, summary = check_accounting(tmp_path / "run"), summary_of(tmp_path / "run")
    assert (account["trained"], account["failed"]) == (2, 0)
    assert summary["ended"] == "done"
    assert set(summary["provenance"]) == {"exact"}


@pytest.mark.parametrize("name", ["small.toml", "airline.toml"])
def test_its_recipes_run_dry(name, capsys):
    assert command(["train", str(FOLDER / name), *RANDOM, "--dry-run"]) == 0
    assert f'target = "tau2_airline.environment:{Airline.__name__}"' in capsys.readouterr().out
