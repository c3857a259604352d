"""The shipped studies are what they say: every cell is a recipe that can be run, and the declared cross is complete."""

from pathlib import Path

import pytest

from oldlogits.core.loss import LOSSES
from studies.old_logits.declare.methods import METHODS
from studies.old_logits.declare.plan import cells, decision_cells, learning_cells, read_plan

RECIPES = Path(__file__).parents[1] / "recipes"


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[3])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["study", "study-small", "objectives"])
def test_every_cell_of_a_shipped_study_is_a_recipe_that_can_be_run(name):
    plan = read_plan(RECIPES / f"{name}.toml")
    keys = [cell.key for cell in cells(plan)]
    assert len(set(keys)) == len(keys) > 10


@pytest.mark.slow
def test_the_study_declares_three_regimes_three_contrasts_ten_blocks_and_every_method():
    plan = read_plan(RECIPES / "study.toml")
    declaration = plan.declaration
    declared = [regime for regime in declaration.regimes if not regime.exploratory]
    assert len(declared) == 3
    assert declaration.contrasts == (("exact", "ewma"), ("ewma", "arrival"), ("exact", "arrival"))
    assert declaration.num_blocks >= 10
    elsewhere = {"dedicated", "interruption", "eager", "mis-balance"}
    assert set(declaration.methods) == METHODS.keys() - elsewhere, "they train as exact does, or are in the other study"
    confirmed = {cell.config.seed for cell in learning_cells(plan)}
    assert not confirmed & set(plan.pilot.seeds), "fresh seeds confirm"
    traces = {(c.config.window, c.config.lockstep.lag, c.config.engine.precision, c.block) for c in decision_cells(plan)}
    assert len(traces) == 5 * 3 * 4 * len(plan.decision.drivers)
    assert len(plan.decision.drivers) >= 5
    assert set(plan.decision.bands) == {1.05, 1.1, 1.5, 3.0}


@pytest.mark.slow
def test_the_study_of_losses_declares_eight_blocks_on_fresh_seeds_over_every_lag_engine_and_task():
    plan = read_plan(RECIPES / "objectives.toml")
    declared = [regime for regime in plan.declaration.regimes if not regime.exploratory]
    assert (len(declared), plan.declaration.num_blocks) == (3, 8)
    seen = {(c.config.lockstep.max_lag, c.config.engine.precision, c.config.env.target) for c in learning_cells(plan)}
    assert seen == {(lag, engine, task) for lag in (0, 4, 16) for engine in ("fp8", "int4") for task in ("desk", "desk_long")}
    losses = {cell.config.objective.loss for cell in learning_cells(plan)}
    assert losses == set(LOSSES.names) - {"sat"}, "which came after it was declared"
    assert not {cell.config.seed for cell in learning_cells(plan)} & set(plan.pilot.seeds), "fresh seeds confirm"
