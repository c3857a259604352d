"""A parser of one's own is one file: a recipe names it, and a run uses it."""

from __future__ import annotations

from pathlib import Path

import pytest

from oldlogits.core.parser import PARSERS, Malformed, ToolCall
from oldlogits.run.run import run

from ..runs import Words, recipe, summary_of
from .own_parser import MarkParser

NAME = f"{MarkParser.__module__}:MarkParser"


def test_a_parser_of_ones_own_is_found_by_its_import_path_and_may_read_several_calls() -> None:
    found = PARSERS.find(NAME)
    assert found is MarkParser
    assert found().parse("w5 <tool> w1 w2 <tool> <tool> w3") == [
        ToolCall(name="look", positional=("w1",)),
        Malformed(reason="error : look at what ?"),
        ToolCall(name="look", positional=("w3",)),
    ]


@pytest.mark.slow
def test_a_run_makes_the_calls_that_it_reads(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: list[str] = []

    def look(self: Words, word: str) -> str:
        """Look."""
        looked_at.append(word)
        return word

    monkeypatch.setattr(Words, "look", look)
    config = recipe(tiny_folder, num_updates=2, env={"parser": NAME})
    assert run(config, tmp_path / "run").error is None
    assert summary_of(tmp_path / "run")["num_updates"] == 2
    assert looked_at
