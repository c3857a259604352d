"""Whole runs whose engine is one or several servers over HTTP: exactness, and every way in which a server can fail."""

import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from oldlogits.cli.main import run as command

from ..runs import (
    after_updates,
    check_accounting,
    events_of,
    files_of,
    recipe,
    summary_of,
    tokens_of,
    wait_for_updates,
    write_recipe,
)
from ..servers import serving
from ..waiting import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

LOCAL = {"runtime": {"type": "local"}, "env": {"latency_s": 0.25}}
"""A reply takes longer than an update, so that episodes meet new versions."""


def train(tmp_path, tiny_folder, *, engine, **sections):
    config = recipe(tiny_folder, **{**LOCAL, **sections}, engine={"type": "vllm", **engine})
    status = command(["train", str(write_recipe(tmp_path / "r.toml", config)), "--out", str(tmp_path / "run")])
    return status, tmp_path / "run"


def train_until(tmp_path, tiny_folder, act, seen, **arguments):
    """Train; after two updates `act`; three updates after `seen` events of some kind have come, Ctrl-C. The run folder."""
    run, over = tmp_path / "run", threading.Event()

    def interrupt():
        try:
            act()
            kind, num = seen
            wait_until(lambda: len(events_of(run, kind)) >= num, f"{num} events {kind}")
            wait_for_updates(run, len(events_of(run, "update")) + 3)
        finally:  # a failure here ends the run, too, but not what comes after it
            if not over.is_set():
                os.kill(os.getpid(), signal.SIGINT)

    thread = after_updates(run, 2, interrupt)
    try:
        status, _ = train(tmp_path, tiny_folder, num_updates=5000, **arguments)
    finally:
        over.set()
    thread.join()
    assert status == 130
    check_exact(run, len(events_of(run, "update")), "interrupted")
    return run


def check_exact(run, num_updates, ended="done"):
    """Every trained token belongs to a version of this run, and OLD is what its version gives it."""
    columns = ("log_r_d", "staleness", "version", "trainer_version", "provenance")
    tokens = tokens_of(run, *columns)
    assert np.abs(tokens["log_r_d"]).max() <= 1e-4
    assert set(tokens["provenance"]) == {"exact"}
    assert tokens["staleness"].min() >= 0
    assert tokens["staleness"].max() <= 2
    assert (tokens["trainer_version"] - tokens["staleness"] == tokens["version"]).all()
    summary = summary_of(run)
    assert summary["ended"] == ended
    assert summary["num_updates"] == num_updates
    account = check_accounting(run)
    assert account["failed"] == 0
    assert account["trained"] == num_updates * 3 * 4
    groups = [group for event in events_of(run, "batch") for group in event.groups]
    assert len(set(groups)) == len(groups), "no group is trained twice"
    probes = events_of(run, "probe")
    assert [event.version for event in probes] == list(range(num_updates + 1))
    assert max(event.max_abs_error for event in probes) <= 1e-4
    return tokens


@pytest.fixture(autouse=True)
def clean():
    """No file of this process may stay behind in shared memory."""
    yield
    assert files_of(os.getpid()) == set()


@pytest.fixture(scope="module")
def server(tiny_folder):
    """One that nothing happens to; it wants a token."""
    with serving(tiny_folder, "--max-num-seqs", "32", "--max-context", "100", token="secret") as server:
        yield server


@pytest.fixture
def token(monkeypatch):
    monkeypatch.setenv("THE_TOKEN", "secret")


def test_over_http_every_trained_token_is_exact_and_trajectories_span_versions(server, token, tiny_folder, tmp_path):
    engine = {"urls": [server.url], "token_env": "THE_TOKEN"}
    status, run = train(tmp_path, tiny_folder, engine=engine, num_updates=6)
    assert status == 0
    assert server.get("/weight_info")["weight_version"].endswith("/6")
    tokens = check_exact(run, 6)
    assert tokens["staleness"].max() >= 1
    trajectories = tokens_of(run, "trajectory")["trajectory"]
    spans = [len(set(tokens["version"][trajectories == name])) for name in set(trajectories)]
    assert sum(n >= 2 for n in spans) >= 3
    assert not events_of(run, "server_down")


def test_a_route_that_needs_partials_gets_them_by_abort_and_resubmit(server, token, tiny_folder, tmp_path):
    engine = {"urls": [server.url], "token_env": "THE_TOKEN"}
    status, run = train(tmp_path, tiny_folder, engine=engine, proximal={"source": "interruption"})
    assert status == 0
    check_exact(run, 4)


def test_a_server_that_a_killed_trainer_left_in_mid_update_can_be_used_again(server, token, tiny_folder, tmp_path):
    server.post("/pause?mode=keep")
    server.post("/start_weight_update")
    status, run = train(tmp_path, tiny_folder, engine={"urls": [server.url], "token_env": "THE_TOKEN"}, num_updates=2)
    assert status == 0
    check_exact(run, 2)


