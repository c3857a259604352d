"""The figures choose the sentences: other figures, other sentences; page and document hold them with the tables."""

from __future__ import annotations

import re
from dataclasses import replace
from statistics import median
from xml.etree import ElementTree

import pytest

from studies.old_logits.analyse.contrasts import all_contrasts
from studies.old_logits.results import Study
from studies.old_logits.show.document import write_document
from studies.old_logits.show.page import write_page
from studies.old_logits.show.reading import plain_reading, sentence
from studies.old_logits.show.tables import tables_of
from studies.old_logits.tests.synthetic import decision_rows, declaration, error_of, learning_runs, regime, run, study

EVIL = "<script>alert('x')</script>"
FIRST, SECOND = "exact", "ewma"


def section(heading: str, whole: Study) -> str:
    return " ".join(text for part in plain_reading(whole) if part.heading == heading for text in part.sentences)


def contrast(differences, *, num_blocks=4, num_pairs=1):
    """The declared contrast exact - ewma of one regime, in a family of `num_pairs` tests of which the others show nothing."""
    runs = []
    for place in range(num_pairs):
        for block, difference in enumerate(differences if place == 0 else [0.0] * len(differences)):
            runs += [run(f"r{place}", FIRST, block, 0.5 + difference), run(f"r{place}", SECOND, block, 0.5)]
    regimes = tuple(regime(f"r{place}") for place in range(num_pairs))
    declared = replace(declaration(*regimes), contrasts=((FIRST, SECOND),), num_blocks=num_blocks)
    return all_contrasts(declared, runs)[0]


@pytest.mark.parametrize(
    "differences, words",
    [
        ((0.1, 0.11, 0.09, 0.1), "r0: exact beats ewma (exact - ewma +0.100 [+0.087, +0.113], 4 blocks, Holm p < 0.001)."),
        ((-0.1, -0.11, -0.09, -0.1), "r0: ewma beats exact"),
        ((0.1, -0.1, 0.05, -0.06), "r0: no difference between exact and ewma is shown"),
        ((0.1,), "r0: exact - ewma is +0.100 in one block, which shows nothing."),
        ((0.1, 0.11, 0.09), "3 blocks of 4"),
        ((), "r0: exact and ewma have no block in common; the comparison is missing."),
    ],
)
def test_a_contrast_is_told_as_its_interval_says(differences, words):
    assert words in sentence(contrast(differences))


def test_a_lead_that_holm_takes_away_is_told_so():
    differences = (0.02, 0.1, 0.05, 0.09)
    assert "beats" in sentence(contrast(differences))
    alone, together = contrast(differences), contrast(differences, num_pairs=3)
    assert alone.estimate.p < 0.05 < together.adjusted == pytest.approx(3 * alone.estimate.p)
    assert "exact is ahead of ewma" in sentence(together)
    assert "not after Holm's adjustment" in sentence(together)
    assert "exploratory" in sentence(replace(together, adjusted=None))


def test_what_is_ruled_out_is_the_wider_end_of_the_interval():
    found = contrast((0.1, -0.1, 0.05, -0.06))
    widest = max(abs(found.estimate.low), abs(found.estimate.high))
    assert f"differences beyond {widest:.3f} are ruled out" in sentence(found)


def test_the_papers_order_is_counted_as_shown_reversed_or_neither():
    as_put_in = section("The paper's order", study())
    assert "Of 6 declared tests, 3 show this order, 0 show the reverse, 3 neither." in as_put_in
    turned = {"exact": "arrival", "arrival": "exact"}
    runs = tuple(replace(r, method=turned.get(r.method, r.method)) for r in learning_runs(declaration()))
    reverse = section("The paper's order", study(learning=runs))
    assert "0 show this order, 3 show the reverse, 3 neither." in reverse
    assert "It is reversed: exact - ewma in tight; ewma - arrival in tight; exact - arrival in tight." in reverse


