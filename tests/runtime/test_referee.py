"""The referee sees the store and the token table, and training does not see the referee."""

import asyncio
import json
import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from oldlogits.config import check, config_from_table
from oldlogits.core.policies import find_variant
from oldlogits.core.protocols import BatchTokens
from oldlogits.record.decisions import pooled
from oldlogits.record.events import EventKind, without_wall_clock
from oldlogits.record.report_data import read_run
from oldlogits.runtime.referee import Referee
from oldlogits.runtime.run import run
from oldlogits.train.step import UpdateResult

ENVIRONMENT = '''
class Parity:
    """Reward for turns of an odd number of words that end by themselves."""

    @staticmethod
    def make_row(split, index):
        return {}

    def reset(self, **row):
        self.reward = 0.0
        return "go"

    def look(self) -> str:
        """Look around."""
        return "nothing"

    def reply(self, message):
        self.reward = float(len(message.split()) % 2)

    def get_reward(self):
        return self.reward
'''
NUM_UPDATES = 4


@pytest.fixture
def lockstep(tmp_path, monkeypatch, tiny_folder):
    """``lockstep(name, variant, source, share)`` trains a small model in lockstep and returns the run folder."""
    (tmp_path / "parity.py").write_text(ENVIRONMENT)
    monkeypatch.syspath_prepend(tmp_path)

    def make(name: str, variant: str, source: dict, share: float, num_updates: int = NUM_UPDATES, resume: bool = False) -> Path:
        config = config_from_table(
            {
                "variant": variant,
                "band": 1.1,
                "num_updates": num_updates,
                "max_staleness": 2,
                "source": source,
                "referee": {"share": share},
                "model": {"path": str(tiny_folder)},
                "env": {"target": "parity:Parity", "max_turns": 1, "max_tokens_per_turn": 24, "max_tokens": 80},
                "engine": {"numerics": "int8"},
                "rollout": {"group_size": 4, "groups_per_version": 3},
                "trainer": {"lr": 5e-3, "warmup_steps": 0},
                "runtime": {"type": "lockstep", "window": 2, "tokens_per_version": 6},
                "eval": {"num_episodes": 0},
                "record": {"transcripts_every": 0, "checkpoint_every": 2},
            }
        )
        check(config)
        result = run(config, tmp_path / name, resume=resume)
        assert result.error is None
        return tmp_path / name

    return make


def events_of(folder):
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def model_of(folder, version=NUM_UPDATES):
    return load_file(folder / "checkpoints" / f"v{version:06d}" / "model" / "model.safetensors")


def table_of(folder, version):
    columns = pq.read_table(folder / "tokens" / f"v{version:06d}.parquet").to_pydict()
    return {name: np.array(values) for name, values in columns.items()}


def same_run(left, right):
    """Equal weights bit for bit, equal token tables, equal events but the referee's and the bytes of the store."""
    a, b = model_of(left), model_of(right)
    assert all(np.array_equal(a[name], b[name]) for name in a)
    for version in range(1, NUM_UPDATES + 1):
        one, other = table_of(left, version), table_of(right, version)
        assert all(np.array_equal(one[name], other[name]) for name in one)

    def plain(folder):
        for event in events_of(folder):
            if event["kind"] not in ("referee", "published"):
                yield {k: v for k, v in without_wall_clock(event).items() if k not in ("seq", "path")}

    assert list(plain(left)) == list(plain(right))


EWMA = {"type": "ewma", "decay": "mean-lag"}


