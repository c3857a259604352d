"""What only a journal knows outlives a kill: what a running turn has sampled, why episodes failed, which groups began."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from oldlogits.cli.main import run as command
from oldlogits.loop.resume import LoopState
from oldlogits.models.load import load_model, load_tokenizer
from oldlogits.record.event_log import history
from oldlogits.record.folder import RunFolder
from oldlogits.rollout.journal.journal import read
from oldlogits.rollout.journal.records import Failed, decode

from ..runs import check_accounting, events_of, recipe, summary_of, write_recipe
from ..waiting import HUNG_S, wait_until

ROOT = Path(__file__).parents[2]
FAST = "from oldlogits.rollout.journal import journal; journal.GROWTH_S = 0.05; from oldlogits.cli.main import main; main()"
LONG = 2000


@pytest.fixture
def talkative(tiny_folder, tmp_path):
    """A model that never ends a turn by itself."""
    folder = tmp_path / "talkative"
    tokenizer, model = load_tokenizer(tiny_folder), load_model(tiny_folder)
    ends = model.get_input_embeddings().weight.data
    ends[:, 0], ends[tokenizer.eos_token_id, 0] = 3.0, -30.0
    model.config.max_position_embeddings = 2 * LONG
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_turn_that_is_killed_in_its_midst_goes_on_from_what_it_had_sampled(talkative, tmp_path):
    """All versions are the first: nothing but the growth of the turn tells what it has."""
    out = tmp_path / "run"
    config = recipe(
        talkative,
        num_updates=1,
        env={"max_turns": 1, "max_tokens_per_turn": LONG, "max_episode_tokens": LONG + 100},
        rollout={"group_size": 2, "prompts_per_update": 1, "max_running_groups": 1},
        trainer={"minibatches_per_update": 1},
        record={"checkpoint_every": 1},
        runtime={"type": "local"},
    )
    process = start("train", str(write_recipe(tmp_path / "r.toml", config)), "--out", str(out), run_as=FAST)
    journal = out / "rollouts/000001.jsonl"
    wait_until(lambda: RunFolder(path=out).latest_checkpoint() is not None, "a checkpoint to go on from")
    wait_until(lambda: journal.read_bytes().count(b" Running ") >= 6, "a turn that grows")
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=HUNG_S)
    checkpoint = RunFolder(path=out).latest_checkpoint()
    assert not events_of(out, "update")
    progress = read(checkpoint, out / "rollouts", LoopState.read(checkpoint).journal)
    known = {id: episode.known for id, episode in progress.unfinished() if episode.running}
    assert known, "it was killed in mid-turn"

    assert command(["train", "--resume", str(out)]) == 0
    table = pq.read_table(out / "tokens/v000001.parquet").to_pydict()
    for id, segments in known.items():
        _, half = segments
        mine = [index for index, name in enumerate(table["trajectory"]) if name == id]
        assert 0 < len(half.token_ids) < len(mine) == LONG
        for name, values in (("token_id", half.token_ids), ("logp_mu", half.logp_mu)):
            assert [table[name][index] for index in mine[: len(values)]] == pytest.approx(values, rel=1e-6)
        assert {table["version"][index] for index in mine} == {0}
    assert not events_of(out, "trajectory_restarted")
    assert check_accounting(out)["trained"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("kills", [1, 2])
def test_reasons_of_failures_and_events_of_groups_outlive_kills_as_the_account_does(kills, tiny_folder, tmp_path):
    """There is no checkpoint but the first: all that happens is told by the journal alone."""
    out = tmp_path / "run"
    config = recipe(
        tiny_folder,
        num_updates=12,
        env={"target": "tests.loop.kill_envs:Closing"},
        rollout={"min_group_size": 4, "max_replays": 1},
        record={"checkpoint_every": 100},
        runtime={"type": "local"},
    )
    words = ["train", str(write_recipe(tmp_path / "r.toml", config)), "--out", str(out)]
    for life in range(kills):
        process = start(*words)
        wait_until(lambda: RunFolder(path=out).latest_checkpoint() is not None, "a checkpoint to go on from")
        wait_until(lambda life=life: len(told_since(out)) >= 4 * (life + 1), "episodes that failed, and a group left out")
        os.kill(process.pid, signal.SIGKILL)
        process.communicate(timeout=HUNG_S)
        words = ["train", "--resume", str(out)]
    before = told_since(out)
    assert command(words) == 0
    account, failures = check_accounting(out), summary_of(out)["failures"]
    run = history(events_of(out))
    assert sum(failures.values()) == account["failed"] == len([e for e in run if e.kind == "trajectory_failed"])
    assert set(failures) == {"get_reward: RuntimeError: the shop is closed"}
    assert sum(len(e.rewards) for e in run if e.kind == "group_closed" and e.filtered) == account["filtered"]
    groups = [e.group for e in run if e.kind == "group_admitted"]
    assert len(set(groups)) == len(groups), "each is told once"
    replayed = {e.trajectory for e in run if e.kind == "trajectory_failed" and "r" not in e.trajectory}
    assert account["submitted"] == 4 * len(groups) + len(replayed)
    resumed = [e for e in run[run.index([e for e in run if e.kind == "run_started"][-1]) :] if e.kind == "trajectory_failed"]
    assert [(e.trajectory, e.version) for e in resumed][: len(before)] == before


def told_since(out: Path) -> list[tuple[str, int]]:
    """The episodes that failed since the checkpoint, as the journal says, with the version."""
    path = out / "rollouts/000001.jsonl"  # its thread makes it, soon after the checkpoint
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    records = [decode(line) for line in lines if line.endswith(b"\n")]
    return [(record.episode, record.version) for record in records if isinstance(record, Failed)]


def start(*words: str, run_as: str = "from oldlogits.cli.main import main; main()") -> subprocess.Popen[bytes]:
    """A command in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    return subprocess.Popen([sys.executable, "-c", run_as, *words], cwd=ROOT, env=environment)