def test_pairs_of_fewer_than_two_blocks_are_missing_and_not_compared():
    runs = tuple(r for r in learning_runs(declaration()) if (r.regime, r.method) != ("tight", "arrival") or r.block == 0)
    text = section("The paper's order", study(learning=runs))
    assert "Of 6 declared tests, 1 shows this order, 0 show the reverse, 3 neither, 2 missing." in text
    assert "Missing: ewma - arrival in tight; exact - arrival in tight." in text
    others = section("Equal rho, tuned, equal CPU seconds", study(learning=runs))
    assert "of 4 exploratory comparisons" in others
    assert "tight, at equal band at equal CPU seconds: ewma - arrival" not in others


def test_a_view_that_says_otherwise_is_told_beside_the_declared_test():
    text = section("Equal rho, tuned, equal CPU seconds", study())
    assert re.search(
        r"loose, at equal band at equal CPU seconds: exact - arrival is -0\.\d+ .*\(below 0\), against \+0\.000", text
    )
    assert "3 of 6 exploratory comparisons read as the declared test" in text


def test_collapses_and_methods_beside_the_reference_are_named():
    text = section("Collapses, and methods outside of the contrasts", study())
    assert "tight: collapses: arrival in 10 of 10 runs." in text
    assert "loose: no run of 45 collapsed." in text
    assert re.search(r"tight, above exact \(.*?\): linear \+0\.024", text)


@pytest.mark.slow
def test_the_guarded_reset_is_a_default_only_above_its_bar():
    assert "above -0.03: the rule may be a default." in section("Resets", study())
    runs = tuple(
        replace(r, success=r.success - 0.2) if r.method == "ewma-reset-guarded" else r for r in learning_runs(declaration())
    )
    assert "not above -0.03: no reset rule is a default." in section("Resets", study(learning=runs))
    idle = tuple(replace(r, num_resets=0) for r in runs)
    assert "fired in no run" in section("Resets", study(learning=idle))


def test_the_declared_checks_hold_or_do_not():
    assert "against the bar 0.95, 5 seeds, 5 of 5 declared traces; it holds." in section("Decision error", study())
    worse = tuple(replace(e, by_count=1.5 * e.by_count) if e.proximal_policy == "ewma" else e for e in decision_rows())
    assert "against the bar 0.95, 5 seeds, 5 of 5 declared traces; it does not hold." in section(
        "Decision error", study(decision=worse)
    )
    elsewhere = tuple(replace(e, engine="int4") for e in decision_rows())
    assert "no trace says anything about it" in section("Decision error", study(decision=elsewhere))


def test_what_decides_is_the_factor_that_moves_the_error_most():
    text = section("What decides", study())
    low, high = (median(error_of("arrival", window, b, t) for b in (1.1, 1.5) for t in range(5)) for window in (4, 16))
    assert f"The error of arrival depends most on the window: {low:.2%} at 4, {high:.2%} at 16, a factor of 2.0" in text
    assert "by seed 2.0 [2.0, 2.0]. A longer window is a later stage of training" in text
    assert "The error of mu over that of arrival changes by less than 5% with every factor." in text
    grown = tuple(replace(e, by_count=9 * e.by_count) if e.band == 1.1 else e for e in decision_rows())
    assert "The error of arrival depends most on the band" in section("What decides", study(decision=grown))


def test_a_factor_whose_seeds_disagree_is_not_said_to_decide():
    """Window 16 doubles the errors of seeds 0 to 2, and divides those of seeds 3 and 4 by 9."""
    rows = tuple(
        replace(e, by_count=e.by_count / 18) if e.window == 16 and e.seed > 2 else e for e in decision_rows() if e.band == 1.1
    )
    assert "The error of arrival is not shown to depend on any factor; it differs most with the window" in section(
        "What decides", study(decision=rows)
    )
    alone = tuple(e for e in decision_rows() if e.seed == 0)
    assert "depends most on" not in section("What decides", study(decision=alone)), "one seed gives no interval"


def test_a_factor_with_a_level_of_no_error_is_named():
    quiet = tuple(
        replace(e, engine="bf16", by_count=0.0 if e.proximal_policy == "arrival" else e.by_count, trace=e.trace + 5)
        for e in decision_rows()
    )
    text = section("What decides", study(decision=decision_rows() + quiet))
    assert "The error of arrival is 0 at bf16, so no ratio says how much the engine moves it." in text


