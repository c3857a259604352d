"""The cost of a route as read from recorded runs, against other accounts of the same work."""

import dataclasses

import numpy as np
import pyarrow.parquet as pq
import pytest

from oldlogits.core.errors import ConfigError, WorkerDiedError
from oldlogits.core.source import SOURCES
from oldlogits.record.jsonl import RecordError
from oldlogits.run.run import run
from studies.old_logits.measure.cost import HEADER, PRINTED, RouteCost, cost_table, measure_route, read_cost, route_config
from tests.runs import events_of, recipe

pytestmark = pytest.mark.slow

UPDATES, SKIPPED = 6, 2
AHEAD = ("dedicated", "interruption", "eager")


@pytest.fixture(scope="module")
def measured(tiny_folder, tmp_path_factory):
    """``measured(route)``: the folder of a short lockstep run, and its cost. Read only."""
    root, done = tmp_path_factory.mktemp("cost"), {}

    def of(route):
        if route not in done:
            # Every token is scored, and none of them is read once for several trajectories.
            sections = {"proximal": {"current_version": "scored"}, "trainer": {"layout": "packed"}}
            config = route_config(recipe(tiny_folder, num_updates=UPDATES, engine={"precision": "int8"}, **sections), route)
            done[route] = (root / route, measure_route(config, root / route))
        return done[route]

    return of


def of_kind(folder, kind):
    return [vars_of(event) for event in events_of(folder, kind)]


def vars_of(event):
    return {field.name: getattr(event, field.name) for field in dataclasses.fields(event)}


def metrics_of(folder):
    return [fields["metrics"] for fields in of_kind(folder, "update")]


@pytest.mark.parametrize("route", SOURCES.names)
def test_seconds_and_rates_are_those_of_the_updates_after_the_first_two(route, measured):
    folder, cost = measured(route)
    metrics = metrics_of(folder)[SKIPPED:]
    stored = [fields["store_s"] for fields in of_kind(folder, "published")][1 + SKIPPED :]
    scored = [fields["seconds_s"] for fields in of_kind(folder, "scored")][SKIPPED:] or [0.0] * len(metrics)
    score = [m["source/score_s"] for m in metrics] if route in AHEAD else scored
    wait = [m["source/wait_s"] for m in metrics] if route in AHEAD else scored
    keep = [seconds + m.get("average/take_in_s", 0) for seconds, m in zip(stored, metrics, strict=True)]
    assert (cost.route, cost.num_updates) == (route, UPDATES - SKIPPED)
    assert cost.score_s == pytest.approx(np.median(score))
    assert cost.wait_s == pytest.approx(np.median(wait))
    assert cost.keep_s == pytest.approx(np.median(keep))
    assert cost.extra_s == pytest.approx(np.median(np.add(wait, keep)))
    assert cost.stall_s == pytest.approx(np.median([m["time/stall_s"] for m in metrics]))
    assert cost.update_s == pytest.approx(np.median([m["time/update_s"] for m in metrics]))
    num_trained = (UPDATES - SKIPPED) * 3 * 4
    assert cost.trajectories_per_s == pytest.approx(num_trained / sum(m["time/update_s"] for m in metrics))
    if route == "none":
        assert (cost.hidden_share, cost.switch_s, cost.score_s, cost.forwards) == (None, None, 0, 0)
    elif route not in AHEAD:
        assert cost.hidden_share == 0, "every score is waited for"
    else:
        assert cost.hidden_share == pytest.approx(max(0, 1 - sum(wait) / sum(score)))


