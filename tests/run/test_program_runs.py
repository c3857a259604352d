"""Whole runs of agent programs: stopped in their middle by every signal, and gone on with."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from oldlogits.cli.main import INTERRUPTED

from ..runs import check_accounting, events_of, num_updates_of, recipe, summary_of, wait_for_updates, write_recipe
from ..waiting import HUNG_S, is_running, wait_until

pytestmark = pytest.mark.slow

AGENT = """
import json, os, subprocess, sys, time, urllib.request
row = json.load(sys.stdin)
helper = subprocess.Popen(["sleep", "600"])
with open(os.environ["PIDS"], "a") as file:
    file.write(f"{os.getpid()} {helper.pid}\\n")

def ask(messages):
    body = json.dumps({"messages": messages}).encode()
    headers = {"content-type": "application/json", "Authorization": "Bearer " + os.environ["OPENAI_API_KEY"]}
    request = urllib.request.Request(os.environ["OPENAI_BASE_URL"] + "/chat/completions", body, headers)
    return json.load(urllib.request.urlopen(request))["choices"][0]["message"]

messages, low = [{"role": "user", "content": f"w{row['start']}"}], 0
for turn in range(3):
    said = ask(messages)
    words = (said["content"] or "").split()
    low += sum(word in {f"w{i}" for i in range(10)} for word in words) / max(len(words), 1)
    messages += [said, {"role": "user", "content": "w3 w4"}]
    time.sleep(0.02)
print(json.dumps({"reward": low / 3}))
"""


@pytest.fixture
def written(tiny_folder: Path, tmp_path: Path) -> Path:
    """A recipe of a command that starts a process of its own."""
    (tmp_path / "agent.py").write_text(AGENT)
    env = {"command": ["python", str(tmp_path / "agent.py")]}
    config = recipe(
        tiny_folder,
        env=env,
        num_updates=200,
        rollout={"group_size": 2, "prompts_per_update": 2},
        runtime={"type": "local"},
        record={"checkpoint_every": 1},
    )
    return write_recipe(tmp_path / "recipe.toml", config)


def started(written: Path, *words: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PIDS": str(written.parent / "pids")}
    command = [sys.executable, "-m", "oldlogits", "train", *words]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def left(written: Path) -> list[int]:
    """Programs and their helpers that still run."""
    pids = [int(pid) for line in (written.parent / "pids").read_text().splitlines() for pid in line.split()]
    return [pid for pid in pids if is_running(pid)]


@pytest.mark.parametrize(
    ("signals", "status"),
    [
        ([signal.SIGINT], INTERRUPTED),
        ([signal.SIGTERM], INTERRUPTED),
        ([signal.SIGTERM, signal.SIGINT], INTERRUPTED),
        ([signal.SIGKILL], -signal.SIGKILL),
    ],
)
def test_a_run_that_is_stopped_leaves_no_program_and_goes_on_to_its_end(written, tmp_path, signals, status):
    out = tmp_path / "run"
    process = started(written, str(written), "--out", str(out))
    try:
        wait_for_updates(out, 1)
        for number in signals:
            process.send_signal(number)
            if number is not signals[-1]:
                wait_until(lambda: "interrupted" in process.stdout.readline(), "the signal is heard")
        said, _ = process.communicate(timeout=HUNG_S)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == status, said
    assert "Traceback" not in said
    wait_until(lambda: not left(written), "no program is left")
    made = num_updates_of(out)
    again = started(written, "--resume", str(out), "--num-updates", str(made + 1))
    said, _ = again.communicate(timeout=HUNG_S)
    assert again.returncode == 0, said
    wait_until(lambda: not left(written), "no program is left")
    account = check_accounting(out)
    assert account["failed"] == 0, summary_of(out)["failures"]
    assert [event.version for event in events_of(out, "update")][-1] == made + 1