def test_the_route_is_chosen_by_error_and_cost():
    text = section("Which route", study())
    assert "Exact routes add 0.200 s (snapshot) to 0.200 s (snapshot) to an update." in text
    assert re.search(r"with fp8: mu \(0\.000 s, 2\.\d+%\), snapshot \(0\.200 s, 0\.00%\)\.", text)


def test_without_figures_there_is_no_sentence():
    assert section("Decision error", study(decision=())) == ""
    empty = study(learning=(), decision=(), cost=())
    assert {part.heading for part in plain_reading(empty)} == {"The declared tests", "The paper's order", "Resets"}


def read_page(whole, tmp_path):
    html = write_page(whole, tmp_path / "report.html").read_text(encoding="utf-8")
    page = ElementTree.fromstring(html.strip().removeprefix("<!doctype html>"))
    return html, " ".join(" ".join(page.itertext()).split())


@pytest.mark.slow
def test_the_page_is_well_formed_and_holds_every_table_and_sentence(tmp_path):
    whole = study(pilot=(run("tight", "exact", 0, 0.4, seed=9),), notes="A person's view.")
    html, text = read_page(whole, tmp_path)
    for table in tables_of(whole):
        assert " ".join(table.title.split()) in text
        assert all(" ".join(cell.split()) in text for row in table.rows for cell in row)
    assert all(" ".join(told.split()) in text for part in plain_reading(whole) for told in part.sentences)
    assert "Commentary A person's view." in text
    assert "runs in tight, each tuned: 5 of 10" in text
    assert html.count("<svg") == 2 + 2 * 3 + 1 + 1  # contrasts; three a regime; one engine and lag shape; one engine
    assert "nan" not in re.findall(r'(?:points|d|x|y|cx|cy|x1|y1|height|width)="([^"]*)"', html)
    assert html.count("dot bad") == 10, "one for each collapsed run"


def test_the_page_loads_nothing_from_elsewhere_and_escapes_what_it_shows(tmp_path):
    html, text = read_page(study(title=EVIL, notes=EVIL, recipe={"base": {"name": EVIL}}), tmp_path)
    assert not re.search(r"https?:|//[a-z]|\burl\(|@import|<link|<iframe|<img|<script[^>]+src", html)
    assert html.count("<script") == 1
    assert text.count(EVIL) == 4  # title twice, commentary, recipe


@pytest.mark.slow
@pytest.mark.parametrize("part", ["learning", "decision", "cost", "all"])
def test_a_study_that_lacks_a_part_still_has_its_page_and_document(tmp_path, part):
    names = ("learning", "decision", "cost") if part == "all" else (part,)
    whole = study(**dict.fromkeys(names, ()))
    read_page(whole, tmp_path)
    document = write_document(whole, tmp_path / "study.md").read_text(encoding="utf-8")
    assert "## Missing" in document


@pytest.mark.slow
def test_the_document_holds_the_plan_the_tables_and_the_commentary_apart(tmp_path):
    whole = study(notes="A person's view.\n")
    document = write_document(whole, tmp_path / "study.md").read_text(encoding="utf-8")
    assert document.startswith("# A study of known effects\n\noldlogits 0.1.0 abc")
    assert all(table.markdown() in document for table in tables_of(whole))
    assert all(f"- {told}" in document for part in plain_reading(whole) for told in part.sentences)
    assert "## Commentary\n\n*Written by a person; not computed.*\n\nA person's view.\n\n## What was declared" in document
    assert "- Tests: exact - ewma, ewma - arrival, exact - arrival in tight, loose: 6 contrasts of final success" in document
    assert "- Decision errors: windows 4, 16; lags even; engines fp8; bands 1.1, 1.5; 5 traces each." in document
    folded = [table for table in tables_of(whole) if table.is_detail]
    assert folded
    assert document.count("<details>") == len(folded)
    assert "## Commentary" not in write_document(study(), tmp_path / "plain.md").read_text(encoding="utf-8")


def test_a_study_of_which_only_the_pilot_has_run_is_shown(tmp_path):
    bare = replace(declaration(), regimes=(), methods=(), contrasts=())
    page = write_page(replace(study(), declaration=bare, learning=(), decision=(), cost=()), tmp_path / "report.html")
    assert "<html" in page.read_text()
