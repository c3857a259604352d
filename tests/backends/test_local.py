"""Whole runs with real engine and trainer processes: exactness, accounting, and every way to end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from oldlogits.cli.main import run as command
from oldlogits.record.jsonl import read_lines

from ..runs import (
    after_updates,
    check_accounting,
    children,
    events_of,
    pid_of,
    recipe,
    summary_of,
    tokens_of,
    wait_for_updates,
    write_recipe,
)
from ..waiting import HUNG_S, wait_until

ROOT = Path(__file__).parents[2]

LOCAL = {"runtime": {"type": "local"}, "env": {"latency_s": 0.25}}
"""A reply takes longer than an update, so that episodes meet new versions."""


@pytest.fixture
def clean(shared_files):
    """Nothing may stay behind: no process, no file in shared memory."""
    files = shared_files()
    yield
    wait_until(lambda: not children(), "no process is left")
    assert shared_files() <= files


@pytest.fixture
def endless(tiny_folder, tmp_path):
    """A recipe of a run that only ends when something happens to it."""
    config = recipe(tiny_folder, **LOCAL, num_updates=500)
    return write_recipe(tmp_path / "endless.toml", config)


def ends_with(endless, out, act, *, after):
    """Run until `act` ends it, long before its last update; returns the exit status."""
    thread = after_updates(out, after, act)
    status = command(["train", str(endless), "--out", str(out)])
    thread.join()
    assert summary_of(out)["num_updates"] < 500
    return status


def check_whole(out: Path, ended: str) -> int:
    """The records of a run that was stopped agree with each other; returns the number of updates."""
    summary = summary_of(out)
    assert summary["ended"] == ended
    assert (out / "report.html").stat().st_size > 10_000
    updates = [event.version for event in events_of(out, "update")]
    assert updates == list(range(1, summary["num_updates"] + 1))
    assert [line["seq"] for line in read_lines(out / "events.jsonl")] == list(range(len(events_of(out))))
    assert check_accounting(out)["trained"] == summary["num_trajectories"] == len(updates) * 3 * 4
    return len(updates)


@pytest.mark.slow
def test_in_fp32_every_trained_token_is_exact_over_processes_and_the_bound_holds(tiny_folder, tmp_path, capsys, clean):
    config = recipe(tiny_folder, **LOCAL, num_updates=6, eval={"num_episodes": 16}, record={"checkpoint_every": 4})
    assert command(["train", str(write_recipe(tmp_path / "r.toml", config)), "--out", str(tmp_path / "run")]) == 0
    columns = ("log_r_d", "staleness", "trajectory", "version", "trainer_version", "provenance")
    tokens = tokens_of(tmp_path / "run", *columns)
    spans = [len(set(tokens["version"][tokens["trajectory"] == name])) for name in sorted(set(tokens["trajectory"]))]
    assert len(spans) == 6 * 3 * 4
    assert sum(n >= 2 for n in spans) >= 3
    assert np.abs(tokens["log_r_d"]).max() <= 1e-4
    assert set(tokens["provenance"]) == {"exact"}
    assert 1 <= tokens["staleness"].max() <= 2
    assert tokens["staleness"].min() >= 0
    first = tokens["trainer_version"] == 0
    [calibration] = events_of(tmp_path / "run", "calibration")
    assert calibration.num_tokens == first.sum()
    assert not tokens["staleness"][first].any()
    assert calibration.log_r_d_abs_max == pytest.approx(np.abs(tokens["log_r_d"][first]).max(), abs=1e-5)
    summary = summary_of(tmp_path / "run")
    assert summary["staleness_max"] == tokens["staleness"].max()
    assert summary["consistency_publish_max_abs_error"] <= 1e-5
    assert summary["consistency_lag0_max_abs_error"] <= 1e-5
    assert summary["gain"]["num_episodes"] == 16
    assert check_whole(tmp_path / "run", "done") == 6
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == ["v000004", "v000006"]
    shown = capsys.readouterr()
    assert "Held-out success" in shown.out
    assert str(tmp_path / "run/report.html") in shown.out.replace("\n", "").replace("│", "").replace(" ", "")
    assert shown.err == "", "no warning clutters the screen"


@pytest.mark.slow
@pytest.mark.parametrize("worker", ["engine", "trainer"])
def test_a_killed_process_ends_the_run_with_a_clear_error(worker, endless, tmp_path, capsys, clean):
    out = tmp_path / "run"
    status = ends_with(endless, out, lambda: os.kill(pid_of(f"oldlogits-{worker}"), signal.SIGKILL), after=2)
    assert status == 1
    error = capsys.readouterr().err
    assert f"error: the {worker} process ended" in error
    assert all(f"{part}: " in error for part in ("got", "allowed", "fix"))
    assert "Traceback" not in error
    assert "go on from the last checkpoint, v000000: oldlogits train --resume" in error, "that of the start"
    summary = summary_of(out)
    assert summary["ended"] == "error"
    assert summary["num_updates"] >= 2
    assert (out / "report.html").stat().st_size > 10_000
    check_accounting(out)
    [ended] = events_of(out, "run_ended")
    assert ended.reason == "error"
    assert f"the {worker} process ended" in ended.error


@pytest.mark.slow
@pytest.mark.parametrize("worker", ["engine", "trainer", "scorer"])
def test_a_frozen_process_is_found_and_ends_the_run_with_a_clear_error(worker, tiny_folder, tmp_path, capsys, clean):
    local = {**LOCAL, "runtime": {"type": "local", "heartbeat_timeout_s": 5.0}}
    config = recipe(tiny_folder, **local, num_updates=500, proximal={"source": "dedicated"})
    out, endless = tmp_path / "run", write_recipe(tmp_path / "endless.toml", config)
    status = ends_with(endless, out, lambda: os.kill(pid_of(f"oldlogits-{worker}"), signal.SIGSTOP), after=2)
    assert status == 1
    error = " ".join(capsys.readouterr().err.split())
    assert f"error: the {worker} process ended" in error
    assert "no heartbeat for 5 s: it is frozen" in error
    assert summary_of(out)["ended"] == "error"
    check_accounting(out)


@pytest.mark.slow
def test_an_interrupted_run_goes_on_where_it_stopped(tiny_folder, tmp_path, capsys, clean):
    """Ctrl-C that reaches the parent only; then --resume to the end. The route is the one with the most processes."""
    out = tmp_path / "run"
    config = recipe(tiny_folder, **LOCAL, num_updates=500, proximal={"source": "dedicated"})
    endless = write_recipe(tmp_path / "r.toml", config)
    status = ends_with(endless, out, lambda: os.kill(os.getpid(), signal.SIGINT), after=2)
    assert status == 130
    num_updates = check_whole(out, "interrupted")
    assert f"oldlogits train --resume {out}" in capsys.readouterr().err.replace("\n", "")

    assert command(["train", "--resume", str(out), "--num-updates", str(num_updates + 2)]) == 0
    assert check_whole(out, "done") == num_updates + 2
    starts = events_of(out, "run_started")
    assert [event.version for event in starts] == [0, num_updates]
    groups = [group for event in events_of(out, "batch") for group in event.groups]
    assert len(set(groups)) == len(groups), "no group is trained twice"
    assert np.abs(tokens_of(out, "log_r_d")["log_r_d"]).max() <= 1e-4


@pytest.mark.slow
def test_a_second_ctrl_c_stops_at_once_and_leaves_whole_records(endless, tmp_path, capsys, clean):
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)  # else the system may make one of both
        os.kill(os.getpid(), signal.SIGINT)

    status = ends_with(endless, tmp_path / "run", twice, after=2)
    assert status == 130
    check_whole(tmp_path / "run", "interrupted")
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.slow
def test_ctrl_c_in_a_terminal_reaches_all_processes_and_none_stays_behind(endless, tmp_path):
    out = tmp_path / "run"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-m", "oldlogits", "train", str(endless), "--out", str(out)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        wait_for_updates(out, 2)
        os.killpg(process.pid, signal.SIGINT)
        shown, error = process.communicate(timeout=HUNG_S)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 130
    assert "interrupted: finishing the update, then a checkpoint" in shown
    assert "Traceback" not in error
    num_updates = check_whole(out, "interrupted")
    assert (out / f"checkpoints/v{num_updates:06d}/state/trainer.json").is_file()
    wait_until(lambda: not _lives(process.pid), "no process of the group is left")


def _lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
