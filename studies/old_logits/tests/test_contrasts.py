"""What was put into the synthetic runs comes out of their comparison, and nothing that is missing disappears."""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean, stdev

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oldlogits.core.errors import ConfigError
from studies.old_logits.analyse.contrasts import (
    all_contrasts,
    at_equal,
    collapse_bars,
    mean_curve,
    method_rows,
    noise_floor,
    on_even_clock,
    reset_effect,
    runs_of,
    success_at,
)
from studies.old_logits.analyse.stats import holm
from studies.old_logits.results import Declaration, Point
from studies.old_logits.tests.synthetic import CONTRASTS, CPU_S, METHODS, declaration, learning_runs, regime, run, success_of

DECLARED = declaration()
RUNS = learning_runs(DECLARED)
TIGHT, LOOSE = DECLARED.regimes
T_9 = 2.2621571628  # the 97.5% point of Student's t with 9 degrees of freedom


def row(method, *, runs=RUNS, place=TIGHT, view="band", declared=DECLARED):
    (found,) = [row for row in method_rows(declared, runs, place, view) if row.method == method]
    return found


def test_the_declared_contrasts_are_the_differences_that_were_put_in():
    declared = [contrast for contrast in all_contrasts(DECLARED, RUNS) if contrast.adjusted is not None]
    assert [(c.regime, c.first, c.second) for c in declared] == [
        (r.name, *pair) for r in DECLARED.regimes for pair in CONTRASTS
    ]
    for c in declared:
        differences = [success_of(c.regime, c.first, b) - success_of(c.regime, c.second, b) for b in range(10)]
        half = T_9 * stdev(differences) / 10**0.5
        assert c.estimate.n == c.num_declared == 10
        assert c.estimate.mean == pytest.approx(fmean(differences), abs=1e-12)
        assert (c.estimate.low, c.estimate.high) == pytest.approx((fmean(differences) - half, fmean(differences) + half))


def test_holm_is_over_the_declared_tests_alone():
    exploratory = replace(LOOSE, name="loose", exploratory=True)
    contrasts = all_contrasts(declaration(TIGHT, exploratory), RUNS)
    declared = [contrast for contrast in contrasts if contrast.adjusted is not None]
    assert {(c.regime, c.view, c.axis) for c in declared} == {("tight", "band", "update")}
    assert [c.adjusted for c in declared] == list(holm([c.estimate.p for c in declared]))
    assert len(contrasts) == 3 * (2 * 2 + 2)  # two axes in two regimes at equal band, and tuned in the first


def test_a_declared_test_without_runs_counts_as_one_that_shows_nothing():
    kept = [r for r in RUNS if not (r.regime == "loose" and r.method == "exact")]
    declared = [contrast for contrast in all_contrasts(DECLARED, kept) if contrast.adjusted is not None]
    assert len(declared) == 6
    absent = [c for c in declared if c.estimate is None]
    assert [(c.regime, c.first, c.second) for c in absent] == [("loose", "exact", "ewma"), ("loose", "exact", "arrival")]
    ps = [1.0 if c.estimate is None else c.estimate.p for c in declared]
    assert [c.adjusted for c in declared] == list(holm(ps))


def test_a_missing_block_is_named_and_the_pair_of_that_block_is_not_formed():
    kept = [r for r in RUNS if (r.regime, r.method, r.block) not in {("tight", "ewma", 3), ("tight", "mu", 0)}]
    assert row("ewma", runs=kept).missing == (3,)
    assert row("mu", runs=kept).missing == (0,)
    assert row("exact", runs=kept).missing == ()
    first = next(iter(all_contrasts(DECLARED, kept)))
    blocks = [b for b in range(10) if b != 3]
    assert first.estimate.n == 9
    expected = fmean(success_of("tight", "exact", b) - success_of("tight", "ewma", b) for b in blocks)
    assert first.estimate.mean == pytest.approx(expected, abs=1e-12)


def test_a_method_without_a_run_keeps_its_row():
    rows = method_rows(DECLARED, [r for r in RUNS if r.method != "arrival"], TIGHT, "band")
    assert [row.method for row in rows] == list(METHODS)
    (absent,) = [row for row in rows if row.method == "arrival"]
    assert (absent.runs, absent.success, absent.worst, absent.missing) == ((), None, None, tuple(range(10)))