@pytest.mark.parametrize(
    "variant, source", [("ppo_ewma_train_infer", EWMA), ("decoupled_async", {"type": "arrival"}), ("decoupled_exact", {})]
)
def test_with_the_referee_on_the_training_is_the_same_bit_for_bit(lockstep, variant, source):
    without, refereed = (lockstep(f"share{share}", variant, source, share) for share in (0.0, 1.0))
    same_run(without, refereed)
    start = model_of(without, 2)
    assert any(not np.array_equal(start[name], values) for name, values in model_of(without).items())
    kinds = [event["kind"] for event in events_of(refereed)]
    assert kinds.count("referee") == NUM_UPDATES
    assert "referee" not in [event["kind"] for event in events_of(without)]
    report = (refereed / "report.html").read_text()
    assert "<h2>The referee</h2>" in report
    assert "<h2>The referee</h2>" not in (without / "report.html").read_text()


def test_the_referee_finds_no_error_in_the_exact_route_and_the_lag_0_tokens_of_arrival_and_some_elsewhere(lockstep):
    exact = pooled(read_run(lockstep("exact", "decoupled_exact", {}, 1.0)).referee)
    arrival = pooled(read_run(lockstep("arrival", "decoupled_async", {"type": "arrival"}, 1.0)).referee)
    assert set(exact) == set(arrival) == {0, 1, 2}
    for sums in [*exact.values(), arrival[0]]:
        assert sums["logp_error"] / sums["num_compared"] < 1e-6
        assert sums["wrongly_kept"] == sums["wrongly_masked"] == 0
    for lag in (1, 2):
        assert arrival[lag]["logp_error"] / arrival[lag]["num_compared"] > 1e-3
    assert sum(arrival[lag]["wrongly_kept"] + arrival[lag]["wrongly_masked"] for lag in (1, 2)) > 0


def test_the_average_is_kept_through_a_checkpoint(lockstep):
    lockstep("resumed", "ppo_ewma_train_infer", EWMA, 0.0, num_updates=2)
    resumed = lockstep("resumed", "ppo_ewma_train_infer", EWMA, 0.0, resume=True)
    updates = [event for event in events_of(resumed) if event["kind"] == "update"]
    assert [event["metrics"]["average/num_versions"] for event in updates] == [1, 2, 3, 4]


# The referee alone, over a trainer and a result that are made up.


class Log:
    def __init__(self):
        self.events = []

    def emit(self, kind, *, version, **fields):
        self.events.append((kind, version, fields))


class Store:
    """OLD as given, by version."""

    def __init__(self, old):
        self.old, self.asked = np.float32(old), []

    async def score(self, tokens, at):
        self.asked.append((at, tokens.tolist()))
        return self.old[tokens]


def referee_of(old, share=1.0, variant="ppo_ewma_train_infer"):
    table = {"variant": variant, "source": {"type": "ewma"}, "referee": {"share": share}, "band": 1.1, "max_staleness": 2}
    log, store = Log(), Store(old)
    return Referee(config_from_table(table), store, log, lambda: 0.0), log, store


@pytest.mark.parametrize("share, due", [(0.0, []), (0.25, [3, 7, 11]), (0.5, [1, 3, 5, 7, 9, 11]), (1.0, list(range(12)))])
def test_the_refereed_batches_are_an_evenly_spaced_share(share, due):
    referee, _, _ = referee_of([], share)
    assert [version for version in range(12) if referee.is_due(version)] == due


def test_a_batch_that_is_not_refereed_costs_nothing_and_leaves_no_event():
    referee, log, store = referee_of([-1.0], 0.25)
    batch = BatchTokens(versions=np.array([0]), trajectory_ids=("g0.0",), trainer_version=0)
    assert asyncio.run(referee.exact(batch)) is None
    referee.judge(None, result_of([]), version=1)
    assert store.asked == log.events == []


def result_of(tokens):
    """Tokens: (log mu, log stand-in, log theta, advantage, active, staleness)."""
    names = ("logp_mu", "logp_stand_in", "logp_theta", "advantage", "active_mask", "staleness")
    kinds = (np.float32, np.float32, np.float32, np.float32, np.bool_, np.int32)
    columns = zip(*tokens, strict=True) if tokens else [()] * 6
    table = {name: np.array(column, kind) for name, kind, column in zip(names, kinds, columns, strict=True)}
    table["loss_mask"] = np.ones(len(tokens), np.bool_)
    return UpdateResult(metrics={}, staleness_counts={}, provenance={}, lag0_max_abs_error=math.nan, table=table)


