import dataclasses
import math
from dataclasses import asdict

import pytest

from oldlogits.config import RunConfig, config_from_table
from oldlogits.core.engine_stats import Incident
from oldlogits.loop.totals import Totals
from oldlogits.rollout.buffer import Buffer, TrajectoryCounts
from oldlogits.rollout.staleness import StalenessBound
from oldlogits.train.reports import ConsistencyErrors
from oldlogits.train.step import UpdateResult


def result(lags, *, rho=1.0, nonfinite=0, abs_mean=0.0, abs_max=0.0, provenance="exact"):
    metrics = {
        "mask/rho": rho,
        "mask/num_nonfinite": float(nonfinite),
        "ratio/log_r_d_abs_mean": abs_mean,
        "ratio/log_r_d_abs_max": abs_max,
    }
    return UpdateResult(
        metrics=metrics,
        staleness_counts=lags,
        provenance={provenance: sum(lags.values())},
        lag0_max_abs_error=0.0,
        table={},
    )


def summary_of(totals, config=None, consistency=None, ended="done", account=None):
    buffer = Buffer(StalenessBound(max_staleness=1, prompts_per_update=1), filter_uniform=False)
    buffer.account = account or TrajectoryCounts()
    return totals.summary(config or RunConfig(), buffer, consistency or ConsistencyErrors(), ended)


def two_updates():
    totals = Totals()
    totals.add_update(
        result({0: 3, 2: 1}, rho=0.5, nonfinite=1, abs_mean=0.2, abs_max=0.6), num_trajectories=4, num_multi_version=1
    )
    more = result({1: 12}, rho=1.0, nonfinite=2, abs_mean=0.1, abs_max=0.3, provenance="mixed_kv")
    totals.add_update(more, num_trajectories=8, num_multi_version=8)
    return totals


def test_updates_add_up_tokens_weighing_means_and_updates_weighing_shares():
    summary = summary_of(two_updates())
    assert (summary.num_updates, summary.num_trajectories, summary.num_multi_version_trajectories) == (2, 12, 9)
    assert summary.staleness_mean == pytest.approx((2 * 1 + 1 * 12) / 16)
    assert summary.staleness_max == 2
    assert summary.provenance == {"exact": 4, "mixed_kv": 12}
    assert summary.num_dropped_nonfinite == 3
    assert summary.log_r_d_mean_abs == pytest.approx((4 * 0.2 + 12 * 0.1) / 16)
    assert summary.log_r_d_max_abs == 0.6
    assert summary.rho_mean == pytest.approx(0.75)


def test_copies_of_the_weights_are_the_most_on_each_side():
    totals = two_updates()
    for trainer, engine in ((2.5, 2), (3.25, 5), (3.0, 3)):
        totals.add_copies(trainer, engine)
    summary = summary_of(totals)
    assert (summary.trainer_copies_max, summary.engine_copies_max) == (3.25, 5)


def test_what_was_never_measured_is_none_not_zero():
    summary = summary_of(Totals())
    for name in (
        *("staleness_mean", "staleness_max", "log_r_d_mean_abs", "log_r_d_max_abs", "rho_mean", "probe_max_abs_error"),
        *("witness_publish_max_abs_error", "witness_lag0_max_abs_error", "engine_idle_share", "trainer_idle_share"),
        *("success_before", "success_after", "greedy_before", "greedy_after", "gain"),
        *("trainer_copies_max", "engine_copies_max"),
    ):
        assert getattr(summary, name) is None, name


def test_the_worst_probe_is_kept_and_witnesses_are_shown():
    totals = Totals()
    for error in (0.25, 0.5, 0.125):
        totals.add_probe(error)
    summary = summary_of(totals, consistency=ConsistencyErrors(publish_max_abs_error=0.0, lag0_max_abs_error=1e-7))
    assert summary.probe_max_abs_error == 0.5
    assert (summary.witness_publish_max_abs_error, summary.witness_lag0_max_abs_error) == (0.0, 1e-7)


def test_success_is_a_reward_of_1_and_the_gain_pairs_episodes():
    totals = Totals(rewards={"before/sampled": [0.0, 0.99, 1.0, 0.0], "after/sampled": [1.0, 1.0, 2.0, 0.0]})
    summary = summary_of(totals)
    assert (summary.success_before.mean, summary.success_after.mean) == (0.25, 0.75)
    assert summary.gain.mean == 0.5
    assert summary.greedy_before is None


def test_idle_shares_are_of_the_wall_time_and_within_0_and_1():
    totals = Totals(train_wall_s=10.0, engine_busy_s=4.0, trainer_busy_s=11.0)
    summary = summary_of(totals)
    assert summary.engine_idle_share == pytest.approx(0.6)
    assert summary.trainer_idle_share == 0.0
    assert summary.train_wall_s == 10.0


def test_the_summary_tells_what_ran_and_the_whole_account():
    config = config_from_table({"variant": "ppo_clip", "seed": 3, "runtime": {"type": "lockstep"}})
    account = TrajectoryCounts(submitted=10, trained=4, filtered=1, failed=2, cancelled=3)
    summary = summary_of(Totals(), config, ended="interrupted", account=account)
    assert (summary.variant, summary.source, summary.runtime, summary.seed) == ("ppo_clip", "snapshot", "lockstep", 3)
    assert summary.ended == "interrupted"
    assert summary.accounting == {**asdict(account), "queued": 0, "running": 0}


def test_totals_that_were_written_are_read_as_they_were(tmp_path):
    totals = two_updates()
    totals.rewards["before/sampled"] = [0.0, 1.0]
    totals.account = {"submitted": 3}
    totals.next_row = 12
    totals.write(tmp_path / "totals.json")
    found = Totals.read(tmp_path / "totals.json")
    nan = {f.name for f in dataclasses.fields(Totals) if getattr(totals, f.name) != getattr(totals, f.name)}
    assert nan == {"probe_max_abs_error"}
    assert math.isnan(found.probe_max_abs_error)
    assert {k: v for k, v in asdict(found).items() if k not in nan} == {k: v for k, v in asdict(totals).items() if k not in nan}
    found.add_update(result({2: 1}), num_trajectories=1, num_multi_version=0)
    assert found.staleness_counts == {0: 3, 1: 12, 2: 2}


def test_servers_that_fail_are_counted_and_tokens_of_those_that_leave_too():
    totals = Totals()
    totals.add_incident(Incident(what="down", server="a", reason="it died", num_lost_tokens=3))
    totals.add_incident(Incident(what="up", server="a", reason="started again"))
    totals.add_incident(Incident(what="down", server="a", reason="it was asked to leave", num_lost_tokens=4, is_failure=False))
    totals.add_incident(Incident(what="down", server="b", reason="it does not count"))
    assert (totals.num_servers_down, totals.num_lost_tokens) == (2, 7)