def test_forwards_are_counted_as_the_recorded_tokens_say(measured):
    """Batches in lockstep are the same under every route; arrival's forward pass reads each trajectory but its last tokens."""
    for route in SOURCES.names:
        folder, cost = measured(route)
        read, total = 0, sum(fields["num_tokens"] for fields in of_kind(folder, "batch")[SKIPPED:])
        for path in sorted((folder / "tokens").iterdir())[SKIPPED:]:
            table = pq.read_table(path, columns=["trajectory", "index", "version"]).to_pydict()
            ends = {}
            for trajectory, index, version in zip(*table.values(), strict=True):
                for key in (trajectory, (trajectory, version)):
                    ends[key] = max(ends.get(key, 0), index)  # the last token is predicted, not read
            whole = sum(end for key, end in ends.items() if isinstance(key, str))
            by_version = sum(end for key, end in ends.items() if not isinstance(key, str))
            passes = {"arrival": whole, "ewma": whole, "aged": 2 * whole, "rescore": 2 * whole, "none": 0}
            passes["balance"] = whole * len(set(table["version"]))
            read += passes.get(route, by_version)
        if route in AHEAD:  # they read some of these tokens in an update before: what is read by the end is the same
            every = [fields["read_tokens"] for fields in of_kind(measured("snapshot")[0], "scored")]
            assert sum(m["source/read_tokens"] for m in metrics_of(folder)) == sum(every) > 0
        else:
            assert cost.forwards == pytest.approx(read / total)


def test_what_is_stored_is_the_store_the_average_the_window_or_the_rounded_copy(measured):
    stored = {route: measured(route)[1].stored_bytes / measured(route)[1].weights_bytes for route in SOURCES.names}
    published = [fields["bytes"] for fields in of_kind(measured("snapshot")[0], "published")]
    weights_bytes = published[0]
    assert {measured(route)[1].weights_bytes for route in SOURCES.names} == {weights_bytes}
    assert stored["snapshot"] == max(published) / weights_bytes == pytest.approx(4, rel=0.05), (
        "window 2, the newest, and the one that is dropped: dense patches, each a copy and its table"
    )
    assert stored["eager"] == pytest.approx(2, rel=0.05)
    assert stored["dedicated"] == 2 + max(f["bytes"] for f in of_kind(measured("dedicated")[0], "published")) / weights_bytes
    assert {stored[route] for route in ("ewma", "aged", "rescore")} == {1}
    assert {stored[route] for route in ("interruption", "arrival", "none")} == {0}
    assert all(measured(route)[1].resident_copies == 1 + stored[route] for route in SOURCES.names)


def test_switches_are_those_that_the_source_tells_and_the_seconds_of_one_are_those_of_a_checkout(measured):
    for route in SOURCES.names:
        folder, cost = measured(route)
        scored, metrics = of_kind(folder, "scored")[SKIPPED:], metrics_of(folder)[SKIPPED:]
        switches = sum(fields["num_switches"] for fields in scored)
        assert cost.num_switches == switches / (UPDATES - SKIPPED)
        if switches:
            prefix, told = ("source/", metrics) if route in AHEAD else ("", scored)
            checkouts = sum(one[f"{prefix}num_checkouts"] for one in told)
            assert checkouts >= switches
            assert checkouts == switches or route in AHEAD or route == "rescore"
            assert cost.switch_s > 0
            assert cost.switch_s == pytest.approx(sum(one[f"{prefix}switch_s"] for one in told) / checkouts)
    assert (measured("arrival")[1].num_switches, measured("arrival")[1].switch_s) == (0, None), "the live weights score"
    assert measured("ewma")[1].num_switches == 1
    assert measured("snapshot")[1].num_switches == np.mean(
        [len(fields["versions"]) for fields in of_kind(measured("snapshot")[0], "scored")][SKIPPED:]
    )


def test_a_route_gets_the_variant_that_it_is_for_and_nothing_that_would_be_measured_with_it(tiny_folder):
    base = recipe(
        tiny_folder, variant="ppo_ewma", proximal={"source": "ewma", "reset": "paper"}, audit={"share": 0.5}, eval={"every": 2}
    )
    variants = {route: route_config(base, route).variant for route in SOURCES.names}
    exact = dict.fromkeys(("snapshot", *AHEAD), "decoupled_exact")
    assert variants == exact | {
        "arrival": "decoupled_async", "ewma": "ppo_ewma_train_infer", "aged": "aged_train_infer",
        "rescore": "rescore_train_infer", "balance": "mis_balance", "none": "ppo_clip_train_infer",
    }  # fmt: skip
    made = route_config(base, "ewma")
    assert (made.proximal.reset, made.audit.share, made.eval.num_episodes, made.eval.every) == ("none", 0, 0, 0)
    assert made.trainer == base.trainer


