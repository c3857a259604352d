"""Whole runs whose environment fails, filters for ever, or goes elsewhere."""

from __future__ import annotations

import io
import os
import re
from pathlib import Path

import pytest
from rich.console import Console

from oldlogits.models.layout import decoder
from oldlogits.record.folder import RunFolder
from oldlogits.record.live.conclusion import print_summary
from oldlogits.record.summary import summarise_folder
from oldlogits.run.run import run

from ..runs import Words, check_accounting, events_of, recipe, summary_of

HERE = __name__


class FailingJudge(Words):
    """A judge that raises for half of the episodes."""

    num_judged = 0

    def get_reward(self):
        FailingJudge.num_judged += 1
        if FailingJudge.num_judged % 2:
            raise ValueError(f"the judge is down ({FailingJudge.num_judged})")
        return super().get_reward()


class RareJudge(Words):
    """A judge that raises for every fifth episode."""

    def get_reward(self):
        FailingJudge.num_judged += 1
        if FailingJudge.num_judged % 5 == 0:
            raise ValueError("the judge is down")
        return super().get_reward()


class Pleased(Words):
    """Every reward is the same."""

    def get_reward(self):
        return 1.0


class Wanderer(Words):
    """Changes the working directory in its tools' process."""

    def reset(self, start):
        os.chdir("/")
        return super().reset(start)


def played(tiny_folder, out, target, **sections):
    said = io.StringIO()
    env = {"target": f"{HERE}:{target}", **sections.pop("env", {})}
    result = run(recipe(tiny_folder, env=env, **sections), out, console=Console(file=said, width=200))
    panel = io.StringIO()
    print_summary(result.summary, out, console=Console(file=panel, width=80))
    return result, said.getvalue(), panel.getvalue()


@pytest.mark.slow
def test_a_judge_that_raises_half_of_the_time_is_seen_everywhere_and_counted(tiny_folder, tmp_path):
    FailingJudge.num_judged = 0
    rollout = {"group_size": 4, "prompts_per_update": 3, "max_failed_share": 0.9}
    result, said, panel = played(tiny_folder, tmp_path / "run", "FailingJudge", rollout=rollout, eval={"num_episodes": 6})
    assert result.summary.ended == "done"
    account = check_accounting(tmp_path / "run")
    failed = events_of(tmp_path / "run", "trajectory_failed")
    of_training = [event for event in failed if event.stage == "train"]
    assert account["failed"] == len(of_training) >= 20
    assert "an episode failed: get_reward: ValueError: the judge is down" in said or "held-out episode failed" in said
    assert re.search(r"update 4/4 .* failed \d+ of \d+", said)
    assert re.search(r"warning: \d+ of the last \d+ training episodes were ended by their environment", said)
    assert said.count("played; 3 of 6 rows failed") == 4, "before and after, sampled and greedy"
    flat = " ".join(panel.replace("│", " ").split())
    assert f"{len(of_training)} of {account['submitted']} training episodes failed: {len(of_training)} x get_reward:" in flat
    assert "12 of 24 held-out episodes failed: 12 x get_reward: ValueError: the judge is down" in flat
    boxed = [line for line in panel.splitlines() if line[0] in "╭│╰"]  # lines to copy below it are as long as their paths
    assert max(map(len, boxed)) <= 80
    for evaluation in events_of(tmp_path / "run", "evaluation"):
        assert (evaluation.num_episodes, len(evaluation.rewards), evaluation.rewards.count(None)) == (3, 6, 3)
        assert evaluation.mean == sum(r >= 1 for r in evaluation.rewards if r is not None) / 3
    report = (tmp_path / "run" / "report.html").read_text()
    for text in ("failed episodes", "Failed episodes of training, by reason", "3 of 6 episodes played", "the judge is down"):
        assert text in report
    assert summary_of(tmp_path / "run")["num_evaluation_episodes"] == 24


@pytest.mark.slow
@pytest.mark.parametrize("size, replays", [(4, 0), (2, 3)])
def test_a_group_with_failures_is_left_out_or_filled_up_as_the_recipe_says(tiny_folder, tmp_path, size, replays):
    FailingJudge.num_judged = 0
    rollout = {"min_group_size": size, "max_replays": replays, "max_failed_share": 1.0}
    result, _, _ = played(tiny_folder, tmp_path / "run", "RareJudge", num_updates=2, rollout=rollout)
    assert result.summary.ended == "done"
    account = check_accounting(tmp_path / "run")
    assert account["failed"] > 0
    trained = {group for batch in events_of(tmp_path / "run", "batch") for group in batch.groups}
    sizes = {len(event.rewards) for event in events_of(tmp_path / "run", "group_closed") if event.group in trained}
    assert sizes == {4}
    if not replays:
        assert account["filtered"] > 0


