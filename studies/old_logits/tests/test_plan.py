"""A study's recipe: the cells that it asks for, and what it refuses."""

from collections import Counter
from dataclasses import replace

import pytest

from oldlogits.config.reader import build
from oldlogits.core.errors import ConfigError
from studies.old_logits.declare.plan import (
    Plan,
    cells,
    cost_cells,
    decision_cells,
    learning_cells,
    pilot_bands,
    pilot_eps,
    read_plan,
)
from studies.old_logits.tests.plans import REGIME, cell, plan_table


def plan(**sections):
    return build(Plan, plan_table(**sections))


def test_methods_in_a_contrast_run_in_all_blocks_and_come_first_the_others_in_fewer():
    found = list(learning_cells(plan()))
    assert [(cell.method, cell.config.seed) for cell in found] == [
        *((method, seed) for seed in (5, 6, 7) for method in ("exact", "arrival")),
        ("mu", 5),
        ("mu", 6),
    ], "block by block"
    assert {cell.config.model_seed for cell in found if cell.block == 1} == {6}, "a block has one warm start"
    assert {cell.config.window for cell in found} == {2}
    assert len({cell.key for cell in found}) == len(found)


def test_what_two_views_share_is_run_once_and_only_the_primary_view_runs_in_all_blocks():
    regime = {
        **REGIME,
        "rho_bands": {"exact": 1.1, "arrival": 1.3},
        "tuned": {"exact": [1.1, 0.2, 0.28], "arrival": [1.3, 0.1, 0.2]},
    }
    found = Counter(
        (cell.method, cell.config.band, cell.config.objective.eps_low) for cell in learning_cells(plan(regimes=[regime]))
    )
    assert found == {
        ("exact", 1.1, 0.2): 3,
        ("arrival", 1.1, 0.2): 3,
        ("arrival", 1.3, 0.2): 2,
        ("arrival", 1.3, 0.1): 2,
        ("mu", 1.1, 0.2): 2,
    }


def test_a_loss_whose_clip_is_of_another_size_runs_with_its_own_bounds_over_every_route():
    regime = {**REGIME, "eps": {"gspo": [0.02, 0.028]}}
    learning = {**plan_table()["learning"], "methods": ["exact", "gspo@exact", "gspo@arrival", "cispo@exact", "mis-balance"]}
    found = {
        (c.method, c.config.objective.loss, c.config.objective.eps_low, c.config.objective.eps_high)
        for c in learning_cells(plan(regimes=[regime], learning={**learning, "contrasts": []}))
    }
    assert found == {
        ("exact", "masked_is", 0.2, 0.28),
        ("gspo@exact", "gspo", 0.02, 0.028),
        ("gspo@arrival", "gspo", 0.02, 0.028),
        ("cispo@exact", "cispo", 0.2, 0.28),
        ("mis-balance", "masked_is", 0.2, 0.28),
    }


def test_the_name_of_a_cell_follows_from_what_it_sets_and_from_nothing_else():
    first, second = cell(1), cell(2)
    assert first.key == cell(1).key != second.key
    assert replace(first, method="arrival").key != first.key
    assert replace(first, config=replace(first.config, band=2.0)).key != first.key
    written_out = replace(first.config, objective=replace(first.config.objective, eps_low=0.2))
    assert replace(first, config=written_out).key == first.key, "0.2 is the default"


def test_exploratory_regimes_run_in_fewer_blocks_and_last():
    other = {**REGIME, "name": "other", "exploratory": True}
    found = [(cell.regime, cell.method) for cell in learning_cells(plan(regimes=[other, REGIME]))]
    assert Counter(found) == {("even-2", "exact"): 3, ("even-2", "arrival"): 3, ("even-2", "mu"): 2} | {
        ("other", method): 2 for method in ("exact", "arrival", "mu")
    }
    assert [regime for regime, _ in found] == ["even-2"] * 8 + ["other"] * 6


def test_the_pilot_tries_every_band_and_then_every_eps_at_the_best_band():
    pilot = {"seeds": [100, 101], "methods": ["exact", "mu"], "bands": [1.05, 1.5], "eps": [[0.1, 0.1]]}
    of = plan(pilot=pilot)
    assert [(c.method, c.config.band, c.config.seed) for c in pilot_bands(of)] == [
        ("exact", 1.05, 100),
        ("exact", 1.05, 101),
        ("exact", 1.5, 100),
        ("exact", 1.5, 101),
        ("mu", 1.1, 100),
        ("mu", 1.1, 101),
    ]
    tried = list(pilot_eps(of, {("even-2", "exact"): 1.5, ("even-2", "mu"): 1.1}))
    assert [(c.method, c.config.band, c.config.objective.eps_low) for c in tried[::2]] == [
        ("exact", 1.5, 0.1),
        ("mu", 1.1, 0.1),
    ]


def test_the_traces_are_the_full_cross():
    decision = {
        "windows": [1, 4],
        "lags": ["even", "random"],
        "engines": ["fp8", "int4", "bf16"],
        "drivers": ["exact", "exact", "arrival"],
        "bands": [1.1],
        "first_seed": 40,
    }
    found = list(decision_cells(plan(decision=decision)))
    cross = Counter((c.config.window, c.config.lockstep.lag, c.config.engine.precision, c.method) for c in found)
    assert len(found) == 2 * 2 * 3 * 3
    assert len(cross) == 2 * 2 * 3 * 2
    assert set(cross.values()) == {1, 2}
    assert {(c.method, c.config.seed) for c in found} == {("exact", 40), ("exact", 41), ("arrival", 42)}
    assert {c.config.num_updates - c.config.window for c in found} == {6}
    assert found[0].config.window == 4, "the widest first"


@pytest.mark.parametrize(
    "sections, message",
    [
        ({"learning": {"regimes": ["nowhere"]}}, "unknown regime"),
        ({"learning": {"regimes": ["even-2"], "methods": ["magic"]}}, "unknown method"),
        ({"learning": {"methods": ["mu"], "contrasts": [["mu", "exact"]]}}, "does not run"),
        ({"base": {"bandd": 1.0}}, "unknown key"),
        ({"pilots": {}}, "unknown key"),
        ({"regimes": [{"name": "x"}]}, r"\[regimes\[0\]\] lacks"),
        ({"regimes": [{**REGIME, "band": 0.9}]}, "band is out of range"),
        ({"learning": {"contrasts": [["mu"]]}}, "a list of length 2"),
    ],
)
def test_a_study_that_cannot_be_is_refused_before_anything_runs(sections, message):
    with pytest.raises(ConfigError) as raised:
        list(cells(plan(**sections)))
    import re

    assert re.search(message, str(raised.value)), str(raised.value)


def test_paths_in_a_study_begin_at_its_recipe(tmp_path, monkeypatch):
    (tmp_path / "run.toml").write_text("band = 1.7\n")
    (tmp_path / "study.toml").write_text('title = "x"\nbase = {}\n[cost]\nrecipe = "run.toml"\nroutes = ["mu", "eager"]\n')
    monkeypatch.chdir("/")
    found = list(cost_cells(read_plan(tmp_path / "study.toml")))
    assert [(c.method, c.config.band, c.config.proximal.source) for c in found] == [
        ("mu", 1.7, "none"),
        ("eager", 1.7, "eager"),
    ]
