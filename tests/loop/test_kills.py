"""Runs whose controller is killed, again and again, and that go on: nothing is lost, and nothing is trained twice."""

import importlib
import multiprocessing
import os
import shutil
import signal
import sys
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest

from oldlogits.record.report.data import read_run

from ..runs import check_accounting, events_of, num_updates_of, recipe, write_recipe
from ..waiting import HUNG_S, wait_until

NUM_UPDATES = 7
CASES = {
    "every update, answers otherwise": {
        "record": {"checkpoint_every": 1},
        "env": {"target": "tests.loop.kill_envs:Otherwise"},
    },
    "stale keys, bf16": {
        "engine": {"kv": "stale"},
        "proximal": {"accept_mixed_kv": True},
        "model": {"forward_dtype": "bf16"},
    },
    "dedicated, replays": {
        "proximal": {"source": "dedicated"},
        "rollout": {"max_replays": 2, "max_failed_share": 0.9},
        "env": {"target": "tests.loop.kill_envs:Failing"},
    },
    "interruption, saved": {"proximal": {"source": "interruption"}, "env": {"target": "tests.loop.kill_envs:Saving"}},
    "eager, adapters": {"proximal": {"source": "eager"}, "model": {"lora_rank": 4}},
}
IMPORTED = ["oldlogits.__main__", "oldlogits.run.run"]
"""What a fork server imports once, and every start of a run has from it: most of a short run is imports."""


def be(words, said):
    """Be the command line in a session of one's own, with its output in a file."""
    os.setsid()
    output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(output, number)
    command = sys.modules["__main__"] = importlib.import_module("oldlogits.__main__")  # what it spawns imports this
    command.main(words)


def start(words, said):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    process = context.Process(target=be, args=(words, str(said)))
    process.start()
    return process


def kill_after(process, out, num):
    """Wait until the run has made `num` more updates and has a checkpoint, and kill it."""
    before = num_updates_of(out)
    try:
        wait_until(
            lambda: (
                process.exitcode is not None or (num_updates_of(out) >= before + num and any(out.glob("checkpoints/v*[0-9]")))
            ),
            f"{num} more updates",
            hung_s=HUNG_S,
        )
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_run_that_is_killed_twice_goes_on_each_time_and_trains_every_token_once(name, tiny_folder, tmp_path):
    out, said, base = tmp_path / "run", tmp_path / "said.txt", {"record": {"checkpoint_every": 3}, "runtime": {"type": "local"}}
    config = recipe(tiny_folder, num_updates=NUM_UPDATES, **base | CASES[name])
    kill_after(start(["train", str(write_recipe(tmp_path / "r.toml", config)), "--out", str(out)], said), out, 2)
    kill_after(start(["train", "--resume", str(out)], said), out, 2)
    checkpoints = sorted(out.glob("checkpoints/v*[0-9]"))
    if len(checkpoints) > 1:
        shutil.rmtree(checkpoints[-1])  # so that it goes on from the one before
    last = start(["train", "--resume", str(out)], said)
    last.join(HUNG_S)
    assert last.exitcode == 0, said.read_text()

    run, account = read_run(out), check_accounting(out)
    assert [update.version for update in run.updates] == list(range(1, NUM_UPDATES + 1))
    tables = [pq.read_table(path).to_pydict() for path in sorted((out / "tokens").glob("*.parquet"))]
    tokens = Counter(pair for table in tables for pair in zip(table["trajectory"], table["index"], strict=True))
    assert set(tokens.values()) == {1}
    assert len({trajectory for trajectory, _ in tokens}) == account["trained"] == run.summary.num_trajectories
    assert account["cancelled"] == 0
    assert max(max(table["staleness"]) for table in tables) <= config.max_staleness
    assert set(run.summary.provenance) <= ({"exact", "mixed_kv"} if "stale keys" in name else {"exact"})
    if "stale keys" not in name:
        assert max(np.abs(np.subtract(t["logp_proximal"], t["logp_mu"])).max() for t in tables) <= 5e-5
    if "otherwise" not in name:
        assert not events_of(out, "trajectory_restarted")