def test_one_bar_for_collapses_holds_in_a_regime_half_of_the_best_mean_whatever_its_method_or_knobs():
    best = [run("tight", "exact", b, s, band=3.0) for b, s in enumerate((0.92, 0.88))]
    lucky = [run("tight", "mu", b, s, band=1 + b) for b, s in enumerate((0.95, 0.1))]  # no band: one setting
    runs = [*best, *lucky, *(run("tight", "ewma", b, s) for b, s in enumerate((0.449, 0.45, 0.2))), run("loose", "mu", 0, 1.0)]
    assert collapse_bars(runs) == pytest.approx({"tight": 0.45, "loose": 0.5})
    found = row("ewma", runs=runs)
    assert found.num_collapses == 2, "block 2 too, where no other method ran"
    assert found.worst.block == 2
    assert found.success.mean == pytest.approx((0.449 + 0.45 + 0.2) / 3)


def test_a_run_belongs_to_every_view_whose_knobs_it_has():
    place = regime("tight", rho_bands={"exact": 1.1, "ewma": 1.3}, tuned={"exact": (1.1, 0.2, 0.28), "mu": (9.0, 0.1, 0.1)})
    runs = [run("tight", "exact", 0, 0.8), run("tight", "ewma", 0, 0.7), run("tight", "ewma", 0, 0.75, band=1.3)]
    runs += [run("tight", "mu", 0, 0.6, band=1.7), run("tight", "mu", 0, 0.5, eps_low=0.1, eps_high=0.1)]

    def successes(view, method):
        return [found.success for found in runs_of(runs, place, view, method).values()]

    assert [successes(view, "exact") for view in place.views] == [[0.8], [0.8], [0.8]]
    assert [successes(view, "ewma") for view in place.views] == [[0.7], [0.75], []]
    assert [successes(view, "mu") for view in place.views] == [[0.6], [0.6], [0.5]], "no band: found at any"
    assert [row.method for row in method_rows(declaration(place), runs, place, "tuned")] == ["exact", "mu"]


def test_a_contrast_with_a_method_that_cannot_reach_the_equal_rho_is_none_of_that_view():
    place = regime("tight", rho_bands={"exact": 1.1, "ewma": 1.3}, rho_unreached=("arrival",))
    found = [(c.view, c.first, c.second) for c in all_contrasts(declaration(place), ()) if c.axis == "update"]
    assert [pair for view, *pair in found if view == "rho"] == [["exact", "ewma"]]
    assert len([pair for view, *pair in found if view == "band"]) == 3


@given(
    st.lists(st.tuples(st.floats(0.1, 9), st.floats(0, 1)), min_size=1, max_size=6),
    st.floats(-0.1, 1.1),
)
def test_success_between_evaluations_is_linear_and_never_extrapolated(steps, share):
    places = np.cumsum([step for step, _ in steps])
    values = [value for _, value in steps]
    curve = tuple(Point(update=i, cpu_s=float(x), success=y) for i, (x, y) in enumerate(zip(places, values, strict=True)))
    at = float(places[0] + share * (places[-1] - places[0]))
    found = success_at(run("tight", "exact", 0, 0.5, curve=curve), "cpu_s", at)
    if places[0] <= at <= places[-1]:
        assert found == pytest.approx(np.interp(at, places, values), abs=1e-9)
    else:
        assert found is None


def test_a_run_that_ended_early_keeps_its_last_success_and_does_not_set_the_budget():
    whole, cheap = run("tight", "exact", 0, 0.8, cpu_s=30.0), run("tight", "ewma", 0, 0.6, cpu_s=24.0)
    early = run("tight", "mu", 0, 0.3, cpu_s=5.0, error="NonFiniteError")
    assert at_equal([whole, cheap, early], "cpu_s") == pytest.approx([0.2 + 0.6 * 24 / 30, 0.6, 0.3])
    assert at_equal([early], "cpu_s") == [0.3]
    assert success_at(whole, "cpu_s", 31.0) is None


def test_a_run_that_ended_before_its_first_evaluation_counts_with_its_success():
    whole = run("tight", "exact", 0, 0.8, cpu_s=30.0)
    empty = run("tight", "ewma", 0, 0.0, cpu_s=0.0, curve=(), num_updates=0, error="NonFiniteError")
    early = run("tight", "mu", 0, 0.3, cpu_s=5.0, error="NonFiniteError")
    assert at_equal([whole, empty], "cpu_s") == pytest.approx([0.8, 0.0])
    assert at_equal([early, empty], "cpu_s") == pytest.approx([0.3, 0.0]), "each with its last"
    assert at_equal([empty], "update") == [0.0]
    assert dict(mean_curve([whole, empty], "update")) == pytest.approx({0.0: 0.1, 30.0: 0.25, 60.0: 0.4})
    assert mean_curve([whole, empty], "cpu_s")[-1] == pytest.approx((30.0, 0.4))
    assert mean_curve([empty], "cpu_s")[-1] == (0.0, 0.0)


