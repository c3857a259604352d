"""The declaration is written down before the first confirmation run, and a later change of it is named."""

import json
from dataclasses import replace

from studies.old_logits.declare.declaration import amendments, write_down
from studies.old_logits.show.document import write_document
from studies.old_logits.tests.synthetic import KNOBS, declaration, regime, study


def test_a_declaration_that_is_kept_as_written_has_no_amendment(tmp_path):
    write_down(tmp_path, declaration(), 0)
    assert amendments(tmp_path, declaration()) == ()
    assert json.loads((tmp_path / "declaration.json").read_text())["declaration"]["num_blocks"] == 10


def test_what_changes_after_the_first_run_is_named_with_both_values(tmp_path):
    write_down(tmp_path, declaration(regime("tight"), regime("loose")), 0)
    changed = replace(declaration(regime("tight", band=1.2)), num_blocks=12)
    write_down(tmp_path, changed, 5)
    found = amendments(tmp_path, changed)
    assert f"regimes.tight.band: {KNOBS[0]!r} when it was written down, 1.2 now." in found
    assert "num_blocks: 10 when it was written down, 12 now." in found
    assert any(sentence.startswith("regimes.loose: {") and sentence.endswith("absent now.") for sentence in found)
    assert len(found) == 3


def test_a_declaration_that_came_after_runs_says_so(tmp_path):
    write_down(tmp_path, declaration(), 7)
    (late,) = amendments(tmp_path, declaration())
    assert late == "Written down when 7 confirmation runs had a result already."


def test_the_document_shows_amendments_with_the_declaration(tmp_path):
    text = write_document(study(amendments=("a: 1 when it was written down, 2 now.",)), tmp_path / "study.md").read_text()
    assert "- Changed: a: 1 when it was written down, 2 now." in text.partition("## What was declared")[2]
