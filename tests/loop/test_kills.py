"""Runs whose controller is killed, again and again, and that go on: nothing is lost, and nothing is trained twice."""

import os
import shutil
import signal
import subprocess
import sys
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest

from oldlogits.record.report.data import read_run

from ..runs import check_accounting, events_of, num_updates_of, recipe, write_recipe
from ..waiting import HUNG_S, wait_until

NUM_UPDATES = 9
MORE = {
    "snapshot": {"record": {"checkpoint_every": 3}},
    "every update": {"record": {"checkpoint_every": 1}},
    "stale keys": {"engine": {"kv": "stale"}, "proximal": {"accept_mixed_kv": True}},
    "dedicated": {"proximal": {"source": "dedicated"}},
    "interruption": {"proximal": {"source": "interruption"}},
    "eager": {"proximal": {"source": "eager"}},
    "adapters": {"model": {"lora_rank": 4}},
    "bf16": {"model": {"forward_dtype": "bf16"}},
    "replays": {"rollout": {"max_replays": 2, "max_failed_share": 0.9}, "env": {"target": "tests.loop.kill_envs:Failing"}},
    "saved": {"env": {"target": "tests.loop.kill_envs:Saving"}},
    "otherwise": {"env": {"target": "tests.loop.kill_envs:Otherwise"}},
}


def kill_after(command, out, num, said):
    """Run a command until the run has made `num` more updates and has a checkpoint, and kill it."""
    before = num_updates_of(out)
    process = subprocess.Popen(command, stdout=said, stderr=said, start_new_session=True)
    try:
        wait_until(
            lambda: (
                process.poll() is not None or (num_updates_of(out) >= before + num and any(out.glob("checkpoints/v*[0-9]")))
            ),
            f"{num} more updates",
            hung_s=HUNG_S,
        )
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_a_run_that_is_killed_three_times_goes_on_each_time_and_trains_every_token_once(name, tiny_folder, tmp_path):
    out, base = tmp_path / "run", {"record": {"checkpoint_every": 3}, "runtime": {"type": "local"}}
    config = recipe(tiny_folder, num_updates=NUM_UPDATES, **base | MORE[name])
    train = [sys.executable, "-m", "oldlogits", "train"]
    command = [*train, str(write_recipe(tmp_path / "r.toml", config)), "--out", str(out)]
    with (tmp_path / "said.txt").open("w+") as said:
        for num in (2, 2, 1):  # the second goes on from the checkpoint that the first went on from
            kill_after(command, out, num, said)
            command = [*train, "--resume", str(out)]
        checkpoints = sorted(out.glob("checkpoints/v*[0-9]"))
        if len(checkpoints) > 1:
            shutil.rmtree(checkpoints[-1])
        status = subprocess.run(command, stdout=said, stderr=said, timeout=HUNG_S).returncode
    assert status == 0, (tmp_path / "said.txt").read_text()

    run, account = read_run(out), check_accounting(out)
    assert [update.version for update in run.updates] == list(range(1, NUM_UPDATES + 1))
    tables = [pq.read_table(path).to_pydict() for path in sorted((out / "tokens").glob("*.parquet"))]
    tokens = Counter(pair for table in tables for pair in zip(table["trajectory"], table["index"], strict=True))
    assert set(tokens.values()) == {1}
    assert len({trajectory for trajectory, _ in tokens}) == account["trained"] == run.summary.num_trajectories
    assert account["cancelled"] == 0
    assert max(max(table["staleness"]) for table in tables) <= config.max_staleness
    assert set(run.summary.provenance) <= ({"exact", "mixed_kv"} if name == "stale keys" else {"exact"})
    if name not in ("bf16", "stale keys"):
        assert max(np.abs(np.subtract(t["logp_proximal"], t["logp_mu"])).max() for t in tables) <= 5e-5
    if name != "otherwise":
        assert not events_of(out, "trajectory_restarted")