def test_at_equal_cpu_seconds_every_method_is_read_where_the_cheapest_ends():
    found = {row.method: row for row in method_rows(DECLARED, RUNS, TIGHT, "band")}
    for method in METHODS:
        end = min(CPU_S.values())
        expected = [0.2 + (success_of("tight", method, b) - 0.2) * end / CPU_S[method] for b in range(5)]
        assert found[method].equal_cpu == pytest.approx(expected), "over the five blocks that all ran in"
    pair = next(c for c in all_contrasts(DECLARED, RUNS) if c.axis == "cpu_s")
    shrunk = [0.2 + (success_of("tight", "exact", b) - 0.2) * CPU_S["ewma"] / CPU_S["exact"] for b in range(10)]
    expected = fmean(a - success_of("tight", "ewma", b) for b, a in enumerate(shrunk))
    assert (pair.first, pair.second, pair.adjusted) == ("exact", "ewma", None)
    assert pair.estimate.mean == pytest.approx(expected)


def test_a_mean_curve_is_the_mean_of_what_all_runs_have():
    runs = [run("tight", "exact", 0, 0.8, cpu_s=10.0), run("tight", "exact", 1, 0.6, cpu_s=20.0)]
    assert [(x, pytest.approx(y)) for x, y in ((0.0, 0.2), (30.0, 0.45), (60.0, 0.7))] == list(mean_curve(runs, "update"))
    by_cpu = mean_curve(runs, "cpu_s", num_points=3)
    assert [x for x, _ in by_cpu] == [0.0, 5.0, 10.0]
    assert [y for _, y in by_cpu] == pytest.approx([0.2, (0.5 + 0.3) / 2, (0.8 + 0.4) / 2])
    assert mean_curve([], "update") == ()


def test_cpu_seconds_are_the_median_pace_of_the_blocks_times_the_updates():
    """Paces of exact: 30, 36 and 90 seconds for 60 updates, the median 36; its band 3 apart, a run without updates too."""
    runs = [run("tight", "exact", b, 0.8, cpu_s=s) for b, s in enumerate((30.0, 36.0, 90.0))]
    runs += [run("tight", "exact", 0, 0.8, cpu_s=12.0, band=3.0), run("tight", "exact", 3, 0.4, cpu_s=18.0, num_updates=30)]
    runs += [run("tight", "mu", b, 0.8, cpu_s=s, band=1 + b) for b, s in enumerate((20.0, 40.0))]
    runs += [run("tight", "ewma", 0, 0.0, cpu_s=0.0, num_updates=0, curve=(), error="NonFiniteError")]
    even = on_even_clock(runs)
    assert [r.cpu_s for r in even] == pytest.approx([36.0, 36.0, 36.0, 12.0, 18.0, 30.0, 30.0, 0.0])
    assert [p.cpu_s for p in even[2].curve] == pytest.approx([0.0, 18.0, 36.0])
    assert [(r.success, r.rho, r.num_updates) for r in even] == [(r.success, r.rho, r.num_updates) for r in runs]
    rows = method_rows(DECLARED, runs, TIGHT, "band")
    assert [r.cpu_s for found in rows if found.method == "exact" for r in found.runs] == pytest.approx([36, 36, 36, 18])


def test_contrasts_at_equal_cpu_seconds_do_not_follow_the_noise_of_single_runs():
    noisy = [replace(r, cpu_s=3 * r.cpu_s, curve=tuple(replace(p, cpu_s=3 * p.cpu_s) for p in r.curve)) if r.block == 4 else r
             for r in RUNS]  # fmt: skip
    for quiet, loud in zip(all_contrasts(DECLARED, RUNS), all_contrasts(DECLARED, noisy), strict=True):
        assert (quiet.estimate is None) == (loud.estimate is None)
        assert quiet.estimate is None or quiet.estimate.mean == pytest.approx(loud.estimate.mean)