@pytest.mark.parametrize("more", [{"num_updates": 2}, {"num_updates": 9, "audit": {"share": 0.1}}])
def test_what_cannot_be_measured_is_refused_before_it_runs(more, tiny_folder, tmp_path):
    with pytest.raises(ConfigError, match="measured over the updates after the first two, without an audit"):
        measure_route(recipe(tiny_folder, **more), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_too_short_has_no_cost(tiny_folder, tmp_path):
    run(recipe(tiny_folder, num_updates=2), tmp_path / "short")
    with pytest.raises(RecordError, match="2 updates in"):
        read_cost(tmp_path / "short")


def test_a_run_that_failed_or_was_interrupted_is_not_measured(tiny_folder, tmp_path, monkeypatch):
    done = run(recipe(tiny_folder, num_updates=3), tmp_path / "run")
    summary = dataclasses.replace(done.summary, ended="interrupted")
    config = recipe(tiny_folder, num_updates=6)
    monkeypatch.setattr("studies.old_logits.measure.cost.run", lambda config, out: dataclasses.replace(done, summary=summary))
    with pytest.raises(RecordError, match=r"'snapshot' was not measured: its run was interrupted; got: 3 updates"):
        measure_route(config, tmp_path / "run")
    monkeypatch.setattr(
        "studies.old_logits.measure.cost.run",
        lambda config, out: dataclasses.replace(done, error=WorkerDiedError("the engine")),
    )
    with pytest.raises(WorkerDiedError, match="the engine"):
        measure_route(config, tmp_path / "run")


COST = RouteCost(
    route="snapshot", num_updates=10, weights_bytes=630_000, stored_bytes=2_520_000, resident_copies=5.0, num_switches=4.25,
    switch_s=0.00123, forwards=1.816, score_s=0.2, wait_s=0.2, keep_s=0.01, extra_s=0.2104, stall_s=0.0512,
    hidden_share=0.0, update_s=1.254, trajectories_per_s=101.26,
)  # fmt: skip


def test_the_table_has_the_papers_figures_below_ours():
    none = dataclasses.replace(COST, route="none", stored_bytes=0, num_switches=0.0, switch_s=None, hidden_share=None)
    header, *rows = cost_table([COST, none])
    assert header == HEADER
    assert rows == [
        ("snapshot", "2.52 MB", "5.0", "4.2", "1.23 ms", "1.82", "0.210", "0.051", "0%", "1.25", "101.3"),
        ("snapshot, paper, Qwen3-4B", "40.0 GB", "—", "—", "7.0 s", "—", "25", "—", "—", "—", "—"),
        ("snapshot, paper, Qwen3-30B-A3B", "76.4 GB", "—", "—", "14.2 s", "—", "150", "—", "—", "—", "—"),
        ("none", "0.00 MB", "5.0", "0.0", "—", "1.82", "0.210", "0.051", "—", "1.25", "101.3"),
    ]
    assert cost_table([]) == (HEADER,)
    assert cost_table([COST], printed=()) == (HEADER, tuple(rows[0]))


def test_the_printed_figures_are_the_papers():
    by_route = {(one.route, one.backbone): (one.switch_s, one.stored_bytes / 1e9, one.extra_s) for one in PRINTED}
    assert by_route == {
        ("snapshot", "Qwen3-4B"): (7, 40, 25), ("snapshot", "Qwen3-30B-A3B"): (14.2, 76.4, 150),
        ("ewma", "Qwen3-4B"): (7, 7.9, 8), ("ewma", "Qwen3-30B-A3B"): (14.2, 15.2, 34),
    }  # fmt: skip