def test_an_event_holds_the_sums_by_staleness_with_the_exact_rows_active_set():
    log = math.log
    tokens = [  # band 1.1 on old/mu, then theta/old clipped at 1.28 for A > 0
        (-1.0, -1.0, -1.0, 1.0, True, 0),  # old = mu: active under both; R = 1
        (-1.0, -1.0, -1.0 + log(1.2), 1.0, True, 2),  # old 20% off mu: masked by the band: wrongly kept, R A = 1.2
        (-1.0, -1.0 + log(1.2), -1.0, -2.0, False, 2),  # old = mu, r_s = 1: wrongly masked, R |A| = 2
        (-1.0, -1.0 + log(1.2), -1.0, 0.0, False, 2),  # the same with A = 0
        (-1.0, -1.0, -1.0 + log(1.4), 1.0, False, 2),  # clipped under both
    ]
    old = [-1.0, -1.0 + log(1.2), -1.0, -1.0, -1.0]
    referee, record, store = referee_of(old)
    batch = BatchTokens(versions=np.array([5, 3, 3, 3, 3]), trajectory_ids=("g0.0",), trainer_version=5)
    exact = asyncio.run(referee.exact(batch))
    assert store.asked == [(3, [1, 2, 3, 4]), (5, [0])]
    referee.judge(exact, result_of(tokens), version=6)
    ((kind, version, fields),) = record.events
    assert (kind, version, fields.pop("policy"), fields.pop("seconds_s")) == (EventKind.REFEREE, 6, "ewma", 0.0)
    expected = {
        "num_tokens": [1, 0, 4], "num_nonzero": [1, 0, 3], "num_compared": [1, 0, 4],
        "logp_error": [0, 0, 3 * log(1.2)],
        "wrongly_kept": [0, 0, 1], "wrongly_masked": [0, 0, 2],
        "wrongly_kept_nonzero": [0, 0, 1], "wrongly_masked_nonzero": [0, 0, 1],
        "weight": [1, 0, 2], "weight_wrongly_kept": [0, 0, 1.2], "weight_wrongly_masked": [0, 0, 2],
    }  # fmt: skip
    assert fields.keys() == expected.keys()
    for name, values in expected.items():
        assert fields[name] == pytest.approx(values, abs=1e-5), name


def test_where_r_d_is_one_the_exact_row_has_no_band_either():
    tokens = [(-1.0, -1.0, -1.0, 1.0, True, 0)]
    for variant, wrongly_kept in (("ppo_ewma", 0), ("ppo_ewma_train_infer", 1)):
        referee, record, _ = referee_of([-1.2], variant=variant)
        assert find_variant(variant).corrects_mismatch == bool(wrongly_kept)
        batch = BatchTokens(versions=np.array([0]), trajectory_ids=("g0.0",), trainer_version=0)
        referee.judge(asyncio.run(referee.exact(batch)), result_of(tokens), version=1)
        assert record.events[0][2]["wrongly_kept"] == [wrongly_kept, 0, 0]


def test_sums_of_several_events_are_pooled_by_staleness_without_the_empty_ones(lockstep):
    folder = lockstep("half", "ppo_ewma_train_infer", EWMA, 0.5)
    events = [event for event in events_of(folder) if event["kind"] == "referee"]
    assert [event["version"] for event in events] == [2, 4]
    found = pooled(read_run(folder).referee)
    for lag, sums in found.items():
        for name, value in sums.items():
            assert value == pytest.approx(sum(event[name][lag] for event in events))
    seen = {lag for event in events for lag, n in enumerate(event["num_tokens"]) if n}
    assert set(found) == seen
