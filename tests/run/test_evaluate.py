"""`oldlogits eval`: any checkpoint on any environment, and what is written of it."""

import json
import shutil
from dataclasses import asdict

import aiohttp
import pytest

from oldlogits.cli.main import run as command
from oldlogits.record.evaluation import read_evaluation, read_summary
from oldlogits.record.folder import RunFolder

from ..runs import Words, recipe, write_recipe

pytestmark = pytest.mark.slow


class Moody(Words):
    """Every third task raises."""

    @staticmethod
    def make_row(split, index):
        return {"start": index % 20, "mood": "bad" if index % 3 == 2 else "good"}

    def reset(self, start, mood):
        if mood == "bad":
            raise RuntimeError("not today")
        return super().reset(start)


@pytest.fixture
def written(tiny_folder, tmp_path):
    """A recipe of six held-out rows."""
    config = recipe(tiny_folder, env={"target": f"{__name__}:Moody"}, eval={"num_episodes": 6, "success_at": 0.1})
    return write_recipe(tmp_path / "recipe.toml", config)


def test_rows_are_played_as_often_as_asked_and_failures_are_counted_by_reason(written, tiny_folder, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["eval", str(tiny_folder), str(written), "--repeats", "2", "--subset", "mood", "--out", str(out)]
    assert command(words) == 0
    shown, summary = capsys.readouterr().out, read_summary(out)
    episodes = list(read_evaluation(out))
    assert sorted((e.row, e.repeat) for e in episodes) == [(row, repeat) for row in range(6) for repeat in range(2)]
    assert {e.row for e in episodes if e.reward is None} == {2, 5}
    assert (summary.all.num_played, summary.all.num_failed, summary.num_episodes) == (8, 4, 12)
    assert summary.failures == {"reset: RuntimeError: not today": 4}
    assert summary.subsets["bad"].success is None
    rewards = [e.reward for e in episodes if e.reward is not None]
    assert summary.all.reward.mean == pytest.approx(sum(rewards) / 8)
    assert summary.all.success.mean == pytest.approx(sum(reward >= 0.1 for reward in rewards) / 8)
    assert "failed: 4 x reset: RuntimeError: not today" in shown
    assert max(map(len, shown.splitlines())) <= max(80, len(str(out)) + 80)
    for figure in (summary.all.success, summary.all.pass_at["2"], summary.subsets["good"].pass_at["2"]):
        assert str(figure) in shown
    assert "success, avg@2" in shown
    assert "pass@2 is over the 4 rows that were played 2 times" in shown
    assert (out / "transcripts.txt").read_text().count("=" * 80) == 12


def test_greedy_evaluations_are_the_same_and_differ_by_nothing(written, tiny_folder, tmp_path, capsys):
    outs = [str(tmp_path / name) for name in "ab"]
    for out in outs:
        assert command(["eval", str(tiny_folder), str(written), "--greedy", "--out", out]) == 0
    capsys.readouterr()
    assert command(["eval", "--compare", *outs]) == 0
    shown = capsys.readouterr().out
    assert "+0.000 [+0.000, +0.000]" in shown
    assert max(len(line) for line in shown.splitlines() if str(tmp_path) not in line) <= 80
    assert command(["eval", "--compare", outs[0], str(tmp_path / "gone")]) == 2


def test_a_run_is_evaluated_by_its_newest_checkpoint_under_its_own_recipe(tiny_folder, tmp_path):
    folder = RunFolder.create(tmp_path / "run")
    folder.write_config(asdict(recipe(tiny_folder, eval={"num_episodes": 3})))
    partial = folder.begin_checkpoint(4)
    shutil.copytree(tiny_folder, partial / "model", dirs_exist_ok=True)
    folder.name_checkpoint(partial)
    assert command(["eval", str(folder.path), "--eval.num-episodes", "2", "--out", str(tmp_path / "out")]) == 0
    summary = read_summary(tmp_path / "out")
    assert (summary.model, summary.num_rows) == (str(folder.checkpoints / "v000004" / "model"), 2)


def test_an_evaluation_whose_episodes_all_fail_says_so_and_is_status_1(tiny_folder, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"start": 1, "mood": "bad"}) + "\n")
    env = {"target": f"{__name__}:Moody", "eval_data": str(rows)}
    written = write_recipe(tmp_path / "recipe.toml", recipe(tiny_folder, env=env, eval={"num_episodes": 4}))
    assert command(["eval", str(tiny_folder), str(written), "--out", str(tmp_path / "out")]) == 1
    shown = capsys.readouterr().out
    assert "1 x reset: RuntimeError: not today" in shown
    assert "none played, 1 failed" in shown
    assert "no episode was played to its end" in shown
    assert "0.000" not in shown
    assert read_summary(tmp_path / "out").all.success is None


def test_what_cannot_be_evaluated_is_refused_before_anything_is_written(written, tiny_folder, tmp_path, capsys):
    out = tmp_path / "out"
    for words, says in (
        ([], "there is nothing to evaluate"),
        ([str(tiny_folder)], "there is no recipe"),
        ([str(tiny_folder), str(written), "--eval.num-episodes", "0"], "there is nothing to evaluate"),
        ([str(tiny_folder), str(written), "--subset", "colour"], "a row lacks the field of --subset"),
        ([str(tmp_path / "gone"), str(written)], "no folder"),
    ):
        assert command(["eval", *words, "--out", str(out)]) == 2
        assert says in capsys.readouterr().err
    assert not out.exists()
    out.mkdir()
    (out / "mine").touch()
    assert command(["eval", str(tiny_folder), str(written), "--out", str(out)]) == 2


async def asks_too_much_first(base_url, api_key, row):
    """Is refused, and then answered in its second conversation."""
    statuses = []
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {api_key}"}) as session:
        for words in ("please " * 5000, "please"):
            body = {"messages": [{"role": "user", "content": words}]}
            async with session.post(f"{base_url}/chat/completions", json=body) as answer:
                statuses.append(answer.status)
    return float(statuses == [400, 200])


def test_an_agent_program_whose_first_conversation_came_to_nothing_is_evaluated(tiny_folder, tmp_path, capsys):
    env = {"target": f"{__name__}:Moody", "program": f"{__name__}:asks_too_much_first"}
    config = recipe(tiny_folder, env=env, eval={"num_episodes": 2, "success_at": 0.1}, runtime={"type": "local"})
    written, out = write_recipe(tmp_path / "recipe.toml", config), tmp_path / "out"
    assert command(["eval", str(tiny_folder), str(written), "--out", str(out)]) == 0
    assert sorted((e.id, e.row, e.reward) for e in read_evaluation(out)) == [("eval.0", 0, 1.0), ("eval.1", 1, 1.0)]
    gateway = read_summary(out).gateway
    assert (gateway["opened"], gateway["refused"], gateway["rewritten"]) == (2, 2, 0)
    assert "The program was given 2 turns" in capsys.readouterr().out
