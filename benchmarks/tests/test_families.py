"""The table of docs/models.md has a row for every family, and says what the command finds."""

import re
from pathlib import Path

import pytest

from benchmarks.families.__main__ import COLUMNS, NOT_RUN, as_line, row, rows_of
from benchmarks.families.shapes import FAMILIES

PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")


def test_every_family_has_its_row():
    assert [cells[0] for cells in rows_of(PAGE)] == list(FAMILIES)
    assert as_line(list(COLUMNS)) in PAGE


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Mistral", "Qwen3-MoE", "GLM-4"])
def test_a_row_is_what_the_command_finds(name, tmp_path):
    [written] = [cells for cells in rows_of(PAGE) if cells[0] == name]
    found = row(name, tmp_path, "")
    assert found[-1] == NOT_RUN
    assert [said(cell) for cell in found[:-1]] == [said(cell) for cell in written[:-1]]


def said(cell):
    """A cell without its figures, which rounding moves."""
    return re.sub(r"\de[+-]\d\d", "figure", cell)
