"""The tables of docs/versions.md are those of versions.json, and can be written anew in their place."""

from pathlib import Path

import pytest

from benchmarks.machine import Machine
from benchmarks.versions.document import BEGIN, END, markdown, write_into
from benchmarks.versions.rows import Report, Subject
from oldlogits.core.errors import ConfigError

DOCS = Path(__file__).parents[3] / "docs"
RECORDED = Path(__file__).parents[1] / "versions.json"
REPORT = Report(
    machine=Machine(device="a CPU", features=(), num_cores=2, load=0.5, fast_path="torch", software="Python"),
    is_smoke=False,
    took_s=1,
    rows=(Subject(model="gpu", lr=1e-6, num_params=4_000_000_000).row("ms.switch", [4.0]),),
    steps=(),
)


def test_the_figures_of_the_documents_are_the_recorded_ones():
    text = (DOCS / "versions.md").read_text(encoding="utf-8")
    assert f"{BEGIN}\n\n{markdown(Report.read(RECORDED))}\n{END}" in text


def test_tables_are_written_between_the_marks_and_nothing_else_changes(tmp_path: Path):
    document = tmp_path / "page.md"
    document.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n", encoding="utf-8")
    for _ in range(2):
        write_into(document, REPORT)
        assert document.read_text(encoding="utf-8") == f"before\n{BEGIN}\n\n{markdown(REPORT)}\n{END}\nafter\n"
    assert "| one switch, memory tier | 4.0 ms (<= 5.0 ms) |" in markdown(REPORT)


@pytest.mark.parametrize("text", [None, "no marks", f"only {BEGIN}", f"{END} before {BEGIN}"])
def test_a_document_without_marks_is_refused_and_left_alone(text: str | None, tmp_path: Path):
    document = tmp_path / "page.md"
    if text is not None:
        document.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="no place for the figures"):
        write_into(document, REPORT)
    assert (document.read_text(encoding="utf-8") if document.is_file() else None) == text
