"""Whole runs whose engine is one or several servers over HTTP: exactness, and every way in which a server can fail."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest

from oldlogits.cli.main import run as command
from oldlogits.record.events import EventKind

from ..runs import after_updates, check_accounting, events_of, recipe, shared_files, summary_of, tokens_of, write_recipe
from ..servers import serving

LOCAL = {"runtime": {"type": "local"}, "env": {"latency_s": 0.25}}
"""A reply takes longer than an update, so that episodes meet new versions."""


def train(tmp_path, tiny_folder, *, engine, **sections):
    config = recipe(tiny_folder, **{**LOCAL, **sections}, engine={"type": "vllm", **engine})
    status = command(["train", str(write_recipe(tmp_path / "r.toml", config)), "--out", str(tmp_path / "run")])
    return status, tmp_path / "run"


def check_exact(run, num_updates):
    """Every trained token belongs to a version of this run, and OLD is what its version gives it."""
    columns = ("log_r_d", "staleness", "version", "trainer_version", "provenance")
    tokens = tokens_of(run, *columns)
    assert np.abs(tokens["log_r_d"]).max() <= 1e-4
    assert set(tokens["provenance"]) == {"exact"}
    assert tokens["staleness"].min() >= 0
    assert tokens["staleness"].max() <= 2
    assert (tokens["trainer_version"] - tokens["staleness"] == tokens["version"]).all()
    summary = summary_of(run)
    assert summary["ended"] == "done"
    assert summary["num_updates"] == num_updates
    account = check_accounting(run)
    assert account["failed"] == 0
    assert account["trained"] == num_updates * 3 * 4
    probes = events_of(run, EventKind.PROBE)
    assert [event.version for event in probes] == list(range(num_updates + 1))
    assert max(event.fields["max_abs_error"] for event in probes) <= 1e-4
    return tokens


@pytest.fixture(autouse=True)
def clean():
    """No file may stay behind in shared memory."""
    files = shared_files()
    yield
    assert shared_files() <= files


@pytest.fixture(scope="module")
def server(tiny_folder):
    """One that nothing happens to; it wants a token."""
    with serving(tiny_folder, "--num-slots", "32", "--max-context", "100", token="secret") as server:
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
    assert not events_of(run, EventKind.SERVER_DOWN)


def test_a_route_that_needs_partials_gets_them_by_abort_and_resubmit(server, token, tiny_folder, tmp_path):
    engine = {"urls": [server.url], "token_env": "THE_TOKEN"}
    status, run = train(tmp_path, tiny_folder, engine=engine, source={"type": "interruption"})
    assert status == 0
    check_exact(run, 4)


@pytest.mark.parametrize(
    "engine, env, words",
    [
        ({"token_env": "THE_TOKEN", "numerics": "fp8"}, {}, "engine.numerics = 'fp32'"),
        ({"token_env": "THE_TOKEN"}, {"max_tokens": 110}, "--max-context"),
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
        status, run = train(tmp_path, tiny_folder, engine={"urls": [server.url], "numerics": "fp8"})
    assert status == 0
    assert np.abs(tokens_of(run, "log_r_d")["log_r_d"]).max() > 1e-3, "the discrepancy is real"
    assert max(event.fields["max_abs_error"] for event in events_of(run, EventKind.PROBE)) <= 1e-4


@pytest.mark.parametrize("how", ["killed", "hung"])
def test_of_two_servers_one_fails_and_the_run_goes_on_with_the_other(how, tiny_folder, tmp_path):
    with serving(tiny_folder) as first, serving(tiny_folder) as second:
        urls = [first.url, second.url]

        def fail():
            second.wait_for_requests()
            second.signal(signal.SIGKILL if how == "killed" else signal.SIGSTOP)

        thread = after_updates(tmp_path / "run", 2, fail)
        status, run = train(
            tmp_path, tiny_folder, engine={"urls": urls, "control_timeout_s": 2.0, "recover_s": 60.0}, num_updates=8
        )
        thread.join()
    assert status == 0
    check_exact(run, 8)
    downs = events_of(run, EventKind.SERVER_DOWN)
    assert {event.fields["server"] for event in downs} == {second.url}
    assert len(downs) == 1


def test_a_server_that_comes_back_with_old_weights_is_given_the_current_ones(tiny_folder, tmp_path):
    with serving(tiny_folder) as server:

        def die_and_return():
            server.wait_for_requests()
            server.kill()
            server.start()

        thread = after_updates(tmp_path / "run", 2, die_and_return)
        status, run = train(tmp_path, tiny_folder, engine={"urls": [server.url], "recover_s": 120.0}, num_updates=6)
        thread.join()
    assert status == 0
    check_exact(run, 6)
    [down] = events_of(run, EventKind.SERVER_DOWN)
    assert down.fields["num_requests"] >= 1
    [up] = events_of(run, EventKind.SERVER_UP)
    assert "it had weights default and was given version" in up.fields["reason"]


def test_when_no_server_comes_back_the_run_ends_and_says_so(tiny_folder, tmp_path, capsys):
    with serving(tiny_folder) as server:
        thread = after_updates(tmp_path / "run", 2, server.kill)
        status, run = train(tmp_path, tiny_folder, engine={"urls": [server.url], "recover_s": 3.0}, num_updates=500)
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
        children = [pid for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()]
        pids.extend(int(pid) for pid in children if b"\0serve\0" in Path(f"/proc/{pid}/cmdline").read_bytes())
        os.killpg(pids[0], signal.SIGKILL)

    thread = after_updates(tmp_path / "run", 2, kill)
    engine = {"start": "embedded", "num_servers": 2, "num_slots": 16}
    status, run = train(tmp_path, tiny_folder, engine=engine, num_updates=30)
    thread.join()
    assert status == 0
    check_exact(run, 30)
    assert len(pids) == 2
    assert len(events_of(run, EventKind.SERVER_DOWN)) == 1
    assert not [pid for pid in pids if os.path.exists(f"/proc/{pid}")]
    assert sorted(path.name for path in (run / "servers").iterdir()) == ["server-0.log", "server-1.log"]
