from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from oldlogits.record.events import Evaluated, GroupClosed, ServerUp, TrajectoryFailed, TrajectoryRestarted, Updated, Warned
from oldlogits.record.intervals import Interval
from oldlogits.record.live.conclusion import exactness_sentences, learned_sentence, next_lines, print_summary
from oldlogits.record.live.view import LiveView, sparkline
from oldlogits.record.summary import Summary

METRICS = {"reward/mean": 0.5, "reward/success": 0.25, "mask/rho": 0.97, "staleness/mean": 1.5, "staleness/max": 4.0}


def test_without_a_terminal_there_is_one_plain_line_an_update_and_one_a_note():
    out = io.StringIO()
    with LiveView(total_updates=3, title="t", console=Console(file=out, width=40)) as view:
        view.update(METRICS, version=1)
        view.note("checkpoint [bold] v000001")
        view.show({"eval/mean": 0.4})
        view.update({"reward/mean": float("nan")}, version=2)
    assert out.getvalue().splitlines() == [
        "update 1/3  reward 0.500  success 0.250  rho 0.970  staleness 1.50  max 4",
        "checkpoint [bold] v000001",
        "update 2/3  reward nan",
    ]


def test_on_a_terminal_the_panel_holds_the_latest_values_within_80_columns():
    out = io.StringIO()
    console = Console(file=out, width=80, height=30, force_terminal=True, color_system=None)
    with LiveView(total_updates=10, title="desk [x]", console=console) as view:
        view.update(METRICS, version=1)
        view.update(METRICS | {"reward/mean": 0.75}, version=2)
        view.show({"queue/running": 12.0, "queue/queued": 3.0, "queue/admission_open": 0.0, "probe/max_abs_error": 3e-6})
    last = out.getvalue()[out.getvalue().rindex("╭") :]
    assert max(len(line) for line in last.splitlines()) <= 80
    for text in (
        "desk [x]",
        "update 2/10",
        "0.750  ▁█",
        "mean 1.50  max 4",
        "12 running  3 queued  admission closed",
        "probe 3.0e-06",
    ):
        assert text in last


def updated(version, **metrics):
    found = METRICS | {name.replace("__", "/"): value for name, value in metrics.items()}
    return Updated(version=version, metrics=found, staleness_counts={})


def test_the_speed_beside_an_evaluation_is_that_of_the_engine_while_it_samples():
    """What it sampled ahead during an evaluation leaves it idle in the update after: 100 tokens in 50 s, 0.04 s of it busy."""
    out = io.StringIO()
    rate = {"throughput__engine_tokens_per_s": 2.0, "throughput__engine_busy_tokens_per_s": 2500.0}
    with LiveView(total_updates=2, title="t", console=Console(file=out, width=200)) as view:
        view.emit(updated(1, **rate))
        view.emit(updated(2, throughput__engine_tokens_per_s=0.0))
    first, second = out.getvalue().splitlines()
    assert first.endswith("engine 2,500 tokens/s")
    assert "tokens/s" not in second, "an engine that sampled nothing has no speed"


REWARD = {"reward_mean": 0.375, "reward_low": 0.125, "reward_high": 0.625, "success_at": 0.5}


def test_what_happens_between_updates_is_one_line_each():
    out = io.StringIO()
    rate = {"mean": 0.5, "low": 0.25, "high": 0.75, "num_episodes": 4, "rewards": [1.0, 0.0] * 2, "seconds_s": 2.0, **REWARD}
    with LiveView(total_updates=2, title="t", console=Console(file=out, width=200)) as view:
        view.emit(Evaluated(version=0, stage="before", mode="greedy", **rate))
        view.emit(Warned(version=0, name="a", message="look", figures={}))
        view.emit(ServerUp(version=0, server="http://a", reason="started again"))
    assert out.getvalue().splitlines() == [
        "held-out success before training, greedy: 50.0% [25.0%, 75.0%] of 4, 2 s",
        "  mean reward 0.375 [0.125, 0.625]; a success is a reward of 0.5 or more",
        "warning: look",
        "server http://a is up: started again",
    ]


def failed(reason, *, stage="train"):
    return TrajectoryFailed(version=0, trajectory="g000000.0", stage=stage, reason=reason)


def closed(*rewards, num_failed):
    return GroupClosed(version=0, group="g0", rewards=rewards, oldest_version=0, num_failed=num_failed, filtered=False)


def test_the_first_failure_of_each_kind_is_told_and_every_line_of_an_update_counts_them():
    out = io.StringIO()
    with LiveView(total_updates=2, title="t", console=Console(file=out, width=200)) as view:
        for number in range(3):
            view.emit(failed(f"get_reward: ValueError: judge {number} is down"))
        view.emit(failed("look: timed out after 2 s", stage="before"))
        view.emit(closed(1.0, 0.0, 0.0, num_failed=3))
        view.emit(updated(1, reward__mean=0.5))
        panel = io.StringIO()
        Console(file=panel, width=120).print(view._panel())
    assert out.getvalue().splitlines() == [
        "an episode failed: get_reward: ValueError: judge 0 is down",
        "a held-out episode failed: look: timed out after 2 s",
        "update 1/2  reward 0.500  success 0.250  rho 0.970  staleness 1.50  max 4  failed 3 of 6",
    ]
    assert "3 of  6 episodes:  3 x get_reward: ValueError: judge 0 is down" in panel.getvalue()