@pytest.mark.parametrize(
    "engine, env, words",
    [
        ({"token_env": "THE_TOKEN", "precision": "fp8"}, {}, "engine.precision = 'fp32'"),
        ({"token_env": "THE_TOKEN"}, {"max_episode_tokens": 110}, "--max-context"),
        ({}, {}, "engine.token_env"),
        ({"token_env": "NOT_SET"}, {}, "export NOT_SET"),
    ],
)
def test_a_server_that_does_not_fit_the_run_is_refused_with_the_remedy(
    engine, env, words, server, token, tiny_folder, tmp_path, capsys
):
    sections = {"env": {**LOCAL["env"], **env}}
    status, _ = train(tmp_path, tiny_folder, engine={"urls": [server.url], **engine}, **sections)
    assert status == 2
    assert words in capsys.readouterr().err


def test_a_server_that_is_not_there_is_named(tiny_folder, tmp_path, capsys):
    status, _ = train(tmp_path, tiny_folder, engine={"urls": ["http://127.0.0.1:9"]})
    assert status == 1
    assert "http://127.0.0.1:9" in capsys.readouterr().err


def test_rounded_weights_are_the_servers_and_the_probe_knows_them(tiny_folder, tmp_path):
    with serving(tiny_folder, "--numerics", "fp8") as server:
        status, run = train(tmp_path, tiny_folder, engine={"urls": [server.url], "precision": "fp8"})
    assert status == 0
    assert np.abs(tokens_of(run, "log_r_d")["log_r_d"]).max() > 1e-3, "the discrepancy is real"
    assert max(event.max_abs_error for event in events_of(run, "probe")) <= 1e-4


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_of_two_servers_one_dies_or_hangs_and_the_run_goes_on_with_the_other(number, tiny_folder, tmp_path):
    with serving(tiny_folder) as first, serving(tiny_folder) as second:
        engine = {"urls": [first.url, second.url], "control_timeout_s": 10.0}
        act = lambda: second.signal(number)  # noqa: E731
        run = train_until(tmp_path, tiny_folder, act, ("server_down", 1), engine=engine)
    [down] = events_of(run, "server_down")
    assert down.server == second.url
    summary = summary_of(run)
    assert (summary["num_servers_down"], summary["num_lost_tokens"]) == (1, down.num_lost_tokens)
    assert not events_of(run, "server_up")


def stopped_in_mid_work(server):
    """Stop a server; where nothing but the one call of an update waits for it after a while, it goes on."""
    server.signal(signal.SIGSTOP)
    time.sleep(0.5)
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    unread = [row for row in rows if int(row[1].split(":")[1], 16) == server.port and int(row[4].split(":")[1], 16)]
    if len(unread) >= 3:
        return True
    server.signal(signal.SIGCONT)
    return False


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="this system does not list what a process has not read")
def test_a_server_that_comes_back_with_old_weights_is_given_the_current_ones(tiny_folder, tmp_path):
    with serving(tiny_folder) as server:

        def die_and_return():
            wait_until(lambda: stopped_in_mid_work(server), "it has stopped with requests that it does not answer")
            server.kill()
            server.start()

        run = train_until(tmp_path, tiny_folder, die_and_return, ("server_up", 1), engine={"urls": [server.url]})
    [down] = events_of(run, "server_down")
    assert down.num_requests >= 1
    [up] = events_of(run, "server_up")
    assert "it had weights of no version of this run and was given version" in up.reason


def test_when_no_server_comes_back_the_run_ends_and_says_so(tiny_folder, tmp_path, capsys):
    with serving(tiny_folder) as server:
        thread = after_updates(tmp_path / "run", 2, server.kill)
        status, run = train(tmp_path, tiny_folder, engine={"urls": [server.url], "recover_s": 3.0}, num_updates=5000)
        thread.join()
    assert status == 1
    error = capsys.readouterr().err
    assert "no server is left that samples" in error
    assert server.url in error
    assert "engine.recover_s = 3 s" in error
    assert "Traceback" not in error
    assert summary_of(run)["ended"] == "error"
    check_accounting(run)


def test_servers_of_the_run_share_its_load_and_one_that_is_killed_is_started_again(tiny_folder, tmp_path):
    pids = []

    def kill():
        pids.extend(servers_of_this_process())
        os.killpg(pids[0], signal.SIGKILL)

    engine = {"server": "embedded", "num_servers": 2, "max_num_seqs": 16}
    run = train_until(tmp_path, tiny_folder, kill, ("server_up", 1), engine=engine)
    assert len(pids) == 2
    assert len(events_of(run, "server_down")) == 1
    assert summary_of(run)["engine_copies_max"] == 2 + 1  # one each, and the one that both load from
    assert not servers_of_this_process()
    assert sorted(path.name for path in (run / "servers").iterdir()) == ["server-0.log", "server-1.log"]


def servers_of_this_process():
    children = [int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()]
    return [pid for pid in children if b"reaper.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
