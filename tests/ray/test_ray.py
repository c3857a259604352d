"""The runtime "ray" on a real cluster of simulated nodes: workers are killed, join and leave; the trainer is killed."""

import asyncio
import os
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from oldlogits.cli.main import run as command
from oldlogits.config.systems import RayConfig
from oldlogits.core.errors import ConfigError

from ..runs import after_updates, check_accounting, events_of, recipe, summary_of, tokens_of, wait_for_updates, write_recipe
from ..waiting import HUNG_S, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1800)]

ray = pytest.importorskip("ray")

from oldlogits.backends.ray.calls import ActorCalls  # noqa: E402
from oldlogits.backends.ray.cluster import connected, reserve  # noqa: E402
from oldlogits.backends.ray.weights import ClusterWeights  # noqa: E402


@pytest.fixture(scope="module")
def cluster():
    """Three nodes of three CPUs each: a worker fits on each, and the trainer beside one of them."""
    from ray.cluster_utils import Cluster

    others = {"RAY_memory_monitor_refresh_ms": "0"}  # a machine that others fill is none of this test's
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0", "OMP_NUM_THREADS": "1", **others}
    cluster = Cluster()
    for _ in range(3):
        cluster.add_node(num_cpus=3, include_dashboard=False)
    yield cluster
    cluster.shutdown()


def train(tmp_path, tiny_folder, cluster, *, num_updates, **sections):
    """Train with three workers; returns the exit status and the run folder."""
    table = {
        "runtime": {"type": "ray"},
        "ray": {"address": cluster.address, "num_workers": 3, "placement": "STRICT_SPREAD"},
        "env": {"latency_s": 0.2},
        "engine": {"max_num_seqs": 8},
        "num_updates": num_updates,
    }
    config = recipe(tiny_folder, **{**table, **sections})
    path = write_recipe(tmp_path / "r.toml", config)
    return command(["train", str(path), "--out", str(tmp_path / "run")]), tmp_path / "run"


