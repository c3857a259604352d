"""What a pilot answers: the best knobs of each method, and the band of equal rho."""

import math
import tomllib

import pytest

from oldlogits.config.reader import build
from studies.old_logits.declare.pilot import best_knobs, rho_bands, suggestion
from studies.old_logits.declare.plan import Plan
from studies.old_logits.results import LearningRun
from studies.old_logits.tests.plans import plan_table


def run(method, band, success, rho, *, eps=0.2, seed=100):
    return LearningRun(
        regime="even-2",
        method=method,
        block=0,
        seed=seed,
        band=band,
        eps_low=eps,
        eps_high=0.28,
        success=success,
        num_episodes=10,
        num_updates=3,
        rho=rho,
        cpu_s=1.0,
        num_resets=0,
        curve=(),
    )


@pytest.fixture
def plan():
    pilot = {"seeds": [100, 101], "methods": ["exact", "arrival", "mu"], "bands": [1.05, 1.1, 1.5]}
    return build(Plan, plan_table(pilot=pilot))


RUNS = [
    run("exact", 1.05, 0.5, 0.93),
    run("exact", 1.1, 0.6, 0.95),
    run("exact", 1.1, 0.2, 0.97, seed=101),
    run("exact", 1.5, 0.45, 0.99),
    run("arrival", 1.05, 0.1, 0.80),
    run("arrival", 1.1, 0.7, 0.90),
    run("arrival", 1.1, 0.7, 0.5, eps=0.1),
    run("arrival", 1.5, 0.3, 0.98),
    run("mu", 1.1, 0.4, 0.7),
]


def test_the_best_knobs_have_the_highest_mean_over_seeds_and_of_equals_the_nearest_to_the_regime(plan):
    assert best_knobs(plan, RUNS) == {
        ("even-2", "exact"): (1.05, 0.2, 0.28),
        ("even-2", "arrival"): (1.1, 0.2, 0.28),
        ("even-2", "mu"): (1.1, 0.2, 0.28),
    }


def test_equal_rho_lies_between_neighbours_on_a_logarithmic_scale_of_bands(plan):
    found = rho_bands(plan, RUNS)
    assert found.keys() == {("even-2", "exact"), ("even-2", "arrival")}, "mu has no band"
    assert found["even-2", "exact"] == 1.1
    share = (0.96 - 0.90) / (0.98 - 0.90)  # exact has 0.96 on average at band 1.1
    assert found["even-2", "arrival"] == pytest.approx(math.exp((1 - share) * math.log(1.1) + share * math.log(1.5)))


def test_a_method_that_does_not_reach_the_rho_is_left_out_and_one_that_almost_does_is_not(plan):
    far = [r for r in RUNS if r.method == "exact"] + [run("arrival", 1.5, 0.3, 0.9549)]
    near = [r for r in RUNS if r.method == "exact"] + [run("arrival", 1.5, 0.3, 0.9551)]
    assert ("even-2", "arrival") not in rho_bands(plan, far)
    assert rho_bands(plan, near)["even-2", "arrival"] == 1.5


def test_the_answers_can_be_written_into_the_recipe(plan):
    table = tomllib.loads(suggestion(plan, RUNS))
    assert table["tuned"]["exact"] == [1.05, 0.2, 0.28]
    assert table["rho_bands"].keys() == {"exact", "arrival"}