@pytest.mark.slow
def test_rewards_that_are_all_equal_end_a_run_that_filters_them_with_a_word(tiny_folder, tmp_path):
    rollout = {"filter_uniform": True, "max_filtered_batches": 8}
    result, said, _ = played(tiny_folder, tmp_path / "run", "Pleased", rollout=rollout)
    assert result.summary.ended == "error"
    assert "24 of 24 groups were left out: 24 with equal rewards" in str(result.error)
    assert "rollout.max_filtered_batches" in str(result.error)
    assert "warning: since the last update 3 of 3 groups were left out" in said
    check_accounting(tmp_path / "run")


@pytest.mark.slow
def test_environment_code_that_changes_the_working_directory_moves_nothing(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"start": 1}\n{"start": 2}\n')
    (tmp_path / "model").symlink_to(tiny_folder)
    env = {"train_data": "rows.jsonl"}
    result, _, _ = played(Path("model"), Path("out/run"), "Wanderer", env=env, num_updates=2)
    assert result.summary.ended == "done"
    assert Path.cwd() == tmp_path
    assert summarise_folder(RunFolder(path=tmp_path / "out" / "run")).num_updates == 2
    names = {path.name for path in (tmp_path / "out" / "run").iterdir()}
    assert names >= {"config.toml", "events.jsonl", "summary.json", "report.html", "checkpoints", "tokens"}


class Unheard(Words):
    """Its held-out rows are broken."""

    @staticmethod
    def make_row(split, index):
        return {"start": index % 20, "heldout": split == "heldout"}

    def reset(self, start, heldout):
        if heldout:
            raise LookupError("no such file")
        return super().reset(start)


@pytest.mark.slow
def test_an_evaluation_whose_episodes_all_fail_is_warned_of_loudly_with_the_reasons(tiny_folder, tmp_path):
    result, said, panel = played(tiny_folder, tmp_path / "run", "Unheard", num_updates=1, eval={"num_episodes": 3})
    assert result.summary.ended == "done"
    warned = [event for event in events_of(tmp_path / "run", "warning") if event.name == "failed-evaluation"]
    assert [event.message.partition(" failed: ")[0] for event in warned] == [
        f"NOTHING WAS MEASURED: all 3 held-out episodes of the {mode} evaluation {stage} training"
        for stage in ("before", "after")
        for mode in ("sampled", "greedy")
    ]
    assert all(event.message.endswith("3 x reset: LookupError: no such file") for event in warned)
    assert said.count("warning: NOTHING WAS MEASURED") == 4
    flat = " ".join(panel.replace("│", " ").split())
    assert "HELD-OUT SUCCESS WAS NOT MEASURED: all episodes of each evaluation failed." in flat
    assert "12 of 12 held-out episodes failed: 12 x reset: LookupError: no such file" in flat


@pytest.mark.slow
def test_an_evaluation_whose_episodes_all_fail_ends_the_run_by_the_rule_of_training(tiny_folder, tmp_path):
    result, _, _ = played(tiny_folder, tmp_path / "run", "Unheard", num_updates=1, eval={"num_episodes": 200})
    assert result.summary.ended == "error"
    assert "129 of the last 129 sampled episodes of the evaluation before training" in str(result.error)
    assert "rollout.max_failed_share" in str(result.error)


@pytest.mark.slow
@pytest.mark.parametrize("layout, is_told", [("shared", True), ("padded", False)])
def test_a_run_whose_model_reads_no_packed_rows_warns_of_it_once_with_the_reason(
    tiny_folder, tmp_path, monkeypatch, layout, is_told
):
    monkeypatch.setattr(decoder, "_MOVED", -1.0)  # no order of sums is taken for the same
    _, said, _ = played(tiny_folder, tmp_path / "run", "Words", num_updates=1, trainer={"layout": layout})
    warned = [event.message for event in events_of(tmp_path / "run", "warning") if event.name == "padded"]
    why = "but the trainer pads: its layers mix tokens by more than attention"
    assert len(warned) == said.count("the trainer pads") == is_told
    assert all(message.startswith(f"trainer.layout = 'shared', {why}") for message in warned)