def pids(title):
    """Of this test's actors whose name in the system's list begins so."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if words.startswith(title) and os.getpid() in ancestors(int(path.parent.name)):
            found.append(int(path.parent.name))
    return found


def ancestors(pid):
    found = []
    while pid > 1:
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            break
        found.append(pid)
    return found


def servers(folder):
    """Processes that serve the model of a folder, whoever started them."""
    lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if os.access(path, os.R_OK)]
    return [line for line in lines if b"serve" in line and str(folder).encode() in line]


def check_exact(run):
    """Every trained token is of a version of this run, is scored at it, and was trained once."""
    names = ("trajectory", "index", "log_r_d", "staleness", "version", "trainer_version", "provenance")
    tokens = tokens_of(run, *names)
    assert set(tokens["provenance"]) == {"exact"}
    assert np.abs(tokens["log_r_d"]).max() <= 1e-4
    assert tokens["staleness"].min() >= 0
    assert 1 <= tokens["staleness"].max() <= 2
    assert (tokens["trainer_version"] - tokens["staleness"] == tokens["version"]).all()
    places = list(zip(tokens["trajectory"], tokens["index"], strict=True))
    assert len(set(places)) == len(places), "no token is trained twice"
    updates = summary_of(run)["num_updates"]
    account = check_accounting(run)
    assert account["trained"] == updates * 3 * 4
    assert account["failed"] == 0
    probes = events_of(run, "probe")
    assert {event.version for event in probes} == set(range(updates + 1))
    assert max(event.max_abs_error for event in probes) <= 1e-4
    assert summary_of(run)["consistency_publish_max_abs_error"] <= 1e-5


def test_a_run_outlives_its_workers_and_takes_in_new_ones(tmp_path, tiny_folder, cluster):
    """One is killed in mid-rollout and started again, one joins, one is asked to leave; every update is exact."""
    run = tmp_path / "run"

    def act():
        try:
            assert len(pids("ray::Worker")) == 3
            os.kill(pids("ray::Worker")[0], signal.SIGKILL)
            wait_until(lambda: events_of(run, "server_up"), "the worker comes back")
            wait_for_updates(run, len(events_of(run, "update")) + 2)
            assert command(["workers", str(run), "--num", "4"]) == 0
            wait_until(lambda: len(events_of(run, "server_up")) == 2, "a fourth worker joins")
            wait_for_updates(run, len(events_of(run, "update")) + 2)
            assert command(["workers", str(run), "--num", "2"]) == 0
            wait_until(lambda: len(events_of(run, "server_down")) == 3, "two leave")
            wait_for_updates(run, len(events_of(run, "update")) + 2)
        finally:
            os.kill(os.getpid(), signal.SIGINT)

    thread = after_updates(run, 2, act)
    status, _ = train(tmp_path, tiny_folder, cluster, num_updates=5000)
    thread.join()
    assert status == 130
    killed, *left = events_of(run, "server_down")
    returned, joined = events_of(run, "server_up")
    assert "asked to leave" not in killed.reason
    assert [event.reason for event in left] == ["it was asked to leave"] * 2
    assert returned.reason.startswith("started again")
    assert joined.reason.startswith("it joined")
    assert pids("ray::Worker") == []
    assert summary_of(run)["engine_copies_max"] == 4 + 3 + 1  # four engines, one copy a node, the one that nodes fetch
    wait_until(lambda: not servers(tiny_folder), "no server is left")
    check_exact(run)


def test_the_death_of_the_trainer_ends_the_run_and_names_the_checkpoint_to_go_on_from(tmp_path, tiny_folder, cluster, capsys):
    run = tmp_path / "run"

    def act():
        [trainer] = pids("ray::Calls")
        os.kill(trainer, signal.SIGKILL)

    thread = after_updates(run, 3, act)
    status, _ = train(tmp_path, tiny_folder, cluster, num_updates=5000, record={"checkpoint_every": 2})
    thread.join()
    said = capsys.readouterr().err
    assert status == 1
    assert "the trainer actor ended" in said
    assert f"oldlogits train --resume {run}" in said
    assert "Traceback" not in said
    assert summary_of(run)["ended"] == "error"
    check_accounting(run)
    table = (run / "config.toml").read_text()
    updates = max(int(path.name[1:]) for path in (run / "checkpoints").glob("v*"))
    (run / "config.toml").write_text(re.sub(r"num_updates = 5000", f"num_updates = {updates + 2}", table))
    assert command(["train", str(run / "config.toml"), "--resume", str(run)]) == 0
    check_exact(run)


def test_a_second_model_scores_exactly_and_a_frozen_model_ends_the_run(tmp_path, tiny_folder, cluster, capsys):
    status, run = train(tmp_path, tiny_folder, cluster, num_updates=4, proximal={"source": "dedicated"})
    assert status == 0
    check_exact(run)
    other = tmp_path / "other"
    other.mkdir()

    def act():
        os.kill(pids("ray::Calls")[-1], signal.SIGSTOP)

    thread = after_updates(other / "run", 2, act)
    runtime = {"type": "ray", "heartbeat_timeout_s": 10.0}
    status, run = train(other, tiny_folder, cluster, num_updates=5000, proximal={"source": "dedicated"}, runtime=runtime)
    thread.join()
    assert status == 1
    assert re.search(r"the (trainer|scorer) actor ended\s+got: no heartbeat for 10 s", capsys.readouterr().err)


def test_adapters_reach_every_worker(tmp_path, tiny_folder, cluster):
    model, trainer = {"lora_rank": 4}, {"lr": 3e-2, "warmup_steps": 0}
    status, run = train(tmp_path, tiny_folder, cluster, num_updates=3, model=model, trainer=trainer)
    assert status == 0
    check_exact(run)
    sent = max(event.bytes for event in events_of(run, "weights_updated"))
    assert sent < 0.5 * (tiny_folder / "model.safetensors").stat().st_size, "adapters alone travel"


def test_a_trainer_that_has_a_place_and_is_slow_to_start_is_not_said_to_have_none(cluster):
    async def start():
        [place] = await reserve("the trainer", 1, cpus=1, gpus=0, strategy="PACK", timeout_s=HUNG_S)
        await ActorCalls("trainer", time.sleep, (2 * HUNG_S,), weights=ClusterWeights(), place=place).ready(3.0)

    with connected(RayConfig(address=cluster.address), num_cpus=1), pytest.raises(ConfigError) as refused:
        asyncio.run(start())
    assert "the trainer has its place on the cluster and is still starting" in str(refused.value)
    assert "no place" not in str(refused.value)


def test_a_cluster_without_room_is_refused_with_what_is_free_before_a_model_is_loaded(tmp_path, tiny_folder, cluster, capsys):
    asked = {"address": cluster.address, "num_workers": 4, "placement": "STRICT_SPREAD", "start_timeout_s": 8.0}
    status, _ = train(tmp_path, tiny_folder, cluster, num_updates=2, ray=asked)
    assert status == 2
    said = capsys.readouterr().err
    assert "the cluster gives no place to 4 workers (STRICT_SPREAD)" in said
    assert "CPU free" in said
