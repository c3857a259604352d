"""An environment adapter of one's own is one file: a recipe names it, and a run plays what it makes."""

from __future__ import annotations

from pathlib import Path

import pytest

from oldlogits.core.errors import EnvironmentShapeError
from oldlogits.envs.base import load_environment
from oldlogits.run.run import run

from ..runs import recipe, summary_of
from . import own_adapter

ADAPTER, QUIZ = f"{own_adapter.__name__}:adapt_quiz", f"{own_adapter.__name__}:NUMBERS"


@pytest.mark.slow
def test_it_makes_an_environment_of_what_was_written_for_something_else(tiny_folder: Path, tmp_path: Path) -> None:
    config = recipe(tiny_folder, num_updates=2, env={"target": QUIZ, "adapter": ADAPTER})
    assert run(config, tmp_path / "run").error is None
    summary = summary_of(tmp_path / "run")
    assert summary["num_updates"] == 2
    assert summary["accounting"]["failed"] == 0
    assert 'adapter = "' in (tmp_path / "run" / "config.toml").read_text()


def test_its_errors_are_the_recipes() -> None:
    with pytest.raises(EnvironmentShapeError, match="this is no quiz"):
        load_environment("order_desk.environment:OrderDesk", ADAPTER)
