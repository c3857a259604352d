"""Plans are drawn from a seed, and a ledger counts what is missing at the end; both with numbers done by hand."""

import pytest

from benchmarks.kills.__main__ import line, share_lost, share_restarted, table
from benchmarks.kills.ledger import Loss, Snapshot, episodes_of, losses
from benchmarks.kills.results import Result, append, missing, read
from benchmarks.kills.trials import KINDS, MOMENTS, STRIKES, Trial, plans
from oldlogits.core.trajectory import Context, Sampled
from oldlogits.rollout.journal.records import Admitted, Ended, Grew, LeftOut, Restarted, Running


def sampled(*token_ids, version=0):
    return Sampled(token_ids=token_ids, logp_mu=(-0.5,) * len(token_ids), version=version, kv="fresh", temperature=1.0)


PROMPT = Context(token_ids=(1, 1, 1))
ADMITTED = Admitted(group="g000000", row=0, version=0, size=2)
GREW = Grew(episode="g000000.0", start=0, segments=(PROMPT, sampled(5, 6)))
READ = Grew(episode="g000000.0", start=2, segments=(Context(token_ids=(2,)),))
HALF = Running(episode="g000000.0", num_segments=3, start=0, sampled=(sampled(7, version=1),))


def snapshot(*records, trained=None, checkpoint=0):
    return Snapshot(episodes=episodes_of(records), trained=trained or {}, checkpoint=checkpoint)


def test_a_seed_plans_so_many_trials_and_the_same_ones_again():
    planned = plans(50, 3, list(KINDS), MOMENTS)
    assert sum(len(plan.trials) for plan in planned) == 50
    assert planned == plans(50, 3, list(KINDS), MOMENTS) != plans(50, 4, list(KINDS), MOMENTS)
    assert all(len(plan.trials) <= STRIKES for plan in planned)


def test_no_first_trial_is_in_a_resume_and_no_later_one_in_a_warm_start():
    for plan in plans(400, 0, list(KINDS), MOMENTS):
        assert plan.trials[0].moment != "resume"
        assert "warm start" not in [trial.moment for trial in plan.trials[1:]]
        assert all(KINDS[trial.kind].setup == plan.setup or trial.moment == "warm start" for trial in plan.trials)


def test_an_episode_is_what_its_records_add_up_to():
    episode = episodes_of([ADMITTED, GREW, READ, HALF])["g000000.0"]
    assert episode.tokens == {3: (5, 0), 4: (6, 0), 6: (7, 1)}
    assert (episode.length, episode.samples) == (7, True)
    assert not episodes_of([ADMITTED, GREW])["g000000.0"].samples, "its environment runs"
    assert episodes_of([ADMITTED, GREW, Restarted(episode="g000000.0", version=0, reason="", num_lost_tokens=0)]) == {}
    left_out = LeftOut(group="g000000", version=0, rewards=(0.0, 0.0), oldest_version=0, num_failed=0)
    assert episodes_of([ADMITTED, GREW, left_out]) == {}


def test_what_the_end_has_not_is_lost_and_a_half_turn_counts_as_what_was_sampled_in_its_place():
    struck = snapshot(ADMITTED, GREW, READ, HALF, trained={1: {"g9.0": {3: (8, 0)}}}, checkpoint=1)
    end = {1: {"g9.0": {3: (8, 0)}}, 2: {"g000000.0": {3: (5, 0), 4: (6, 0), 6: (7, 1), 7: (9, 1), 8: (9, 1)}}}
    assert losses([struck], end, {}, 4) == [Loss(num_known=0, num_half_turns=2, num_sampled=4)]
    assert losses([struck], end, {}, 0)[0].num == 0
    assert losses([struck], end, {}, 4, {"g000000.0"})[0].num == 0, "of an episode that began again, nothing was half known"
    begun_again = {1: end[1], 2: {"g000000.0": {3: (5, 0), 4: (4, 1)}}}
    assert losses([struck], begun_again, {}, 4)[0].num_known == 2
    apart = losses([struck], begun_again, {}, 4, {"g000000.0"})[0]
    assert (apart.num, apart.num_restarted) == (0, 2), "what no run can carry on counts apart"


def test_a_token_that_two_strikes_saw_is_lost_once_and_by_the_last_of_them():
    struck = snapshot(ADMITTED, GREW)
    assert [loss.num_known for loss in losses([struck, struck], {}, {}, 4)] == [0, 2]
    assert [loss.num_known for loss in losses([struck, struck], {}, {"g000000.0": {3: (5, 0), 4: (6, 0)}}, 4)] == [0, 0]


def test_an_ended_member_that_is_missing_and_an_update_with_other_tokens_are_faults():
    struck = snapshot(ADMITTED, GREW, Ended(episode="g000000.0", reward=1.0, stop_reason="done"), trained={1: {}})
    (loss,) = losses([struck], {1: {"g000001.0": {3: (5, 0)}}}, {}, 4)
    assert loss.wrong == ("g000000.0, which had ended, was lost", "update 1 was made again with other tokens")


def test_lines_and_table_fit_80_columns_and_the_share_is_over_what_runs_had_sampled():
    kinds = [Trial(kind=kind, moment=moment, skipped=0, delay_s=0.0, pick=0.0) for kind in KINDS for moment in MOMENTS]
    loss = Loss(num_known=12, num_restarted=23, num_half_turns=34, num_sampled=46_000)
    results = [Result(run=0, trial=trial, came="began again", wrong=(), seconds_s=12.0, loss=loss) for trial in kinds]
    assert max(len(line(1000, 1000, result)) for result in results) <= 80
    lines = table(results)
    assert max(map(len, lines)) <= 80
    assert lines[1].split() == ["controller", "6", "0", "0", "6", "72", "204", "0.10%", "138"]
    assert (share_lost(results), share_restarted(results)) == (46 / 46_000, 23 / 46_000)


def test_results_that_were_kept_are_read_again_and_the_runs_that_are_missing_are_those_to_play(tmp_path):
    planned, path = plans(12, 3, list(KINDS), MOMENTS), tmp_path / "seed-3.jsonl"
    assert (read(path), missing(planned, [])) == ([], [0, 1, 2])
    loss = Loss(num_known=1, num_sampled=9, wrong=("a fault",))
    for run in (2, 0):
        played = [
            Result(run=run, trial=trial, came="resumed", wrong=("a fault",), seconds_s=1.5, loss=loss)
            for trial in planned[run].trials
        ]
        append(path, played)
        assert read(path)[-STRIKES:] == played
    path.write_bytes(path.read_bytes() + b'{"run": 1, "tri')
    assert missing(planned, read(path)) == [1]
    append(path, played[:1])
    assert read(path)[-2:] == [played[-1], played[0]]
    assert missing(planned[:1], read(path)) == []
    with pytest.raises(ValueError, match="had other trials"):
        missing(plans(12, 4, list(KINDS), MOMENTS), read(path))