def test_the_noise_floor_is_the_largest_ratio_of_seconds_of_one_run_under_two_names():
    runs = [run("tight", "synchronous", 0, 0.8, cpu_s=20.0), run("loose", "synchronous", 0, 0.8, cpu_s=24.0)]
    other = [run("tight", "mu", 0, 0.8, cpu_s=90.0, rho=0.5), run("tight", "ewma", 0, 0.7, cpu_s=80.0)]
    assert noise_floor([*runs, *other]) == pytest.approx(1.2)
    assert noise_floor([runs[0], *other, run("loose", "synchronous", 1, 0.8, cpu_s=24.0)]) is None, "another seed"
    assert noise_floor([runs[0], run("loose", "arrival", 0, 0.8, cpu_s=24.0)]) is None, "another route has its own cost"


def test_the_reset_effect_is_over_the_runs_in_which_it_fired_against_the_same_run_without():
    elsewhere = [replace(r, band=3.0, success=0.0, num_resets=5) for r in RUNS]
    effect = reset_effect(DECLARED, [*RUNS, *elsewhere])
    assert {cell[:2] for cell in effect.cells} == {("tight", 0), ("tight", 1), ("loose", 0), ("loose", 1)}
    expected = [success_of(r, "ewma-reset-guarded", b) - success_of(r, "ewma", b) for r, b, _ in effect.cells]
    assert [cell[2] for cell in effect.cells] == pytest.approx(expected)
    assert effect.estimate.mean == pytest.approx(fmean(expected))
    assert effect.worst[2] == min(cell[2] for cell in effect.cells)


@pytest.mark.parametrize("loss, holds", [(0.005, True), (0.2, False)])
def test_the_bar_of_the_reset_is_on_the_lower_end_of_the_interval(loss, holds):
    runs = []
    for block in range(4):
        base = 0.7 + 0.02 * block
        shift = 0.01 * (-1) ** block
        runs += [run("tight", "ewma", block, base)]
        runs += [run("tight", "ewma-reset-guarded", block, base - loss + shift, num_resets=2)]
    effect = reset_effect(DECLARED, runs)
    half = 3.1824463052842638 * stdev([0.01, -0.01, 0.01, -0.01]) / 2
    assert effect.estimate.low == pytest.approx(-loss - half)
    assert effect.holds is holds


def test_the_interval_of_the_reset_effect_is_over_blocks_that_share_a_seed():
    """Block 0 lost 0.1 and 0.3 in two regimes, block 1 lost 0.1 in one: mean of (-0.2, -0.1), not of three."""
    runs = []
    for place, block, loss in (("tight", 0, 0.1), ("loose", 0, 0.3), ("loose", 1, 0.1)):
        runs += [run(place, "ewma", block, 0.7), run(place, "ewma-reset-guarded", block, 0.7 - loss, num_resets=1)]
    effect = reset_effect(DECLARED, runs)
    assert len(effect.cells) == 3
    assert effect.estimate.n == 2
    assert effect.estimate.mean == pytest.approx(-0.15)
    assert effect.estimate.low == pytest.approx(-0.15 - 12.7062 * stdev([0.2, 0.1]) / 2**0.5, rel=1e-4)


def test_without_a_firing_or_a_partner_there_is_no_reset_effect():
    idle = [run("tight", "ewma", 0, 0.7), run("tight", "ewma-reset-guarded", 0, 0.7)]
    alone = [run("tight", "ewma", 0, 0.7, band=3.0), run("tight", "ewma-reset-guarded", 0, 0.7, num_resets=1)]
    assert reset_effect(DECLARED, idle) is None
    assert reset_effect(DECLARED, alone) is None


def test_a_declaration_refuses_what_it_cannot_show():
    fields = {"regimes": (TIGHT,), "contrasts": (("exact", "ewma"),), "num_blocks": 10, "num_exploratory_blocks": 5}
    with pytest.raises(ConfigError, match="ewma"):
        Declaration(methods=("exact",), **fields)
    with pytest.raises(ConfigError, match="unknown method"):
        Declaration(methods=("exact", "ewma", "guess"), **fields)
    with pytest.raises(ConfigError, match="primary view"):
        Declaration(methods=("exact", "ewma"), primary="rho", **fields)


def test_a_pair_with_a_method_that_a_regime_does_not_run_is_none_of_that_regime():
    whole, part = regime("whole"), replace(regime("part"), methods=("exact", "ewma"), exploratory=True)
    declared = replace(declaration(whole, part), contrasts=(("exact", "ewma"), ("exact", "arrival")))
    found = {(c.regime, c.first, c.second) for c in all_contrasts(declared, [])}
    assert found == {("whole", "exact", "ewma"), ("whole", "exact", "arrival"), ("part", "exact", "ewma")}
