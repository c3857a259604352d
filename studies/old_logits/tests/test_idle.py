"""The checks against idle baselines: silent on a real run, and each finds its planted fault."""

from __future__ import annotations

import dataclasses
import shutil

import pyarrow.parquet as pq
import pytest

from oldlogits.core.errors import ConfigError
from oldlogits.record.event_log import read_events, typed
from oldlogits.record.events import BatchTaken, Updated
from oldlogits.run.run import run
from studies.old_logits.declare.methods import METHODS, find_method
from studies.old_logits.measure.idle import idle_checks
from studies.old_logits.results import Checks, Point
from studies.old_logits.show.check_tables import LOSS_ERROR, check_tables, updates_to
from studies.old_logits.tests.synthetic import run as a_run
from studies.old_logits.tests.synthetic import study
from tests.runs import recipe

GOOD = Checks(clipped=0.1, masked=0.0, first_batch="a", num_retrained=0, loss_error=1e-8)


@pytest.fixture(scope="module")
def made(tiny_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("idle") / "run"
    config = recipe(tiny_folder, num_updates=3, record={"tokens_every": 1}, objective={"loss_aggregation": "sequence-mean"})
    assert run(config, out).error is None
    events = list(read_events(out / "events.jsonl"))
    return config, out, typed(events, Updated), typed(events, BatchTaken)


def test_a_run_gives_the_loss_that_its_record_gives_with_the_stated_denominator_and_with_no_other(made):
    config, out, updates, batches = made
    found = idle_checks(config, out, updates, batches)
    assert found.loss_error < LOSS_ERROR
    assert found.num_retrained == 0
    for other in ("token-mean", "constant"):
        stated = dataclasses.replace(config, objective=dataclasses.replace(config.objective, loss_aggregation=other))
        assert idle_checks(stated, out, updates, batches).loss_error > 10 * LOSS_ERROR
    bound = dataclasses.replace(config, objective=dataclasses.replace(config.objective, dual_clip=1.01, eps_high=0.01))
    assert idle_checks(bound, out, updates, batches).loss_error > LOSS_ERROR, "the clip is part of what is stated"


def test_what_the_clip_and_the_band_left_out_is_the_largest_share_of_an_update(made):
    config, out, updates, batches = made
    tables = [pq.read_table(out / f"tokens/v{u.version:06d}.parquet", columns=["clip_mask", "band_mask"]) for u in updates]
    found = idle_checks(config, out, updates, batches)
    for share, column in ((found.clipped, "clip_mask"), (found.masked, "band_mask")):
        assert share == pytest.approx(max(1 - table[column].to_numpy().mean() for table in tables), abs=1e-6)


def test_a_batch_that_is_trained_again_and_other_first_tokens_show(made, tmp_path):
    config, out, updates, batches = made
    assert idle_checks(config, out, updates, [*batches, batches[0]]).num_retrained == len(batches[0].groups)
    other = shutil.copytree(out, tmp_path / "run")
    shutil.copy(out / "tokens/v000002.parquet", other / "tokens/v000001.parquet")
    digest = idle_checks(config, out, updates, batches).first_batch
    assert idle_checks(config, out, updates[:1], batches).first_batch == digest
    assert idle_checks(config, other, updates[:1], batches).first_batch != digest


@pytest.mark.parametrize(
    "changed, found",
    [
        ({}, "none"),
        ({"clipped": 0.0}, "the clip never acts"),
        ({"first_batch": "the same"}, "seeds alike"),
        ({"num_retrained": 1}, "trained twice"),
        ({"loss_error": 1e-2}, "another loss"),
        ({"loss_error": float("nan")}, "another loss"),
    ],
)
def test_the_table_names_what_is_wrong(changed, found):
    runs = []
    for block in range(3):
        checks = dataclasses.replace(GOOD, **({"first_batch": f"seed {block}"} | changed))
        runs.append(a_run("tight", "exact", block, 0.9, checks=checks))
    table, _ = check_tables(study(learning=tuple(runs)))
    (row,) = [row for row in table.rows if row[:2] == ("tight", "exact")]
    assert row[-1] == found
    (absent,) = [row for row in table.rows if row[:2] == ("tight", "mu")]
    assert absent[-1] == "not recorded"


@pytest.mark.parametrize(
    "successes, expected", [((0.2, 0.6, 1.0), 15.0), ((0.9, 0.1, 0.1), 0.0), ((0.2, 0.8, 0.3), 10.0), ((0.1, 0.2, 0.3), None)]
)
def test_the_updates_until_a_success_lie_on_the_line_between_evaluations(successes, expected):
    curve = tuple(Point(update=10 * i, cpu_s=0.0, success=success) for i, success in enumerate(successes))
    found = updates_to(a_run("tight", "exact", 0, successes[-1], curve=curve), 0.8)
    assert found == pytest.approx(expected) if expected is not None else found is None


@pytest.mark.parametrize("base", METHODS)
def test_a_loss_over_a_methods_policies_sets_what_the_method_sets_and_the_loss(base):
    assert find_method(f"masked_is@{base}").settings == {**find_method(base).settings, "objective.loss": "masked_is"}


@pytest.mark.parametrize("name", ["masked_is@", "magic@exact", "masked_is@magic", "exact@masked_is", ""])
def test_an_unknown_loss_or_method_is_refused_with_the_known_ones(name):
    with pytest.raises(ConfigError, match="unknown method"):
        find_method(name)