def test_the_first_episode_that_begins_again_of_every_reason_is_told():
    out = io.StringIO()
    with LiveView(total_updates=2, title="t", console=Console(file=out, width=200)) as view:
        for name in ("g000000.0", "g000000.1"):
            view.emit(TrajectoryRestarted(version=1, trajectory=name, reason="it answered otherwise", num_lost_tokens=3))
    assert out.getvalue().splitlines() == ["an episode begins again: it answered otherwise"]


def test_an_evaluation_with_failures_says_how_many_of_its_rows_were_played():
    out = io.StringIO()
    rate = {"mean": 0.5, "low": 0.25, "high": 0.75, "num_episodes": 2, "rewards": [1.0, None, 0.0], "seconds_s": 2.0, **REWARD}
    none = rate | {"mean": math.nan, "num_episodes": 0, "rewards": [None, None]}
    with LiveView(total_updates=2, title="t", console=Console(file=out, width=200)) as view:
        view.emit(Evaluated(version=3, stage="during", mode="sampled", **rate))
        view.emit(Evaluated(version=0, stage="after", mode="greedy", **none))
    assert out.getvalue().splitlines() == [
        "held-out success at version 3, sampled: 50.0% [25.0%, 75.0%] of 2 played; 1 of 3 rows failed, 2 s",
        "  mean reward 0.375 [0.125, 0.625]; a success is a reward of 0.5 or more",
        "held-out success after training, greedy: of 0 played; 2 of 2 rows failed, 2 s",
    ]


@pytest.mark.parametrize(
    "values, expected",
    [([], ""), ([2.0, 2.0], "▁▁"), ([0.0, 1.0, 0.5, float("nan")], "▁█▅"), ([float(i) for i in range(100)], None)],
)
def test_a_sparkline_spans_its_values_and_skips_what_is_not_finite(values, expected):
    drawn = sparkline(values)
    assert drawn == expected if expected is not None else (len(drawn), drawn[0], drawn[-1]) == (24, "▁", "█")


@pytest.mark.parametrize(
    "low, high, verdict", [(0.01, 0.2, "better"), (-0.2, -0.01, "worse"), (-0.1, 0.2, "no difference beyond chance")]
)
def test_the_verdict_follows_from_the_interval_of_the_gain(fake_run, low, high, verdict):
    summary = Summary.read(fake_run(1) / "summary.json")
    gain = Interval(mean=(low + high) / 2, low=low, high=high, num_episodes=20)
    assert learned_sentence(replace(summary, gain=gain)).endswith(f"on the same 20 episodes, {verdict}.")


def test_the_summary_says_what_was_not_measured_and_where_the_report_is(fake_run):
    run = fake_run(1)
    out = io.StringIO()
    summary = replace(Summary.read(run / "summary.json"), success_before=None, success_after=None, ended="interrupted")
    print_summary(summary, Path("out"), console=Console(file=out, width=80))
    text = out.getvalue()
    assert "Held-out success was not measured." in text
    assert "ended early (interrupted)" in text
    assert "out/report.html" in text
    assert "100.0% exact" in text


def test_the_summary_tells_the_three_parts_of_exactness_as_far_as_they_were_measured(fake_run):
    measured = {
        "num_digests": 1234,
        "consistency_lag0_max_abs_error": 0.0,
        "packing_mean_abs_error": 6.8e-5,
        "packing_max_abs_error": 1.7e-3,
    }
    summary = replace(Summary.read(fake_run(1) / "summary.json"), **measured)
    assert list(exactness_sentences(summary)) == [
        "Exactness: weights bit-exact (1,234 checkouts by digest), lag-0 error 0, packing noise 6.8e-05 on average and 0.0017 "
        "at most, in nats."
    ]
    lag0 = replace(summary, num_digests=0, packing_max_abs_error=None)
    assert list(exactness_sentences(lag0)) == ["Exactness: lag-0 error 0."]
    assert not list(exactness_sentences(replace(summary, num_digests=0, consistency_lag0_max_abs_error=None)))


def test_a_run_ends_with_lines_to_copy_and_one_without_a_checkpoint_has_no_agent_to_watch(fake_run):
    path = fake_run(1)
    without = next_lines(path)
    assert [line.split("  oldlogits ")[1].split()[0] for line in without] == ["watch", "train"]
    (path / "checkpoints/v000001/model").mkdir(parents=True)
    (path / "checkpoints/v000001/state").mkdir()
    assert f"oldlogits play {path} --model {path}" in " ".join(next_lines(path))
    spaced = path.parent / "a run"
    path.rename(spaced)
    assert f"oldlogits watch '{spaced}'" in next_lines(spaced)[0], "the shell reads it as one word"
