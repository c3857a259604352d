"""The summary is what the events add up to, of a whole run, a resumed one, and one that was cut off."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from oldlogits.record.events import (
    BatchScored,
    CheckpointWritten,
    Evaluated,
    Probed,
    RunEnded,
    RunStarted,
    ServerDown,
    ServerUp,
    TrajectoryFailed,
    TrajectoryRestarted,
    Updated,
    VersionPublished,
    WeightsUpdated,
)
from oldlogits.record.summary import Summary, summarise
from tests.memory_log import MemoryLog

START = RunStarted(
    version=0, variant="ppo_clip", r_d="1", r_s="theta/old", corrects_mismatch=False, source="snapshot", runtime="lockstep",
    seed=3, denominator="token-mean", band=1.5, eps_low=0.2, eps_high=0.2, truncation=None, max_staleness=2, group_size=4,
    prompts_per_update=2, model="tiny", num_parameters=1000, num_trained=100, numerics="fp32",
)  # fmt: skip


def updated(version, lags, *, provenance="exact", trained=4, several=0.0, **metrics):
    found = {"mask/rho": 1.0, "mask/num_nonfinite": 0.0, "episode/num": trained, "episode/multi_version": several}
    return Updated(
        version=version,
        metrics=found | {name.replace("__", "/"): value for name, value in metrics.items()},
        staleness_counts=lags,
        provenance={provenance: sum(lags.values())},
    )


TWO = (
    updated(1, {"0": 3, "2": 1}, several=0.25, mask__rho=0.5, mask__num_nonfinite=1.0,
            ratio__log_r_d_abs_mean=0.2, ratio__log_r_d_abs_max=0.6, copies__trainer=2.5, copies__engine=5),
    updated(2, {"1": 12}, trained=8, several=1.0, provenance="mixed_kv", mask__num_nonfinite=2.0,
            ratio__log_r_d_abs_mean=0.1, ratio__log_r_d_abs_max=0.3, copies__trainer=3.25, copies__engine=2),
)  # fmt: skip


def summary_of(*events) -> Summary:
    log = MemoryLog()
    for event in events:
        log.emit(event)
    return summarise(log.events)


def test_updates_add_up_tokens_weighing_means_and_updates_weighing_shares():
    summary = summary_of(START, *TWO)
    assert (summary.num_updates, summary.num_trajectories, summary.num_multi_version_trajectories) == (2, 12, 9)
    assert summary.staleness_mean == pytest.approx((2 * 1 + 1 * 12) / 16)
    assert summary.staleness_max == 2
    assert summary.provenance == {"exact": 4, "mixed_kv": 12}
    assert summary.num_dropped_nonfinite == 3
    assert summary.log_r_d_mean_abs == pytest.approx((4 * 0.2 + 12 * 0.1) / 16)
    assert summary.log_r_d_max_abs == 0.6
    assert summary.rho_mean == pytest.approx(0.75)
    assert (summary.trainer_copies_max, summary.engine_copies_max) == (3.25, 5)


def test_what_was_never_measured_is_none_not_zero():
    for summary in (summary_of(), summary_of(START)):
        for name in (
            *("staleness_mean", "staleness_max", "log_r_d_mean_abs", "log_r_d_max_abs", "rho_mean", "probe_max_abs_error"),
            *("consistency_publish_max_abs_error", "consistency_lag0_max_abs_error", "engine_idle_share", "trainer_idle_share"),
            *("success_before", "success_after", "greedy_before", "greedy_after", "gain", "ended"),
            *("trainer_copies_max", "engine_copies_max", "version_bytes_mean", "sync_bytes_mean", "switch_mean_s"),
        ):
            assert getattr(summary, name) is None, name


def test_the_worst_probe_and_the_worst_consistency_check_are_kept_and_nan_is_none():
    probe = Probed(
        version=0, max_abs_error=0.25, mean_abs_error=0.0, num_tokens=8, num_above=0,
        consistency_publish_max_abs_error=math.nan, consistency_lag0_max_abs_error=math.nan,
    )  # fmt: skip
    later = replace(probe, version=1, max_abs_error=0.125, consistency_publish_max_abs_error=1e-7)
    summary = summary_of(START, probe, later)
    assert summary.probe_max_abs_error == 0.25
    assert (summary.consistency_publish_max_abs_error, summary.consistency_lag0_max_abs_error) == (1e-7, None)


def evaluated(stage, mode, rewards, mean, success_at=1.0):
    return Evaluated(
        version=0,
        stage=stage,
        mode=mode,
        mean=mean,
        low=0.0,
        high=1.0,
        reward_mean=2 * mean,
        reward_low=0.0,
        reward_high=2.0,
        success_at=success_at,
        num_episodes=len(rewards),
        rewards=rewards,
        seconds_s=1.0,
    )


def test_success_is_a_reward_of_1_and_the_gain_pairs_the_episodes_that_both_evaluations_played():
    before = evaluated("before", "sampled", [0.0, 0.99, 1.0, 0.0, 1.0], 0.4)
    after = evaluated("after", "sampled", [1.0, 1.0, 2.0, 0.0], 0.75)
    summary = summary_of(START, before, after, evaluated("after", "greedy", [1.0], 1.0))
    assert (summary.success_before.mean, summary.success_after.mean, summary.greedy_after.mean) == (0.4, 0.75, 1.0)
    assert (summary.gain.mean, summary.gain.num_episodes) == (0.5, 4)
    assert summary.greedy_before is None


def test_what_counts_as_a_success_is_the_evaluations_own_and_the_mean_reward_is_paired_as_well():
    before = evaluated("before", "sampled", [0.25, 0.5, 0.75], 0.5, success_at=0.5)
    after = evaluated("after", "sampled", [0.5, 0.5, 1.0], 0.75, success_at=0.5)
    summary = summary_of(START, before, after)
    assert summary.success_at == 0.5
    assert summary.gain.mean == pytest.approx(1 / 3)
    assert (summary.reward_before.mean, summary.reward_after.mean) == (1.0, 1.5)
    assert summary.reward_gain.mean == pytest.approx(0.5 / 3)


def test_rows_that_failed_in_one_of_two_evaluations_are_left_out_of_the_gain():
    before = replace(evaluated("before", "sampled", [0.0, None, 1.0, 0.0], 1 / 3), num_episodes=3)
    after = replace(evaluated("after", "sampled", [1.0, 1.0, None, 0.0], 2 / 3), num_episodes=3)
    nothing = replace(evaluated("after", "greedy", [None, None], math.nan), num_episodes=0)
    summary = summary_of(START, before, after, nothing)
    assert (summary.gain.mean, summary.gain.num_episodes) == (0.5, 2)
    assert (summary.greedy_after, summary.num_evaluation_episodes) == (None, 10)


def test_failures_are_summed_by_reason_those_of_evaluations_apart():
    def failed(stage, reason):
        return TrajectoryFailed(version=0, trajectory="a", stage=stage, reason=reason)

    told = [failed("train", f"look: KeyError: {n}") for n in range(3)] + [failed("before", "reset: timed out after 2 s")]
    summary = summary_of(START, *told)
    assert (summary.failures, summary.evaluation_failures) == ({"look: KeyError: 0": 3}, {"reset: timed out after 2 s": 1})


def test_idle_shares_weigh_updates_by_their_seconds():
    shares = {"idle/engine_share": 0.5, "idle/trainer_share": 0.0, "time/update_s": 3.0}
    one = replace(TWO[0], metrics=TWO[0].metrics | shares)
    two = replace(TWO[1], metrics=TWO[1].metrics | shares | {"idle/engine_share": 0.1, "time/update_s": 1.0})
    summary = summary_of(START, one, two)
    assert summary.engine_idle_share == pytest.approx((3 * 0.5 + 1 * 0.1) / 4)
    assert (summary.trainer_idle_share, summary.train_wall_s) == (0.0, 4.0)


def test_stored_versions_are_counted_without_the_first_of_each_start_and_divided_by_what_is_trained():
    def published(version, version_bytes):
        return VersionPublished(
            version=version, bytes=900, version_bytes=version_bytes, full_bytes=200, changed=0.5, store_s=0.1, seconds_s=0.2
        )

    summary = summary_of(START, published(0, 200), published(1, 50), published(2, 30))
    assert summary.version_bytes_mean == 40
    assert summary.version_share_of_copy == pytest.approx(80 / 400)
    assert summary.version_share_of_average == pytest.approx(80 / (2 * 4 * 100)), "an average of the 100 trained of 1,000"
    again = replace(START, version=1, num_kept=3)
    summary = summary_of(
        START, published(0, 200), published(1, 50), published(2, 30), again, published(1, 200), published(2, 10)
    )
    assert summary.version_bytes_mean == 30, "50 and 10; the second copy of version 1 is the resident one"


def test_updates_of_the_engines_weights_and_switches_are_means():
    sent = WeightsUpdated(version=0, sent="full", bytes=400, refused="", pause_s=0.1, load_s=0.1, stall_s=0.1)
    patch, refused = replace(sent, version=1, sent="patch", bytes=40), replace(sent, version=2, bytes=460, refused="behind")
    scored = BatchScored(
        version=1, policy="old", num_switches=1, versions=[0], read_tokens=9, num_checkouts=3, switch_s=0.6, check_s=0.1,
        seconds_s=1.0,
    )  # fmt: skip
    summary = summary_of(START, sent, patch, refused, scored)
    assert (summary.num_patch_syncs, summary.num_full_syncs, summary.num_refused_patches) == (1, 2, 1)
    assert summary.sync_bytes_mean == 300
    assert summary.switch_mean_s == pytest.approx(0.2)


def test_servers_that_fail_are_counted_and_tokens_of_those_that_leave_too():
    down = ServerDown(
        version=0, server="a", reason="it died", num_requests=1, num_kept_tokens=1, num_lost_tokens=3, is_failure=True
    )
    summary = summary_of(
        START,
        down,
        ServerUp(version=0, server="a", reason="started again"),
        replace(down, num_lost_tokens=4, is_failure=False),
        replace(down, server="b", num_lost_tokens=None),
    )
    assert (summary.num_servers_down, summary.num_lost_tokens) == (2, 7)


def test_tokens_of_episodes_that_begin_again_are_lost_tokens():
    again = TrajectoryRestarted(version=0, trajectory="g000000.1", reason="it answered otherwise", num_lost_tokens=5)
    summary = summary_of(START, again, replace(again, trajectory="g000003.0", num_lost_tokens=6))
    assert (summary.num_servers_down, summary.num_lost_tokens) == (0, 11)


ACCOUNT = {"submitted": 10, "trained": 4, "filtered": 1, "failed": 2, "cancelled": 3, "queued": 0, "running": 0}


def test_the_summary_tells_what_ran_and_the_whole_account():
    summary = summary_of(START, RunEnded(version=0, reason="interrupted", error="", accounting=ACCOUNT))
    assert (summary.variant, summary.source, summary.runtime, summary.seed) == ("ppo_clip", "snapshot", "lockstep", 3)
    assert (summary.ended, summary.accounting) == ("interrupted", ACCOUNT)


def test_the_account_of_a_run_that_was_cut_off_is_that_of_its_last_update():
    account = {f"accounting/{name}": num for name, num in ACCOUNT.items() if name not in ("queued", "running")}
    update = replace(
        TWO[0], metrics=TWO[0].metrics | account | {"accounting/cancelled": 0, "queue/queued": 2, "queue/running": 1}
    )
    killed = summary_of(START, update)
    assert (killed.ended, killed.accounting) == (None, ACCOUNT | {"cancelled": 0, "queued": 2, "running": 1})
    cut_off = summary_of(START, update, RunEnded(version=-1, reason="interrupted", error="", accounting=None))
    assert (cut_off.ended, cut_off.accounting) == ("interrupted", ACCOUNT), "what was outstanding counts as cancelled"


def test_no_token_of_an_abandoned_line_of_history_is_counted():
    scored = BatchScored(
        version=1, policy="old", num_switches=1, versions=[0], read_tokens=9, num_checkouts=1, switch_s=9.0, check_s=0.0,
        seconds_s=1.0,
    )  # fmt: skip
    abandoned = (CheckpointWritten(version=1, path="checkpoints/v000001", bytes=1, stall_s=0.0, seconds_s=0.0), scored, TWO[1])
    again = replace(START, version=1, num_kept=2)
    ended = RunEnded(version=2, reason="done", error="", accounting=ACCOUNT)
    summary = summary_of(START, TWO[0], *abandoned, again, replace(scored, switch_s=1.0), updated(2, {"1": 5}), ended)
    assert summary.provenance == {"exact": 9}
    assert (summary.num_updates, summary.num_trajectories, summary.switch_mean_s) == (2, 8, 1.0)
    assert summary.ended == "done"
