"""What stands in a table is what was put in, and what is missing stands there, too."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO
from math import exp, log
from statistics import fmean, median, stdev

import pytest
from rich.console import Console

from studies.old_logits.analyse.stats import Estimate, mean_interval
from studies.old_logits.declare.methods import METHODS as ALL_METHODS
from studies.old_logits.layout import Table, figure, interval, p_value, plus_minus
from studies.old_logits.measure.decision import PROXIMAL_POLICIES
from studies.old_logits.results import Cross
from studies.old_logits.show.completeness import missing
from studies.old_logits.show.cost_tables import ROUTES, choices
from studies.old_logits.show.decision_tables import levels
from studies.old_logits.show.figures import LOOKS
from studies.old_logits.show.page import write_page
from studies.old_logits.show.tables import print_tables, tables_of
from studies.old_logits.tests.synthetic import (
    ERRORS,
    EXTRA_S,
    METHODS,
    decision_rows,
    declaration,
    error_of,
    learning_runs,
    regime,
    route_costs,
    run,
    study,
    success_of,
)

T_9, T_4 = 2.2621571628, 2.7764451052


def found(title, whole=None, **changes):
    (table,) = [table for table in tables_of(whole or study(**changes)) if table.title.startswith(title)]
    return table


def cells(table, *first):
    """The row that begins with these cells, by column; marks are cut off."""
    (row,) = [row for row in table.rows if row[: len(first)] == first]
    return dict(zip(table.header, row, strict=True))


def test_the_declared_contrasts_print_the_differences_that_were_put_in():
    table = found("The 6 declared contrasts")
    for place, first, second in (("tight", "exact", "ewma"), ("loose", "ewma", "arrival")):
        row = cells(table, place, f"{first} - {second}")
        differences = [success_of(place, first, b) - success_of(place, second, b) for b in range(10)]
        mean, half = fmean(differences), T_9 * stdev(differences) / 10**0.5
        assert row["difference [95% interval]"] == f"{mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]"
        assert row["blocks"] == "10 of 10"
    assert cells(table, "tight", "exact - ewma")["reading"] == "exact is better"
    assert cells(table, "loose", "exact - ewma")["reading"] == "no difference shown"


def test_a_method_prints_mean_worst_and_collapses_of_its_runs():
    table = found("tight, at equal band")
    row = cells(table, "arrival")
    values = [success_of("tight", "arrival", b) for b in range(10)]
    assert row["success"] == f"{fmean(values):.3f} ± {T_9 * stdev(values) / 10**0.5:.3f}"
    assert row["worst"] == f"{min(values):.3f}"
    bar = 0.5 * max(fmean(success_of("tight", m, b) for b in range(10 if m in METHODS[:3] else 5)) for m in METHODS)
    assert row["collapses"] == str(sum(value < bar for value in values)) == "10"
    assert f"A collapse ends below {bar:.3f}, 0.5 of the best mean of the regime in any view." in table.caption
    assert (row["rho"], row["CPU s"], row["runs"]) == ("0.900", "24.0", "10 of 10")
    assert cells(table, "exact")["minus exact [95% interval]"] == "reference"
    assert cells(table, "mu")["band"] == "—", "it has none"


def test_a_method_that_leaves_the_mismatch_uncorrected_is_marked():
    table = found("tight, at equal band")
    corrected = ("exact", "arrival", "ewma", "ewma-reset-guarded", "mu")
    assert {row[0] for row in table.rows} == {*corrected, "linear (mismatch uncorrected)"}
    tried = tuple(run("tight", method, 0, 0.4, seed=7) for method in ("exact-r_d-1", "mu"))
    assert [row[1] for row in found("Pilot runs", pilot=tried).rows] == ["exact-r_d-1 (mismatch uncorrected)", "mu"]


@pytest.mark.slow
def test_missing_blocks_methods_and_views_are_named():
    runs = [r for r in learning_runs(declaration()) if (r.method, r.block) != ("ewma", 3) and r.method != "mu"]
    table = found("tight, at equal band", learning=tuple(runs))
    assert cells(table, "mu")["success"] == "—"
    assert table.legend[0] == "Missing: ewma block 3; mu blocks 0 to 4."
    apart = [r for r in learning_runs(declaration()) if r.method != "ewma" or r.block in (2, 3, 5, 9)]
    assert found("tight, at equal band", learning=tuple(apart)).legend[0] == "Missing: ewma blocks 0, 1, 4, 6 to 8."
    tuned = found("tight, each tuned", learning=tuple(runs))
    assert "Not in this view: arrival, ewma-reset-guarded, linear, mu." in tuned.legend
    assert any("missing: ewma block 3; mu blocks 0 to 4." in text for text in missing(study(learning=tuple(runs))))
    assert "Incomplete: exact - ewma in tight" in found("The 6", learning=tuple(runs)).legend[0]


def test_a_run_that_ended_early_is_named_and_counted():
    runs = list(learning_runs(declaration()))
    runs[2] = replace(runs[2], error="NonFiniteError: the loss", success=0.1)
    table = found("tight, at equal band", learning=tuple(runs))
    assert "Ended early and counted with the last success: exact, block 2 (NonFiniteError: the loss)." in table.legend
    assert cells(table, "exact")["worst"] == "0.100"


@pytest.mark.slow
def test_a_run_that_ended_before_its_first_evaluation_leaves_page_and_tables_whole(tmp_path):
    runs = list(learning_runs(declaration()))
    ewma = next(i for i, r in enumerate(runs) if (r.regime, r.method, r.block) == ("tight", "ewma", 2))
    runs[ewma] = replace(runs[ewma], error="NonFiniteError", success=0.0, cpu_s=0.0, num_updates=0, curve=())
    whole = study(learning=tuple(runs))
    assert cells(found("tight, at equal band", whole), "ewma")["worst"] == "0.000"
    assert "tight: success by updates" in write_page(whole, tmp_path / "report.html").read_text(encoding="utf-8")
    nothing = tuple(replace(r, error="NonFiniteError", success=0.0, cpu_s=0.0, num_updates=0, curve=()) for r in runs)
    assert write_page(study(learning=nothing), tmp_path / "report.html").exists()


def test_a_pair_that_leaves_a_contrast_is_counted():
    runs = list(learning_runs(declaration()))
    ewma = next(i for i, r in enumerate(runs) if (r.regime, r.method, r.block) == ("tight", "ewma", 2))
    runs[ewma] = replace(runs[ewma], curve=runs[ewma].curve[-1:])  # first evaluated after the cheaper run ended
    row = cells(found("Every contrast in every view", learning=tuple(runs)), "tight", "ewma - arrival")
    assert row["at equal band, equal CPU s"].endswith("(9 of 10)")
    assert "of" not in row["at equal band"]
    more = tuple(run("tight", "mu", block, 0.7) for block in range(7))
    assert cells(found("tight, at equal band", learning=more), "mu")["runs"] == "7", "five are declared"


def test_equal_cpu_seconds_are_called_rough_and_their_noise_is_printed():
    same = [run(name, "mu", 7, 0.61, cpu_s=s) for name, s in (("tight", 20.0), ("loose", 26.0))]
    (rough,) = [text for text in found("Every contrast", learning=tuple(same)).legend if "CPU s" in text]
    assert "rough comparison" in rough
    assert "up to 1.30 times as long" in rough


def test_the_reset_table_pools_the_runs_in_which_it_fired_and_names_the_worst():
    table = found("ewma-reset-guarded")
    pairs = [
        (r, b, success_of(r, "ewma-reset-guarded", b) - success_of(r, "ewma", b)) for r in ("tight", "loose") for b in (0, 1)
    ]
    row = cells(table, "all")
    assert row["runs in which it fired"] == "4"
    by_block = [fmean(pair[2] for pair in pairs if pair[1] == block) for block in (0, 1)]
    assert row["difference [95% interval]"] == interval(mean_interval(by_block))
    assert "over 2 blocks" in table.caption
    worst = min(pairs, key=lambda pair: pair[2])
    assert (row["worst"], row["its difference"]) == (f"{worst[0]}, block {worst[1]}", f"{worst[2]:+.3f}")
    idle = [replace(r, num_resets=0) for r in learning_runs(declaration())]
    assert found("ewma-reset-guarded", learning=tuple(idle)).legend == ("It fired in no run that can be compared.",)


def test_the_pilot_marks_what_was_taken_and_whether_seeds_are_shared():
    tried = [run("tight", "exact", 0, s, band=b, seed=7) for b, s in ((1.1, 0.4), (1.5, 0.6), (3.0, 0.5))]
    table = found("Pilot runs", pilot=tuple(tried))
    assert [(row[2], row[5]) for row in table.rows] == [("1.5", "0.600 ‡"), ("3", "0.500"), ("1.1", "0.400")]
    assert "settings tried per method: 3." in table.caption
    assert "No seed is shared" in table.caption
    assert "Seeds shared with them: [103]" in found("Pilot", pilot=(run("tight", "exact", 0, 0.4, seed=103),)).caption


def test_the_ratios_to_arrival_are_geometric_means_over_traces():
    table = found("Error of each proximal policy over that of arrival, band 1.1")
    for name, window in (("ewma", 4), ("mu", 16)):
        half = 0.5 / 10_000
        logs = [log((error_of(name, window, 1.1, t) + half) / (error_of("arrival", window, 1.1, t) + half)) for t in range(5)]
        mean, wide = fmean(logs), T_4 * stdev(logs) / 5**0.5
        shown = cells(table, "fp8", "even", name)[f"window {window}"].removesuffix(" *")
        assert shown == f"{exp(mean):.2f} [{exp(mean - wide):.2f}, {exp(mean + wide):.2f}]"
    own = median(error_of("arrival", 16, 1.1, t) for t in range(5))
    assert cells(table, "fp8", "even", "arrival")["window 16"] == f"{own:.2%}"


@pytest.mark.slow
def test_a_declared_check_prints_its_seeds_and_how_many_of_the_declared_traces_it_has():
    few = tuple(e for e in decision_rows() if (e.window, e.trace) != (16, 3))
    row = cells(found("The declared checks", decision=few), "ewma / arrival: even lags, windows 8 to 32, fp8, band 1.1")
    assert (row["seeds"], row["declared traces"]) == ("4", "4 of 5")
    table = found("Error of each proximal policy over that of arrival, band 1.1", decision=few)
    assert table.legend[1].startswith("4 to 5 traces of 4 to 5 seeds a cell.")


def test_drivers_that_have_seeds_of_their_own_are_named_and_not_compared():
    rows = tuple(replace(e, driver="ewma") if e.trace == 4 else e for e in decision_rows())
    table = found("What moves the error", decision=rows)
    assert [row[0] for row in table.rows] == ["window", "window", "lags", "engine", "band", "band"]
    assert "Drivers (exact, ewma) are not compared" in table.caption
    assert "later stage of training" in table.caption


@pytest.mark.slow
def test_the_form_of_the_proximal_policies_is_said_where_their_errors_stand():
    titles = ("The declared checks", "What moves", "Kinds of", "Error of each proximal policy over that of arrival, band 1.1")
    for title in titles:
        assert "r_d = X/mu, r_s = theta/X" in found(title).caption


def test_the_first_band_is_that_of_the_checks_and_the_others_are_folded():
    settings = [table for table in tables_of(study()) if table.title.startswith("Error of each proximal policy")]
    assert [(table.title[-8:], table.is_detail) for table in settings] == [("band 1.1", False), ("band 1.5", True)]


def test_a_factor_moves_the_error_by_what_was_put_in():
    at = {(level.factor, level.level): level for level in levels(decision_rows())}
    assert at["window", "16"].arrival / at["window", "4"].arrival == pytest.approx(2.0)
    assert at["band", "1.1"].arrival / at["band", "1.5"].arrival == pytest.approx(2.0)
    assert at["engine", "fp8"].ratios["mu"] == pytest.approx(ERRORS["mu"] / ERRORS["arrival"], rel=0.01)


def test_kinds_of_error_are_medians_over_traces():
    row = cells(found("Kinds of error, band 1.1"), "fp8", "ewma")
    errors = [error_of("ewma", w, 1.1, t) for w in (4, 16) for t in range(5)]
    assert row["by count"] == f"{median(errors):.2%}"
    assert row["kept wrongly"] == f"{median(errors) / 4:.2%}"
    assert row["masked, by weight"] == f"{median(3 * error / 8 for error in errors):.2%}"


def test_the_frontier_holds_what_no_other_choice_beats():
    own = {choice.name: choice for choice in choices(study())["fp8"]}
    assert (own["snapshot"].error, own["snapshot"].extra_s) == (0.0, EXTRA_S["snapshot"])
    assert own["ewma-auto"].extra_s == EXTRA_S["ewma"]
    assert {name for name, choice in own.items() if choice.on_frontier} == {"mu", "snapshot"}
    assert "rescore" not in own, "its route was not measured"
    row = cells(found("Which one is worth its cost"), "mu")
    known = {"exact route or proximal policy": "mu", "extra s": "0.000", "update s": "2.00", "copies": "6.0"}
    assert row == known | {"fp8": f"{own['mu'].error:.2%} ●"}
    caption = found("Which one is worth its cost").caption
    assert "Work that overlaps with the update and stalls of the engine are not in the extra seconds" in caption
    assert "r_d = X/mu, r_s = theta/X" in caption
    assert choices(study(cost=())) == choices(study(decision=())) == {}


def test_routes_that_differ_by_less_than_the_noise_of_an_update_cost_the_same():
    """An update takes 2 s, so costs within 0.1 s are equal; the exact route at 0.09 s beats mu at 0 s."""
    near = tuple(replace(one, extra_s=0.09) if one.route == "snapshot" else one for one in route_costs())
    assert [choice.name for choice in choices(study(cost=near))["fp8"] if choice.on_frontier] == ["snapshot"]
    far = tuple(replace(one, extra_s=0.11) if one.route == "snapshot" else one for one in route_costs())
    assert [choice.name for choice in choices(study(cost=far))["fp8"] if choice.on_frontier] == ["mu", "snapshot"]


def test_what_is_missing_is_counted_part_by_part():
    assert missing(study()) == [
        "contrasts each tuned: 0 of 3; missing: exact - ewma in tight; ewma - arrival in tight; exact - arrival in tight.",
        "runs in tight, each tuned: 5 of 10; missing: exact blocks 0 to 4.",
    ]
    short = tuple(r for r in learning_runs(declaration()) if (r.regime, r.method, r.block) != ("loose", "arrival", 9))
    gaps = missing(study(learning=short))
    assert "contrasts at equal band: 4 of 6; missing: ewma - arrival in loose; exact - arrival in loose." in gaps
    rows = tuple(e for e in decision_rows() if (e.window, e.band, e.trace, e.proximal_policy) != (16, 1.5, 2, "aged"))
    gaps = missing(study(decision=rows, cost=()))
    assert "decision errors, settings with 5 traces: 3 of 4; missing: fp8, even lags, window 16, band 1.5." in gaps
    assert "routes whose cost is measured: 0 of 4; missing: exact; arrival; ewma; mu." in gaps
    wide = replace(
        declaration(regime("tight")), cross=Cross(windows=tuple(range(1, 21)), lags=("even",), engines=("int4",), bands=(1.1,))
    )
    (text,) = [gap for gap in missing(study(declaration=wide)) if gap.startswith("decision")]
    assert text.endswith("; and 12 more.")


def test_a_study_without_a_part_has_no_tables_of_it():
    parts = {table.part for table in tables_of(study(decision=(), cost=()))}
    assert parts == {"Learning", "Declared and found"}
    nothing = study(learning=(), decision=(), cost=())
    assert cells(found("The 6", nothing), "tight", "exact - ewma")["reading"] == "missing"


def test_every_method_and_proximal_policy_has_a_look_and_every_proximal_policy_a_route():
    assert set(ALL_METHODS) | set(PROXIMAL_POLICIES) <= set(LOOKS)
    assert set(ROUTES) == set(PROXIMAL_POLICIES)


def test_the_three_renderings_hold_the_same_cells():
    table = Table(
        part="p", title="T", header=("a|b", "n"), rows=(("x", "1.5"), ("y", "—")), caption="How.", legend=("*: mark.",)
    )
    assert table.numeric == (False, True)
    lines = table.markdown().splitlines()
    assert lines == ["**T.** How.", "", r"| a\|b | n |", "| --- | ---: |", "| x | 1.5 |", "| y | — |", "", "*: mark."]
    out = StringIO()
    print_tables([table, replace(table, title="folded", is_detail=True)], Console(file=out, width=60))
    printed = out.getvalue()
    assert all(text in printed for text in ("T", "a|b", "1.5", "How.", "*: mark."))
    assert "folded" not in printed
    with pytest.raises(AssertionError):
        Table(part="p", title="T", header=("a",), rows=(("x", "y"),))


def test_numbers_are_written_with_what_is_known_of_them():
    one = mean_interval([0.25])
    assert (plus_minus(one), interval(one), plus_minus(None), interval(None)) == ("0.250 ± —", "+0.250 [—]", "—", "—")
    wide = Estimate(mean=-0.05, low=-0.1, high=0.0, p=0.05, n=4)
    assert (plus_minus(wide), interval(wide)) == ("-0.050 ± 0.050", "-0.050 [-0.100, +0.000]")
    assert [p_value(p) for p in (None, 0.0004, 0.0126, 1.0)] == ["—", "< 0.001", "0.013", "1.000"]
    assert [figure(value) for value in (None, float("nan"), 0.5)] == ["—", "—", "0.500"]
