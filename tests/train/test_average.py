"""The trainer's average: what each version is taken in with, when it is reset, and that a checkpoint keeps it."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from oldlogits.core.errors import RunFolderError
from oldlogits.core.policies import EWMA
from oldlogits.core.scoring import Scored
from oldlogits.models.load import load_model, named_weights
from oldlogits.run.specs import trainer_spec
from oldlogits.train.checkpoint import read_state
from oldlogits.train.trainer import Trainer
from oldlogits.train.weights.average import RECENT_LAGS, Averaging
from oldlogits.versions import best_beta, growth_exponent
from tests.memory_log import without_wall_clock

from ..builders import batch_of, sampled, trajectory

PROBE = [3, 9, 10, 11, 12, 2, 4, 13]
WINDOW = 4
GOOD = {"mask/rho": 0.99, "mask/rho_band_first": 0.95, "mask/rho_band_live": 0.97}


def weights_at(version):
    return {"x": torch.tensor([float(version), 1.0])}


@pytest.fixture
def averaging(recipe):
    def make(**source):
        config = recipe(variant="ppo_ewma_train_infer", proximal={"source": "ewma", **source}, max_staleness=WINDOW)
        return Averaging(config.proximal, config.window, weights_at(0))

    return make


def take_in(averaging, version, counts=None, **metrics):
    return averaging.take_in(weights_at(version), version, GOOD | metrics, counts or {0: 1})


def betas(averaging, histories):
    return [take_in(averaging, v, counts)[0]["average/beta"] for v, counts in enumerate(histories, 1)]


HISTORY = [{0: 10}, {0: 5, 1: 5}, {1: 4, 3: 6}, {0: 1, 4: 9}]


def pooled(histories):
    return np.array([sum(counts.get(lag, 0) for counts in histories[-RECENT_LAGS:]) for lag in range(WINDOW + 1)])


def test_fixed_and_window_betas_do_not_depend_on_the_lags(averaging):
    assert betas(averaging(decay="fixed", beta=0.7), HISTORY) == [0.7] * 4
    assert betas(averaging(decay="max-lag"), HISTORY) == [WINDOW / (WINDOW + 2)] * 4


def test_the_measured_mean_lag_is_that_of_all_tokens_of_recent_updates(averaging):
    lags = [[0] * 10, [0] * 15 + [1] * 5, [0] * 15 + [1] * 9 + [3] * 6, [0] * 16 + [1] * 9 + [3] * 6 + [4] * 9]
    means = [sum(found) / len(found) for found in lags]
    assert betas(averaging(decay="mean-lag"), HISTORY) == pytest.approx([m / (1 + m) for m in means])
    long = [{4: 100}] * 3 + [{1: 10}] * RECENT_LAGS
    assert betas(averaging(decay="mean-lag"), long)[-1] == pytest.approx(0.5)


def test_auto_takes_the_best_beta_for_the_measured_lags_and_the_measured_growth(averaging):
    auto = averaging(decay="auto")
    speeds = np.random.default_rng(0).standard_normal(7).astype(np.float32)
    logps = [-1 + 0.01 * v**0.8 * speeds for v in range(8)]
    for version in range(8):
        auto.note_probe(version, logps[version])
        auto.note_probe(version, logps[version])  # published again after a resume
        found = take_in(auto, version + 1, HISTORY[-1])[0]
    exponent = growth_exponent(np.array(logps, np.float64), WINDOW)
    assert 1.1 < exponent < 1.99
    assert found["average/exponent"] == pytest.approx(exponent)
    assert found["average/beta"] == best_beta(pooled([HISTORY[-1]] * 8), exponent) > 0.5


def test_metrics_tell_the_age_of_the_average_that_served_the_update_not_of_the_next(averaging):
    fixed = averaging(decay="fixed", beta=0.5)
    ages = [take_in(fixed, version)[0]["average/age"] for version in (1, 2, 3)]
    assert ages == pytest.approx([0, 1 / 3, (0.5 * 1 + 0.25 * 2) / 1.75])
    assert fixed.average.num_versions == 4


def resets(averaging, **metrics):
    return [take_in(averaging, version, **metrics)[1] is not None for version in range(1, 8)]


LOW = {"mask/rho": 0.85}


def test_the_papers_rule_resets_at_every_update_whose_rho_is_below_tau_and_at_no_other(averaging):
    paper = averaging(reset="paper", reset_below=0.9)
    assert resets(paper, **LOW) == [True] * 7
    assert resets(paper, **{"mask/rho": 0.9}) == [False] * 7


def test_the_guarded_rule_also_asks_for_a_better_band_share_and_waits_for_the_window_to_pass(averaging):
    assert resets(averaging(reset="guarded"), **LOW) == [True] + [False] * WINDOW + [True, False]
    for kept_live in (0.95, 0.90):
        assert not any(resets(averaging(reset="guarded"), **LOW, **{"mask/rho_band_live": kept_live}))
    assert not any(resets(averaging(reset="guarded")))


def test_without_a_rule_nothing_resets(averaging):
    assert not any(resets(averaging(), **LOW))


def test_a_reset_leaves_the_new_version_alone_and_tells_its_figures(averaging):
    paper = averaging(reset="paper", decay="fixed", beta=0.5)
    take_in(paper, 1)
    reset = take_in(paper, 2, **LOW)[1]
    assert dataclasses.asdict(reset) == {
        "rule": "paper", "rho": 0.85, "tau": 0.9, "kept_average": 0.95, "kept_live": 0.97, "age": pytest.approx(1 / 3),
    }  # fmt: skip
    assert paper.average.weights["x"].tolist() == [2.0, 1.0]
    assert (paper.average.age, paper.average.num_versions) == (0, 1)


@pytest.mark.parametrize("num_before", [0, 3])
def test_a_restored_average_chooses_and_resets_as_if_there_had_been_no_break(averaging, num_before):
    straight, restored = averaging(decay="auto", reset="guarded"), averaging(decay="auto", reset="guarded")

    def update(average, version):
        average.note_probe(version - 1, np.float32([0.1, -0.2, 0.3]) * version**1.5)
        metrics = LOW if version == 2 or version > 5 else {}
        return take_in(average, version, {version % 4: 10, 1: 3}, **metrics)

    for version in range(1, num_before + 1):
        update(straight, version)
    restored.load(straight.state(), straight.average.weights)
    for version in range(num_before + 1, 12):
        assert update(restored, version) == update(straight, version)
        assert torch.equal(restored.average.weights["x"], straight.average.weights["x"])


def test_lags_of_another_window_are_forgotten_on_resume_and_the_average_is_kept(averaging, recipe):
    old = averaging(decay="mean-lag")
    betas(old, [{4: 10}] * 3)
    config = recipe(proximal={"source": "ewma", "decay": "mean-lag"}, max_staleness=2)
    new = Averaging(config.proximal, config.window, weights_at(0))
    new.load(old.state(), old.average.weights)
    assert torch.equal(new.average.weights["x"], old.average.weights["x"])
    assert betas(new, [{1: 10}]) == [0.5]


# The trainer with an average.


def config_of(recipe, **source):
    return recipe(variant="ppo_ewma_train_infer", proximal={"source": "ewma", **source}, trainer={"minibatches_per_update": 2})


def batch_at(version):
    made = [
        trajectory([3, 9 + i], sampled([12, 13 + i, 2], version, logp=-3.4), id=f"g{i // 2}.{i % 2}", group=f"g{i // 2}")
        for i in range(4)
    ]
    return batch_of(made, [-1.0, 1.0, -1.0, 1.0], num_steps=2)


def train(trainer, version):
    trainer.publish()
    trainer.put_batch(batch := batch_at(version))
    tags = batch.version[batch.loss_mask]
    scores = trainer.scorer.score_average(np.arange(len(tags)))
    result = trainer.train(Scored(policy=EWMA, values=scores.values, computed_at=tags, num_switches=1))
    return scores, result


@pytest.mark.slow
def test_the_average_scores_as_a_model_with_the_averaged_masters(tiny_folder, recipe):
    trainer, beta, kept = Trainer(trainer_spec(config_of(recipe, decay="fixed", beta=0.6)), tiny_folder, PROBE), 0.6, []
    for version in range(4):
        kept.append({name: w.double().clone() for name, w in trainer.publish().update.tensors.items()})
        scores, result = train(trainer, version)
        weights = beta ** np.arange(len(kept))[::-1]
        model = load_model(tiny_folder).double()
        for name, parameter in named_weights(model).items():
            parameter.copy_(sum(w * k[name] for w, k in zip(weights, kept, strict=True)) / weights.sum())
        ids = torch.from_numpy(batch_at(version).token_ids.reshape(4, 5))
        logps = torch.log_softmax(model(ids).logits.detach(), 2)[:, 1:-1].gather(2, ids[:, 2:, None])
        np.testing.assert_allclose(scores.values, logps.flatten(), rtol=0, atol=5e-6)
        assert (
            scores.age
            == result.metrics["average/age"]
            == pytest.approx(float(weights[::-1] @ np.arange(len(kept)) / weights.sum()))
        )


def test_band_shares_of_the_first_step_compare_the_average_with_the_weights_before_it(tiny_folder, recipe):
    config = dataclasses.replace(config_of(recipe), band=1.05)
    trainer = Trainer(trainer_spec(config), tiny_folder, PROBE)
    for version in range(3):
        _, result = train(trainer, version)
    batch, table = batch_at(2), result.table
    first = (batch.step[batch.sequence] == 0)[batch.loss_mask]

    def share(column):
        inside = [abs(a - b) <= math.log(1.05) for a, b in zip(table[column][first], table["logp_mu"][first], strict=True)]
        return sum(inside) / len(inside)

    assert result.metrics["mask/rho_band_first"] == pytest.approx(share("logp_proximal"))
    assert result.metrics["mask/rho_band_live"] == pytest.approx(share("logp_theta"))
    assert 0 < first.sum() < len(first)


@pytest.mark.slow
def test_a_restored_trainer_keeps_its_average_bit_for_bit(tiny_folder, recipe, tmp_path):
    config = config_of(recipe)
    straight = Trainer(trainer_spec(config), tiny_folder, PROBE)
    for version in range(2):
        train(straight, version)
    straight.save(tmp_path)
    restored = Trainer(trainer_spec(config), tmp_path / "model", PROBE)
    restored.restore(tmp_path)
    for version in (2, 3):
        expected, found = train(straight, version), train(restored, version)
        assert found[0].values.tolist() == expected[0].values.tolist()
        assert found[0].age == expected[0].age > 0.5
        assert without_wall_clock(found[1].metrics) == without_wall_clock(expected[1].metrics)


def test_a_checkpoint_without_an_average_is_refused_by_a_run_that_needs_one(tiny_folder, recipe, tmp_path):
    Trainer(trainer_spec(recipe()), tiny_folder, PROBE).save(tmp_path)
    with pytest.raises(RunFolderError, match="no weight average"):
        Trainer(trainer_spec(config_of(recipe)), tiny_folder, PROBE).restore(tmp_path)


def test_only_routes_that_average_keep_an_average(tiny_folder, recipe, tmp_path):
    Trainer(trainer_spec(recipe()), tiny_folder, PROBE).save(tmp_path / "without")
    Trainer(trainer_spec(config_of(recipe)), tiny_folder, PROBE).save(tmp_path / "with")
    kept = {name: {key.partition("|")[0] for key in read_state(tmp_path / name / "state")} for name in ("without", "with")}
    assert kept["with"] - kept["without"] == {"averaged", "averaging"}
