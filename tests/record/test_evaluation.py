"""What an evaluation comes to, and what two of them differ by."""

from dataclasses import asdict, replace
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oldlogits.record.episodes import EpisodeSegment
from oldlogits.record.evaluation import (
    EvaluatedEpisode,
    EvaluationSummary,
    Figures,
    compare,
    failures_of,
    read_evaluation,
    read_summary,
    subsets_of,
)
from oldlogits.record.intervals import mean_interval, paired_gain, wilson
from oldlogits.record.jsonl import LineFile, RecordError, encode
from oldlogits.record.trials import avg_at_k, pass_at_k


def episode(row, reward, *, repeat=0, subset="", failure=""):
    said = EpisodeSegment(kind="sampled", text="it is done\n" + "word " * 40, num_tokens=3, version=0)
    return EvaluatedEpisode(
        id=f"eval.{row}",
        row=row,
        repeat=repeat,
        subset=subset,
        task=f"task {row}",
        reward=reward,
        failure=failure,
        stop_reason="" if reward is None else "done",
        num_turns=1,
        branches=() if reward is None else ((EpisodeSegment(kind="context", text="hello", num_tokens=1), said),),
    )


def written(out, episodes, *, success_at=1.0, subset=""):
    """The folder of an evaluation with these episodes."""
    out.mkdir()
    with LineFile(out / "episodes.jsonl") as file:
        for one in episodes:
            file.append(asdict(one))
    rows = {one.row for one in episodes}
    summary = EvaluationSummary(
        model="m",
        target="desk",
        mode="sampled",
        success_at=success_at,
        num_rows=len(rows),
        repeats=1,
        num_episodes=len(episodes),
        all=Figures.of(episodes, success_at),
        subset=subset,
        subsets=subsets_of(episodes, success_at),
        failures=failures_of(episodes),
        seconds_s=1.0,
    )
    summary.write(out)
    return out


def test_without_repeats_a_success_rate_has_wilsons_interval_and_the_mean_reward_its_own():
    rewards = [0.0, 0.5, 1.0, 2.0]
    found = Figures.of([episode(row, reward) for row, reward in enumerate(rewards)], success_at=0.5)
    assert (found.success, found.reward) == (wilson(3, 4), mean_interval(rewards))


def test_a_failed_episode_counts_in_no_rate_and_is_counted_by_its_reason():
    failed = "reset: KeyError: 'a'"
    episodes = [episode(0, 1.0), episode(1, None, failure=failed), episode(2, None, failure=failed)]
    found = Figures.of(episodes, success_at=1.0)
    assert (found.success.mean, found.num_played, found.num_failed) == (1.0, 1, 2)
    assert failures_of(episodes) == {failed: 2}
    nothing = Figures.of(episodes[1:], success_at=1.0)
    assert (nothing.success, nothing.reward, nothing.num_failed) == (None, None, 2)


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=5), min_size=1, max_size=30))
def test_repeats_of_a_row_are_no_independent_tasks(hits):
    found, num = avg_at_k(hits, 1), sum(map(len, hits))
    assert found.mean == pytest.approx(fmean(fmean(row) for row in hits))
    assert 0 <= found.low <= found.mean + 1e-12
    assert found.mean - 1e-12 <= found.high <= 1
    width = found.high - found.low
    twice = avg_at_k([row * 2 for row in hits], 2)
    assert twice.high - twice.low == pytest.approx(width) or num > len(hits), "the same row again adds nothing"
    if num == len(hits):
        assert found == wilson(sum(map(sum, hits)), num)


def test_repeated_rows_have_pass_at_k_over_those_that_were_played_so_often():
    rewards = {0: [1.0, 0.0, 1.0], 1: [0.0, 0.0, 0.0], 2: [1.0, 0.0, None]}
    episodes = [episode(row, reward, repeat=i) for row, found in rewards.items() for i, reward in enumerate(found)]
    found = Figures.of(episodes, success_at=1.0, repeats=3)
    whole, every = [[True, False, True], [False] * 3], [[True, False, True], [False] * 3, [True, False]]
    assert found.success == avg_at_k(every, 1)
    assert found.pass_at == {"2": pass_at_k(every, 2), "3": pass_at_k(whole, 3)}
    assert (found.pass_at["3"].mean, found.num_whole) == (0.5, 2)
    once = Figures.of(episodes[:1], success_at=1.0)
    assert (once.pass_at, once.num_whole) == ({}, 1)


def test_one_value_has_no_interval_and_says_so():
    found = Figures.of([episode(0, 0.5)], success_at=1.0)
    assert found.reward.plain == "0.500 (no interval)"
    assert paired_gain([0.0], [1.0]).points == "+100.0 (no interval)"
    assert paired_gain([0.0, 0.0], [0.5, 0.5]).change == "+0.500 [+0.500, +0.500]"


def test_rows_that_always_or_never_succeed_still_leave_room_for_chance():
    assert avg_at_k([[True] * 8] * 3, 8).low == pytest.approx(wilson(3, 3).low)
    assert avg_at_k([[False] * 8] * 3, 8).high == pytest.approx(wilson(0, 3).high)


def test_subsets_are_added_up_by_themselves():
    episodes = [episode(0, 1.0, subset="air"), episode(1, 0.0, subset="sea"), episode(2, 1.0, subset="sea")]
    found = subsets_of(episodes, success_at=1.0)
    assert {name: figures.success.mean for name, figures in found.items()} == {"air": 1.0, "sea": 0.5}


def test_an_evaluation_is_read_back_as_it_was_written(tmp_path):
    episodes = [episode(0, 1.0, subset="air"), episode(1, None, failure="look: timed out")]
    out = written(tmp_path / "a", episodes, subset="mode")
    assert list(read_evaluation(out)) == episodes
    summary = read_summary(out)
    assert summary.subsets["air"].success == wilson(1, 1)
    assert summary.failures == {"look: timed out": 1}
    assert "nan" not in encode({"mean": summary.all.reward.mean})


def test_a_comparison_pairs_the_rows_that_both_played_each_by_the_mean_of_its_repeats(tmp_path):
    first = [episode(0, 0.0), episode(0, 1.0, repeat=1), episode(1, 0.0), episode(2, 1.0), episode(3, None, failure="x")]
    second = [episode(0, 1.0), episode(1, 1.0), episode(2, 0.5), episode(3, 1.0)]
    found = compare(written(tmp_path / "a", first), written(tmp_path / "b", second))["all"]
    assert found.success == paired_gain([0.5, 0.0, 1.0], [1.0, 1.0, 0.0])
    assert found.reward == paired_gain([0.5, 0.0, 1.0], [1.0, 1.0, 0.5])
    assert found.num_left_out == 1


def test_evaluations_of_other_tasks_or_of_another_measure_are_not_compared(tmp_path):
    a = written(tmp_path / "a", [episode(0, 1.0)])
    other = written(tmp_path / "b", [replace(episode(0, 1.0), task="another")])
    with pytest.raises(RecordError, match="of other tasks"):
        compare(a, other)
    with pytest.raises(RecordError, match="call different things a success"):
        compare(a, written(tmp_path / "c", [episode(0, 1.0)], success_at=0.5))
    with pytest.raises(RecordError, match="cannot be read"):
        compare(a, tmp_path / "gone")


def test_a_transcript_fits_80_columns_and_says_who_spoke():
    lines = episode(3, 0.25).transcript().splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[1] == "eval.3: row 3, repeat 0, reward 0.25, done"
    assert [line.split(" |")[0] for line in lines if "|" in line][:3] == ["     ", "agent", "     "]
