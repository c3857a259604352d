"""The audit sees the store and the token table, and training does not see the audit."""

import asyncio
import json
import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from oldlogits.config.check import check
from oldlogits.config.load import config_from_table
from oldlogits.core.policies import find_variant
from oldlogits.core.scoring import BatchTokens
from oldlogits.loop.audit import ExactAudit
from oldlogits.record.report.data import read_run
from oldlogits.record.report.decisions import pooled
from oldlogits.run.run import run
from oldlogits.train.step import UpdateResult
from oldlogits.train.weights.average import AverageReset
from tests.memory_log import without_wall_clock

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

    def make(
        name: str,
        variant: str,
        source: dict,
        share: float,
        num_updates: int = NUM_UPDATES,
        resume: bool = False,
        steps: int = 2,
    ) -> Path:
        config = config_from_table(
            {
                "variant": variant,
                "band": 1.1,
                "num_updates": num_updates,
                "max_staleness": 2,
                "proximal": source,
                "audit": {"share": share},
                "model": {"path": str(tiny_folder)},
                "env": {"target": "parity:Parity", "max_turns": 1, "max_tokens_per_turn": 24, "max_episode_tokens": 80},
                "engine": {"precision": "int8"},
                "rollout": {"group_size": 4, "prompts_per_update": 3},
                "trainer": {"lr": 5e-3, "warmup_steps": 0, "minibatches_per_update": steps},
                "runtime": {"type": "lockstep"},
                "lockstep": {"max_lag": 2, "tokens_per_version": 6},
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
    return {name: np.array(values, dtype=object if name == "context" else None) for name, values in columns.items()}


def same_run(left, right):
    """Equal weights bit for bit, equal token tables, equal events but what the audit tells and the bytes of the store."""
    a, b = model_of(left), model_of(right)
    assert all(np.array_equal(a[name], b[name]) for name in a)
    for version in range(1, NUM_UPDATES + 1):
        one, other = table_of(left, version), table_of(right, version)
        assert all(np.array_equal(one[name], other[name]) for name in one)

    def plain(folder):
        for event in events_of(folder):
            event.get("metrics", {}).pop("copies/trainer", None)  # the bytes of the store again
            if event["kind"] not in ("audit", "published"):
                yield {
                    k: v for k, v in without_wall_clock(event).items() if k not in ("seq", "path", "bytes", *CHECKED, *EFFECT)
                }

    assert list(plain(left)) == list(plain(right))


EWMA = {"source": "ewma", "decay": "mean-lag"}
RESET = {"source": "ewma", "decay": "fixed", "beta": 0.8, "reset": "paper", "reset_below": 0.9}
CHECKED = ("consistency_publish_max_abs_error", "num_digests")  # the audit checks versions out, and each checkout is checked
EFFECT = ("error_before", "error_after", "weight_error_before", "weight_error_after")


@pytest.mark.slow
@pytest.mark.parametrize(
    "variant, source",
    [
        ("ppo_ewma_train_infer", EWMA),
        ("ppo_ewma_train_infer", RESET),
        ("decoupled_async", {"source": "arrival"}),
        ("decoupled_exact", {}),
    ],
)
def test_with_the_audit_on_the_training_is_the_same_bit_for_bit(lockstep, variant, source):
    without, audited = (lockstep(f"share{share}", variant, source, share) for share in (0.0, 1.0))
    same_run(without, audited)
    start = model_of(without, 2)
    assert any(not np.array_equal(start[name], values) for name, values in model_of(without).items())
    kinds = [event["kind"] for event in events_of(audited)]
    assert kinds.count("audit") == NUM_UPDATES
    assert "audit" not in [event["kind"] for event in events_of(without)]
    report = (audited / "report.html").read_text()
    assert "<h2>The exact audit</h2>" in report
    assert "<h2>The exact audit</h2>" not in (without / "report.html").read_text()
    for folder in (without, audited):
        assert (0 < len(resets_of(folder)) < NUM_UPDATES) == ("reset" in source)


@pytest.mark.slow
def test_the_audit_finds_no_error_in_the_exact_route_and_the_lag_0_tokens_of_arrival_and_some_elsewhere(lockstep):
    exact = pooled(read_run(lockstep("exact", "decoupled_exact", {}, 1.0)).audits)
    arrival = pooled(read_run(lockstep("arrival", "decoupled_async", {"source": "arrival"}, 1.0)).audits)
    assert set(exact) == set(arrival) == {0, 1, 2}
    for sums in [*exact.values(), arrival[0]]:
        assert sums["logp_error"] / sums["num_compared"] < 1e-6
        assert sums["wrongly_kept"] == sums["wrongly_masked"] == 0
    for lag in (1, 2):
        assert arrival[lag]["logp_error"] / arrival[lag]["num_compared"] > 1e-3
    assert sum(arrival[lag]["wrongly_kept"] + arrival[lag]["wrongly_masked"] for lag in (1, 2)) > 0


def resets_of(folder):
    return [event for event in events_of(folder) if event["kind"] == "average_reset"]


@pytest.mark.slow
@pytest.mark.parametrize("source", ["ewma", "aged"])
def test_a_reset_has_the_decision_error_of_its_batch_and_that_of_the_weights_before_its_steps(lockstep, source, monkeypatch):
    seen = []

    async def score(audit, batch):
        seen.append(await real(audit, batch))
        return seen[-1]

    real = ExactAudit.score
    monkeypatch.setattr(ExactAudit, "score", score)
    variant = f"{'ppo_ewma' if source == 'ewma' else 'aged'}_train_infer"
    folder = lockstep("reset", variant, RESET | {"source": source}, 1.0, steps=1)
    for version, scores in enumerate(seen, 1):  # one step: theta is what these weights give
        np.testing.assert_allclose(scores.live, table_of(folder, version)["logp_theta"], rtol=0, atol=1e-5)
    audit = {event["version"]: event for event in events_of(folder) if event["kind"] == "audit"}
    resets = resets_of(folder)
    for event in resets:
        sums = {name: sum(values) for name, values in audit[event["version"]].items() if isinstance(values, list)}
        differing, weight = (sums[f"{w}wrongly_kept"] + sums[f"{w}wrongly_masked"] for w in ("", "weight_"))
        assert event["error_before"] == pytest.approx(differing / sums["num_tokens"])
        assert event["weight_error_before"] == pytest.approx(weight / sums["weight"])
        table, old = table_of(folder, event["version"]), seen[event["version"] - 1].old
        inside = {
            name: np.abs(logp - table["logp_mu"]) <= np.log(1.1) for name, logp in (("live", table["logp_theta"]), ("old", old))
        }
        log_r_s, positive, negative = table["logp_theta"] - old, table["advantage"] > 0, table["advantage"] < 0
        clipped = (positive & (log_r_s > np.log(1.28))) | (negative & ((log_r_s < np.log(0.8)) | (log_r_s > np.log(3))))
        exact = inside["old"] & ~clipped
        assert event["error_after"] == pytest.approx(np.mean(inside["live"] != exact))
        weights = np.exp(table["logp_theta"] - table["logp_mu"]) * np.abs(table["advantage"])
        assert event["weight_error_after"] == pytest.approx(weights[inside["live"] != exact].sum() / weights[exact].sum())
    assert any(event["error_before"] != event["error_after"] for event in resets)


@pytest.mark.slow
def test_a_reset_whose_batch_is_not_audited_has_no_decision_error(lockstep):
    folder = lockstep("some", "ppo_ewma_train_infer", RESET, 0.5)
    found = {event["version"]: [event[name] for name in EFFECT] for event in resets_of(folder)}
    assert set(found) == {3, 4}
    assert found[3] == [None] * 4
    before, after, weight_before, weight_after = found[4]
    assert before == after > 0, "the average was reset at the publish of this batch's version: it is the live weights"
    assert weight_before == weight_after > 0


@pytest.mark.slow
def test_the_average_is_kept_through_a_checkpoint(lockstep):
    lockstep("resumed", "ppo_ewma_train_infer", EWMA, 0.0, num_updates=2)
    resumed = lockstep("resumed", "ppo_ewma_train_infer", EWMA, 0.0, resume=True)
    updates = [event for event in events_of(resumed) if event["kind"] == "update"]
    assert [event["metrics"]["average/num_versions"] for event in updates] == [1, 2, 3, 4]


# The audit alone, over a trainer and a result that are made up.


class Log:
    def __init__(self):
        self.events = []

    def emit(self, event):
        self.events.append((event.kind, event.version, dict(event.recorded())))


class Store:
    """OLD as given, by version; and the live weights."""

    def __init__(self, old, live):
        self.old, self.live, self.asked = np.float32(old), np.float32(live), []

    async def score(self, tokens, at):
        self.asked.append((at, tokens.tolist()))
        return (self.live if at is None else self.old)[tokens]


def audit_of(old, share=1.0, variant="ppo_ewma_train_infer", reset="none", live=(), eps_high=0.28):
    table = {"variant": variant, "proximal": {"source": "ewma", "reset": reset}, "audit": {"share": share}}
    table |= {"band": 1.1, "max_staleness": 2, "objective": {"eps_high": eps_high}}
    log, store = Log(), Store(old, live)
    return ExactAudit.of(config_from_table(table), store, log, lambda: 0.0), log, store


@pytest.mark.parametrize("share, due", [(0.0, []), (0.25, [3, 7, 11]), (0.5, [1, 3, 5, 7, 9, 11]), (1.0, list(range(12)))])
def test_the_audited_batches_are_an_evenly_spaced_share(share, due):
    audit, _, _ = audit_of([], share)
    assert [version for version in range(12) if audit.is_due(version)] == due


def test_a_batch_that_is_not_audited_costs_nothing_and_leaves_no_event():
    audit, log, store = audit_of([-1.0], 0.25)
    batch = BatchTokens(versions=np.array([0]), trajectory_ids=("g0.0",), trainer_version=0)
    assert asyncio.run(audit.score(batch)) is None
    assert audit.judge(None, result_of([], RESET_AFTER), version=1) == {}
    assert store.asked == log.events == []


RESET_AFTER = AverageReset(rule="paper", rho=0.8, tau=0.9, kept_average=0.7, kept_live=0.8, age=1.5)


def result_of(tokens, reset=None):
    """Tokens: (log mu, log proximal, log theta, advantage, active, staleness)."""
    names = ("logp_mu", "logp_proximal", "logp_theta", "advantage", "active_mask", "staleness")
    kinds = (np.float32, np.float32, np.float32, np.float32, np.bool_, np.int32)
    columns = zip(*tokens, strict=True) if tokens else [()] * 6
    table = {name: np.array(column, kind) for name, kind, column in zip(names, kinds, columns, strict=True)}
    table["loss_mask"] = np.ones(len(tokens), np.bool_)
    table["trajectory"] = np.array(["g0.0"] * len(tokens))
    return UpdateResult(
        metrics={}, staleness_counts={}, provenance={}, lag0_max_abs_error=math.nan, table=table, average_reset=reset
    )


LOG_1_2 = math.log(1.2)
TOKENS = [  # band 1.1 on old/mu, then theta/old clipped at 1.28 for A > 0
    (-1.0, -1.0, -1.0, 1.0, True, 0),  # old = mu: active under both; R = 1
    (-1.0, -1.0, -1.0 + LOG_1_2, 1.0, True, 2),  # old 20% off mu: masked by the band: wrongly kept, R A = 1.2
    (-1.0, -1.0 + LOG_1_2, -1.0, -2.0, False, 2),  # old = mu, r_s = 1: wrongly masked, R |A| = 2
    (-1.0, -1.0 + LOG_1_2, -1.0, 0.0, False, 2),  # the same with A = 0
    (-1.0, -1.0, -1.0 + math.log(1.4), 1.0, False, 2),  # clipped under both
]
OLD = [-1.0, -1.0 + LOG_1_2, -1.0, -1.0, -1.0]
BATCH = BatchTokens(versions=np.array([5, 3, 3, 3, 3]), trajectory_ids=("g0.0",), trainer_version=5)


def test_an_event_holds_the_sums_by_staleness_with_the_exact_rows_active_set():
    audit, record, store = audit_of(OLD)
    scores = asyncio.run(audit.score(BATCH))
    assert store.asked == [(3, [1, 2, 3, 4]), (5, [0])]
    assert audit.judge(scores, result_of(TOKENS), version=6) == {}
    ((kind, version, fields),) = record.events
    assert (kind, version, fields.pop("policy"), fields.pop("seconds_s")) == ("audit", 6, "ewma", 0.0)
    expected = {
        "num_tokens": [1, 0, 4], "num_nonzero": [1, 0, 3], "num_compared": [1, 0, 4],
        "logp_error": [0, 0, 3 * LOG_1_2],
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
        audit, record, _ = audit_of([-1.2], variant=variant)
        assert find_variant(variant).corrects_mismatch == bool(wrongly_kept)
        batch = BatchTokens(versions=np.array([0]), trajectory_ids=("g0.0",), trainer_version=0)
        audit.judge(asyncio.run(audit.score(batch)), result_of(tokens), version=1)
        assert record.events[0][2]["wrongly_kept"] == [wrongly_kept, 0, 0]


def test_the_audit_judges_under_the_recipes_clip():
    """A = 1, theta/old = 1.4: clipped by 1 + 0.28, kept by 1 + 0.5; the source in use says active."""
    tokens = [(-1.0, -1.0, -1.0 + math.log(1.4), 1.0, True, 0)]
    batch = BatchTokens(versions=np.array([0]), trajectory_ids=("g0.0",), trainer_version=0)
    for eps_high, wrongly_kept in ((0.28, 1), (0.5, 0)):
        audit, record, _ = audit_of([-1.0], eps_high=eps_high)
        audit.judge(asyncio.run(audit.score(batch)), result_of(tokens), version=1)
        assert record.events[0][2]["wrongly_kept"] == [wrongly_kept, 0, 0]


def test_the_effect_of_a_reset_is_the_decision_error_with_the_live_weights_in_place_of_the_average():
    live = [-1.0, -1.0 + LOG_1_2, -1.0, -1.0 + LOG_1_2, -1.0 + LOG_1_2]  # wrong about the fourth token only, whose A is 0:
    audit, record, store = audit_of(OLD, reset="paper", live=live)  # the last is masked by the band, in place of the clip
    scores = asyncio.run(audit.score(BATCH))
    assert store.asked == [(3, [1, 2, 3, 4]), (5, [0]), (None, [0, 1, 2, 3, 4])]
    effect = audit.judge(scores, result_of(TOKENS, RESET_AFTER), version=6)
    assert (effect["error_before"], effect["error_after"]) == pytest.approx((3 / 5, 1 / 5))
    assert (effect["weight_error_before"], effect["weight_error_after"]) == pytest.approx(((1.2 + 2) / 3, 0), abs=1e-6)
    assert len(record.events) == 1
    assert audit.judge(scores, result_of(TOKENS), version=7) == {}, "no reset, no effect"


@pytest.mark.parametrize("variant, reset", [("ppo_ewma_train_infer", "none"), ("ppo_clip_train_infer", "paper")])
def test_the_live_weights_are_scored_only_where_a_reset_may_put_them_into_the_objective(variant, reset):
    audit, _, store = audit_of(OLD, variant=variant, reset=reset)
    assert asyncio.run(audit.score(BATCH)).live is None
    assert None not in [at for at, _ in store.asked]


@pytest.mark.slow
def test_sums_of_several_events_are_pooled_by_staleness_without_the_empty_ones(lockstep):
    folder = lockstep("half", "ppo_ewma_train_infer", EWMA, 0.5)
    events = [event for event in events_of(folder) if event["kind"] == "audit"]
    assert [event["version"] for event in events] == [2, 4]
    found = pooled(read_run(folder).audits)
    for lag, sums in found.items():
        for name, value in sums.items():
            assert value == pytest.approx(sum(event[name][lag] for event in events))
    seen = {lag for event in events for lag, n in enumerate(event["num_tokens"]) if n}
    assert set(found) == seen
