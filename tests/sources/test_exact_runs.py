"""Whole runs under each exact route: the same run in lockstep; exact and accounted for with real processes."""

import json
import multiprocessing
import os
import signal

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from oldlogits.config.check import check
from oldlogits.config.load import config_from_table
from oldlogits.core.errors import ConfigError, WorkerDiedError
from oldlogits.core.source import SourceHandles
from oldlogits.loop import make
from oldlogits.loop.weight_sync import check_partials
from oldlogits.run.run import run
from oldlogits.sources.none import NoSource

from ..runs import after_updates

EXACT = ("snapshot", "eager", "interruption", "dedicated")

GAME = '''
class Game:
    """Three turns; the reward is drawn from what the agent wrote, and some tasks cannot be played."""

    system_prompt = "x"

    def reset(self, *, task):
        if task % 7 == 3:
            raise RuntimeError("no such game")
        self.said = ""
        self.uniform = task % 5 == 1
        return "go"

    def reply(self, message):
        self.said += message + "|"
        return None if self.said.count("|") == 3 else "on"

    def get_reward(self):
        return 0.0 if self.uniform else float(sum(map(ord, self.said)) % 4) / 3

    def look(self):
        """Look."""
        return "nothing"
'''


@pytest.fixture
def play(tmp_path, monkeypatch, chatml_llama):
    """Run a recipe under a route: the result, the source that fed it, and the run folder."""
    (tmp_path / "route_game.py").write_text(GAME)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"task": i}) + "\n" for i in range(100)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    sources = []

    def remember(*arguments):
        sources.append(make_source(*arguments))
        return sources[-1]

    make_source = make.make_source
    monkeypatch.setattr(make, "make_source", remember)

    def played(route, runtime, **more):
        table = {
            "num_updates": 6,
            "max_staleness": 3,
            "proximal": {"source": route},
            "model": {"path": str(chatml_llama)},
            "env": {"target": "route_game:Game", "train_data": str(rows), "eval_data": str(rows)}
            | {"max_tokens_per_turn": 12, "max_episode_tokens": 160, **more.pop("env", {})},
            "rollout": {"group_size": 4, "prompts_per_update": 3, "filter_uniform": True},
            "trainer": {"lr": 1e-3, "warmup_steps": 0},
            "runtime": {"type": runtime},
            "lockstep": {"lag": "random", "max_lag": 3, "tokens_per_version": 8},
            "eval": {"num_episodes": 0},
            **more,
        }
        config = config_from_table(table)
        check(config)
        out = tmp_path / route
        result = run(config, out)
        return result, sources[-1], out

    return played


def events_of(out, kind):
    found = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    return [event for event in found if event["kind"] == kind]


def tables_of(out):
    return [pq.read_table(path).to_pydict() for path in sorted((out / "tokens").iterdir())]


def weights_of(out):
    (model,) = out.glob("checkpoints/*/model/model.safetensors")
    return load_file(model)


def assert_settled(result, source):
    """Every trajectory is accounted for, and the source holds none of them."""
    account = result.summary.accounting
    assert account["submitted"] == sum(n for name, n in account.items() if name != "submitted")
    assert account["queued"] == account["running"] == 0
    assert len(source.in_flight) == 0


@pytest.mark.slow
def test_in_lockstep_training_is_the_same_run_under_every_exact_route(play):
    runs = {}
    for route in EXACT:
        result, source, out = play(route, "lockstep", seed=2)
        assert result.error is None
        if route != "snapshot":
            assert_settled(result, source)
        account = result.summary.accounting
        assert min(account["failed"], account["filtered"], account["trained"]) > 0
        assert result.summary.consistency_publish_max_abs_error <= 1e-5
        assert result.summary.consistency_lag0_max_abs_error <= 1e-5
        assert result.summary.provenance.keys() == {"exact"}
        runs[route] = (weights_of(out), tables_of(out), account, [e["bytes"] for e in events_of(out, "published")])
    weights, tables, account, _ = runs.pop("snapshot")
    assert sum(len(set(t["staleness"])) for t in tables) > 8
    assert max(np.abs(t["log_r_s"]).max() for t in tables) > 1e-3, "the policy moves"
    for other_weights, other_tables, other_account, _ in runs.values():
        assert max(np.abs(w - other_weights[name]).max() for name, w in weights.items()) <= 1e-6
        assert account == other_account
        for table, other in zip(tables, other_tables, strict=True):
            for column in ("trajectory", "index", "token_id", "version", "staleness", "provenance", "active_mask"):
                assert table[column] == other[column]
            for column in ("logp_mu", "logp_proximal", "logp_theta", "log_r_d", "log_r_s"):
                np.testing.assert_allclose(table[column], other[column], rtol=0, atol=1e-5)
    one, *others = runs["eager"][3]
    assert all(1.9 * one < num_bytes < 2.1 * one for num_bytes in others), "a resident copy, and the patch of one version"
    assert runs["interruption"][3] == [0] * 7


@pytest.mark.slow
@pytest.mark.parametrize("route", ["eager", "interruption"])
def test_a_route_is_exact_with_processes_of_its_own(route, play):
    result, source, out = play(route, "local", env={"latency_s": 0.01})
    assert result.error is None
    assert_settled(result, source)
    assert result.summary.consistency_publish_max_abs_error <= 1e-5
    assert_exact(out)
    updates = events_of(out, "update")
    assert all(update["metrics"]["source/fallback_tokens"] == 0 for update in updates)
    assert all(update["metrics"]["time/stall_s"] > 0 for update in updates)


def assert_exact(out):
    """An fp32 engine gives a token what the trainer gives it at that version, and nothing else."""
    tables = tables_of(out)
    assert max(np.abs(np.subtract(t["logp_proximal"], t["logp_mu"])).max() for t in tables) < 5e-5
    stale = [abs(s) for t in tables for s, lag in zip(t["log_r_s"], t["staleness"], strict=True) if lag]
    assert max(stale) > 1e-3, "the versions differ, or nothing was tested"


@pytest.mark.slow
def test_a_dedicated_scorer_is_exact_until_it_is_killed_and_the_run_then_ends_cleanly(play, tmp_path):
    def kill():
        (scorer,) = [child for child in multiprocessing.active_children() if child.name == "oldlogits-scorer"]
        os.kill(scorer.pid, signal.SIGKILL)

    killer = after_updates(tmp_path / "dedicated", 3, kill)
    result, source, out = play("dedicated", "local", num_updates=500, env={"latency_s": 0.01})
    killer.join()
    assert isinstance(result.error, WorkerDiedError)
    assert str(result.error).startswith("the scorer process ended; got: exit code -9")
    assert result.summary.ended == "error"
    assert result.summary.num_updates >= 3
    assert_settled(result, source)
    assert_exact(out)
    assert [event["reason"] for event in events_of(out, "run_ended")] == ["error"]
    assert [child for child in multiprocessing.active_children() if child.name.startswith("oldlogits")] == []
    metrics = [update["metrics"] for update in events_of(out, "update")]
    assert sum(m["source/score_s"] for m in metrics) > 0
    assert max(m["source/resident_copies"] for m in metrics) == 2


def test_a_route_that_needs_the_pause_is_refused_where_the_engine_does_not_tell_what_it_has_sampled():
    class Source(NoSource):
        needs_pause = True

    class Engine:
        class capabilities:
            partials = False

    with pytest.raises(ConfigError, match="Source scores what running turns have sampled"):
        check_partials(Source(SourceHandles(trainer=None)), Engine)
    check_partials(NoSource(SourceHandles(trainer=None)), Engine)
