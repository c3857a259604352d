"""An average that follows audits: what is measured of a batch, the beta it chooses, the error it expects, when it is reset."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oldlogits.config.load import config_from_table
from oldlogits.core.loss import LOSSES
from oldlogits.core.policies import EWMA
from oldlogits.core.scoring import AuditScores, Scored
from oldlogits.run.specs import trainer_spec
from oldlogits.train.audited import AuditedUpdate, Judge, LagSums
from oldlogits.train.spec import objective_of
from oldlogits.train.trainer import Trainer
from oldlogits.train.weights.average import RECENT_AUDITS, Averaging
from oldlogits.versions import best_beta, growth_exponent, measured_growth

from ..builders import batch_of, sampled, trajectory

WINDOW = 4
NUM_LAGS = WINDOW + 1
GOOD = {"mask/rho": 0.99, "mask/rho_band_first": 0.95, "mask/rho_band_live": 0.97}
WORSE = {"error_before": 0.3, "error_after": 0.2, "weight_error_before": 0.3, "weight_error_after": 0.2}
LAGS = {0: 20, 1: 10, 2: 8, 3: 6, 4: 12}
RECENT = 4 * np.array(list(LAGS.values()))  # of the last four updates


def weights_at(version):
    return {"x": torch.tensor([float(version)])}


def averaging(decay="audited", **more):
    table = {"variant": "ppo_ewma_train_infer", "max_staleness": WINDOW, "audit": {"share": 1.0}}
    config = config_from_table({**table, "proximal": {"source": "ewma", "decay": decay, **more}})
    return Averaging(config.proximal, config.window, weights_at(0))


def lag_sums(means, num=100):
    counts = np.full(NUM_LAGS, num)
    return LagSums(counts=counts, squares=counts * np.array(means, float))


def audit(growth, average=(0.0,) * NUM_LAGS, errors=None):
    """An audit of 100 tokens of each lag whose mean squared changes are `growth`."""
    return AuditedUpdate(live=lag_sums(growth), average=lag_sums(average), errors=errors or {})


def powers(exponent, unit=1.0):
    return unit * np.arange(NUM_LAGS) ** exponent


def beta(average, version, found=None, counts=None):
    told, _ = average.take_in(weights_at(version), version, GOOD, counts or LAGS, found)
    return told["average/beta"]


def test_before_the_first_audit_it_is_auto_and_after_it_the_best_for_what_was_measured():
    audited, auto = averaging(), averaging("auto")
    speeds = np.random.default_rng(0).standard_normal(7).astype(np.float32)
    for version in range(1, 8):
        for one in (audited, auto):
            one.note_probe(version - 1, version * speeds)
        assert beta(audited, version) == beta(auto, version)
    assert growth_exponent(np.array(list(audited._probes.values()), np.float64), WINDOW) == pytest.approx(2)
    walk = audit(powers(1))
    assert beta(audited, 8, walk) == best_beta(RECENT, 1.0) != best_beta(RECENT, 2.0) == beta(auto, 8, walk)
    assert beta(audited, 9) == best_beta(RECENT, 1.0), "it remembers the audit"


def test_audits_in_which_nothing_is_stale_say_nothing():
    alone, auto = averaging(), averaging("auto")
    fresh = LagSums(counts=np.array([50, 0, 0, 0, 0]), squares=np.zeros(NUM_LAGS))
    found = AuditedUpdate(live=fresh, average=fresh, errors={})
    for version in range(1, 4):
        assert beta(alone, version, found) == beta(auto, version)


def test_recent_audits_are_pooled_by_their_tokens_and_older_ones_are_forgotten():
    audited = averaging()
    beta(audited, 1, audit(powers(2, unit=1e6)))
    recent = [lag_sums(powers(1), 10), lag_sums(powers(2), 70), lag_sums(powers(1.5), 5), lag_sums(powers(2), 30)]
    for version, live in enumerate(recent, 2):
        last = beta(audited, version, AuditedUpdate(live=live, average=lag_sums(powers(1)), errors={}))
    assert len(recent) == RECENT_AUDITS
    counts = [10 + 70 + 5 + 30] * NUM_LAGS
    squares = [10 * h + 70 * h**2 + 5 * h**1.5 + 30 * h**2 for h in range(NUM_LAGS)]
    assert last == best_beta(RECENT, measured_growth(np.array(counts), np.array(squares)))


def test_other_decays_are_told_what_was_measured_and_choose_as_without():
    fixed = averaging("fixed", beta=0.5)
    told, _ = fixed.take_in(weights_at(1), 1, GOOD, LAGS, audit(powers(2), average=powers(1)))
    assert told["average/beta"] == 0.5
    assert told["average/error_live@lag3"] == pytest.approx(3)
    assert told["average/error_measured@lag4"] == pytest.approx(2)


def scalar_expected(betas, growth, lag):
    """E_l of the average after these betas, from weights that are the products of later betas, by two loops."""
    products = [math.prod(betas[k:]) for k in range(len(betas) + 1)][::-1]  # newest first
    shares = [p / sum(products) for p in products]
    first = sum(w * growth(abs(j - lag)) for j, w in enumerate(shares))
    return first - sum(w * u * growth(abs(j - k)) for j, w in enumerate(shares) for k, u in enumerate(shares)) / 2


@given(st.floats(1, 2), st.floats(1e-4, 10), st.integers(1, 6), st.floats(0, 0.2))
@settings(max_examples=20, deadline=None)
def test_the_expected_error_is_that_of_the_versions_in_the_average_from_audits_before(exponent, unit, num, noise):
    """Two scores of one version differ by the noise, and so do the average's and OLD's."""
    average = averaging()
    betas = [beta(average, version) for version in range(1, num + 1)]
    average.take_in(weights_at(0), 0, GOOD, LAGS, audit(noise + powers(exponent, unit)))  # counts as one version more
    betas.append(average._choose_beta()["average/beta"])
    told, _ = average.take_in(weights_at(9), 9, GOOD, LAGS, audit(powers(2, 7.0), average=powers(1, 3.0)))
    for lag in range(NUM_LAGS):
        expected = scalar_expected(betas, lambda h: unit * h**exponent, lag) + noise
        assert told[f"average/error_predicted@lag{lag}"] ** 2 == pytest.approx(expected, rel=1e-6, abs=1e-9 * unit)
        if lag:
            assert told[f"average/error_measured@lag{lag}"] ** 2 == pytest.approx(3 * lag)
    mean = np.mean([told[f"average/error_predicted@lag{lag}"] ** 2 for lag in range(NUM_LAGS)])
    assert told["average/error_predicted"] ** 2 == pytest.approx(mean)
    assert told["average/error_measured"] ** 2 == pytest.approx(3 * 2)


def test_without_an_audit_before_there_is_nothing_to_expect_and_without_one_now_nothing_is_told():
    average = averaging()
    first, _ = average.take_in(weights_at(1), 1, GOOD, LAGS, audit(powers(1)))
    none, _ = average.take_in(weights_at(2), 2, GOOD, LAGS)
    second, _ = average.take_in(weights_at(3), 3, GOOD, LAGS, audit(powers(1)))
    told = [{name.partition("@")[0] for name in one if name.startswith("average/error")} for one in (first, none, second)]
    both = {"average/error_measured", "average/error_live"}
    assert told == [both, set(), both | {"average/error_predicted"}]


def test_under_exact_drift_the_average_knows_its_error():
    """Log-probs that move by 0.1 a version: what the average misses is |lag - age| times that, and it says so before."""
    average = averaging()
    for version in range(1, 12):
        age, told = average.average.age, average.take_in(weights_at(version), version, GOOD, LAGS)[0]
        missed = [(0.1 * (lag - average.average.age)) ** 2 for lag in range(NUM_LAGS)]
        found = audit(powers(2, 0.01), average=missed)
        expected = average._errors(found) if version > 4 else {}
        if expected:
            for lag in range(NUM_LAGS):
                predicted, measured = (expected[f"average/error_{name}@lag{lag}"] for name in ("predicted", "measured"))
                assert predicted == pytest.approx(measured, abs=1e-6)
        assert told["average/age"] == age
        average._audits.append(found.live)


def test_the_audited_rule_resets_where_the_live_weights_would_have_decided_better_by_count_and_by_weight():
    def reset(errors, version=1, average=None):
        found = audit(powers(1), errors=errors) if errors is not None else None
        return (average or averaging(reset="audited")).take_in(weights_at(version), version, GOOD, LAGS, found)[1]

    assert reset(WORSE).rule == "audited"
    for name, value in (("error_after", 0.3), ("weight_error_after", 0.3), ("weight_error_after", math.nan)):
        assert reset(WORSE | {name: value}) is None
    assert reset({}) is None
    assert reset(None) is None
    average = averaging("fixed", beta=0.5, reset="audited")
    assert [reset(errors, v, average) is not None for v, errors in enumerate([None, WORSE, WORSE, None], 1)] == [0, 1, 1, 0]
    assert average.average.num_versions == 2


def test_after_a_reset_the_expected_error_is_that_of_the_live_weights():
    average = averaging(reset="audited")
    for version in range(1, 5):
        average.take_in(weights_at(version), version, GOOD, LAGS, audit(powers(2)))
    average.take_in(weights_at(5), 5, GOOD, LAGS, audit(powers(2), errors=WORSE))
    told, _ = average.take_in(weights_at(6), 6, GOOD, LAGS, audit(powers(2)))
    assert [told[f"average/error_predicted@lag{lag}"] for lag in range(NUM_LAGS)] == pytest.approx(list(range(NUM_LAGS)))


@pytest.mark.parametrize("num_before", [0, 1, 6])
def test_a_restored_average_expects_chooses_and_resets_as_if_there_had_been_no_break(num_before):
    straight, restored = averaging(reset="audited"), averaging(reset="audited")

    def update(average, version):
        average.note_probe(version - 1, np.float32([0.1, -0.2, 0.3]) * version**1.5)
        found = audit(powers(1 + version / 20), errors=WORSE if version == 5 else {}) if version % 2 else None
        return average.take_in(weights_at(version), version, GOOD, {version % 4: 10, 1: 3}, found)

    for version in range(1, num_before + 1):
        update(straight, version)
    state = {key: value.clone() for key, value in straight.state().items()}
    restored.load(state, straight.average.weights)
    for version in range(num_before + 1, 12):
        assert update(restored, version) == update(straight, version)
        assert torch.equal(restored.average.weights["x"], straight.average.weights["x"])


def test_a_state_that_was_written_without_audits_expects_what_one_beta_would_have_left():
    old, new, straight = averaging("fixed", beta=0.5), averaging("fixed", beta=0.5), averaging("fixed", beta=0.5)
    for one in (old, straight):
        for version in range(1, 60):
            beta(one, version)
    missing = ("shares", "audit_counts", "audit_squares")
    new.load({key: value for key, value in old.state().items() if key not in missing}, old.average.weights)
    for one in (new, straight):
        one._audits.append(lag_sums(powers(1.5)))
    found = audit(powers(1))
    assert new._errors(found) == pytest.approx(straight._errors(found), rel=1e-6)


def test_audits_of_another_window_are_forgotten_on_resume():
    old = averaging()
    beta(old, 1, audit(powers(2)))
    table = {"variant": "ppo_ewma_train_infer", "max_staleness": 2, "audit": {"share": 1.0}}
    config = config_from_table({**table, "proximal": {"source": "ewma", "decay": "audited"}})
    new = Averaging(config.proximal, config.window, weights_at(0))
    new.load(old.state(), old.average.weights)
    assert not new._audits


# What an audit measures of an update.


def judge_of():
    config = config_from_table({"variant": "ppo_ewma_train_infer", "band": 1.1, "proximal": {"source": "ewma"}})
    objective = objective_of(config.objective, config.correction, variant=config.variant, band=config.band)
    return Judge(loss=LOSSES.find("masked_is"), objective=objective, max_staleness=WINDOW)


TABLE = {
    "logp_mu": np.float32([-1, -1, -1, -1, -1, -1]),
    "logp_theta": np.float32([-1.0, -1.5, -2.0, -3.0, math.nan, -1.0]),
    "logp_proximal": np.float32([-1.0, -1.2, -1.1, -1.0, -1.0, -1.0]),
    "advantage": np.float32([1, 1, -1, 1, 1, 1]),
    "staleness": np.int32([0, 1, 1, 3, 3, 4]),
    "step": np.int32([0, 0, 0, 1, 0, 0]),
    "loss_mask": np.ones(6, np.bool_),
    "active_mask": np.ones(6, np.bool_),
    "trajectory": np.array(["a"] * 6),
}
OLD = np.float32([-1.0, -1.0, -1.0, -1.0, -1.0, -1.5])


def test_tokens_of_the_first_step_say_how_far_log_probs_moved_and_all_of_them_what_the_average_missed():
    found = judge_of().audited(AuditScores(old=OLD, live=None), TABLE, NUM_LAGS - 1)
    assert found.live.counts.tolist() == [1, 2, 0, 0], "neither the second step, nor what is not finite, nor a lag beyond"
    assert found.live.squares.tolist() == pytest.approx([0, 0.25 + 1, 0, 0])
    assert found.average.counts.tolist() == [1, 2, 0, 2]
    assert found.average.squares.tolist() == pytest.approx([0, 0.04 + 0.01, 0, 0])
    assert found.errors == {}


def test_where_the_live_weights_have_scored_the_batch_all_tokens_say_how_far_it_moved():
    live = np.float32([-1.0, -1.5, -2.0, -1.25, -1.0, -1.0])
    found = judge_of().audited(AuditScores(old=OLD, live=live), TABLE, NUM_LAGS)
    assert found.live.counts.tolist() == [1, 2, 0, 2, 1]
    assert found.live.squares.tolist() == pytest.approx([0, 1.25, 0, 0.0625, 0.25])
    assert found.errors.keys() == WORSE.keys()


def test_root_mean_squares_are_told_of_lags_with_tokens_and_of_all_tokens():
    sums = LagSums(counts=np.array([1, 0, 3]), squares=np.array([4.0, 0.0, 12.0]))
    assert sums.roots() == {"@lag0": 2.0, "@lag2": 2.0, "": 2.0}
    assert LagSums(counts=np.zeros(2, np.int64), squares=np.zeros(2)).roots() == {}


def batch_at(version):
    made = [
        trajectory(
            [3, 9 + i],
            sampled([12, 13 + i, 2], max(version - i % 2, 0), logp=-3.4),
            id=f"g{i // 2}.{i % 2}",
            group=f"g{i // 2}",
        )
        for i in range(4)
    ]
    return batch_of(made, [-1.0, 1.0, -1.0, 1.0], num_steps=2)


def test_a_note_is_about_the_batch_that_it_was_made_for(tiny_folder, recipe):
    source = {"variant": "ppo_ewma_train_infer", "proximal": {"source": "ewma", "decay": "audited"}, "audit": {"share": 1.0}}
    trainer = Trainer(trainer_spec(recipe(**source)), tiny_folder, [3, 9, 10, 11, 12, 2, 4, 13])
    told = []
    for version in range(3):
        trainer.publish()
        trainer.put_batch(batch := batch_at(version))
        tags = batch.version[batch.loss_mask]
        old = np.empty(len(tags), np.float32)
        for tag in sorted(set(tags.tolist())):
            chosen = np.flatnonzero(tags == tag)
            old[chosen] = trainer.scorer.score(chosen, tag)
        if version == 1:
            trainer.note_audit(AuditScores(old=old, live=None))
        scores = trainer.scorer.score_average(np.arange(len(tags)))
        result = trainer.train(Scored(policy=EWMA, values=scores.values, computed_at=tags, num_switches=1))
        told.append({name: value for name, value in result.metrics.items() if name.startswith("average/error")})
    assert told[0] == told[2] == {}
    assert told[1]["average/error_live@lag0"] <= 1e-6 < 1e-4 < told[1]["average/error_live@lag1"]
    table, first = result.table, np.flatnonzero(result.table["step"] == 0)
    assert len(first) < len(table["step"])
