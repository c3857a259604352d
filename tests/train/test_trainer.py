import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from oldlogits.core.errors import ExactnessError, RunFolderError, TrajectoryError, VersionEvictedError
from oldlogits.core.policies import OLD
from oldlogits.core.scoring import Scored
from oldlogits.core.trajectory import Routing
from oldlogits.models.load import load_model, load_tokenizer, named_weights
from oldlogits.run.specs import trainer_spec
from oldlogits.train.checkpoint import read_state
from oldlogits.train.trainer import Trainer

from ..builders import batch_of, sampled, trajectory

PROBE = [3, 9, 10, 11, 12, 2, 4, 13]


@pytest.fixture
def trainer(tiny_folder, recipe):
    return Trainer(trainer_spec(recipe(trainer={"warmup_steps": 3, "minibatches_per_update": 2})), tiny_folder, PROBE)


def batch_at(*versions, offset=0):
    """Two groups of two; each trajectory has one turn at each of the versions."""
    made = []
    for i in range(4):
        segments = [s for v in versions for s in ([3, 9 + i], sampled([12 + offset, 13 + i, 2], v, logp=-3.4))]
        made.append(trajectory(*segments, id=f"g{i // 2}.{i % 2}", group=f"g{i // 2}", reward=float(i % 2)))
    return batch_of(made, [-1.0, 1.0, -1.0, 1.0], num_steps=2)


def old_of(trainer, batch):
    """Each token at its own version, as the snapshot source does."""
    tags = batch.version[batch.loss_mask]
    values = np.zeros(len(tags), np.float32)
    for version in np.unique(tags):
        tokens = np.flatnonzero(tags == version)
        values[tokens] = trainer.scorer.score(tokens, int(version))
    return Scored(policy=OLD, values=values, computed_at=tags, num_switches=len(np.unique(tags)))


def train(trainer, *versions, offset=0):
    """Publish, score and train one batch."""
    trainer.publish()
    trainer.put_batch(batch := batch_at(*versions, offset=offset))
    return trainer.train(old_of(trainer, batch))


def weights_of(trainer):
    return {name: w.clone() for name, w in trainer.publish().update.tensors.items()}


def assert_bitwise_equal(left, right):
    assert set(left) == set(right)
    assert all(torch.equal(left[name], right[name]) for name in left)


def all_tokens(batch):
    return np.arange(int(batch.loss_mask.sum()))


@pytest.mark.slow
def test_a_stored_version_gives_the_same_log_probs_bit_for_bit_however_far_training_went(trainer):
    batch = batch_at(0)
    trainer.publish()
    trainer.put_batch(batch)
    then = trainer.scorer.score(all_tokens(batch), None)
    for version in range(3):
        train(trainer, version)
    trainer.put_batch(batch)
    assert trainer.scorer.score(all_tokens(batch), 0).tolist() == then.tolist()
    now = trainer.scorer.score(all_tokens(batch), None)
    assert float(np.abs(now - then).max()) > 1e-3


def test_live_scores_are_those_of_the_published_weights_until_the_next_step(trainer):
    train(trainer, 0)
    trainer.publish()
    trainer.put_batch(batch_at(1))
    tokens = all_tokens(batch_at(1))
    assert trainer.scorer.score(tokens, None).tolist() == trainer.scorer.score(tokens, 1).tolist()


def test_scores_of_some_positions_are_those_of_the_whole(trainer):
    trainer.publish()
    trainer.put_batch(batch_at(0))
    whole = trainer.scorer.score(np.arange(12), 0)
    np.testing.assert_allclose(trainer.scorer.score(np.array([1, 5, 11]), 0), whole[[1, 5, 11]], rtol=0, atol=2e-6)


@pytest.mark.slow
def test_scoring_between_does_not_change_what_training_does(tiny_folder, recipe):
    ended = []
    for num_scores in (0, 3):
        trainer = Trainer(trainer_spec(recipe()), tiny_folder, PROBE)
        for version in range(2):
            trainer.publish()
            trainer.put_batch(batch := batch_at(version))
            scored = old_of(trainer, batch)
            for at in [0, None, version][:num_scores]:
                trainer.scorer.score(all_tokens(batch), at)
            trainer.train(scored)
        ended.append(weights_of(trainer))
    assert_bitwise_equal(*ended)


def test_every_update_raises_the_version_by_one_and_takes_all_steps(trainer):
    for version in range(3):
        assert trainer.version == version
        assert train(trainer, version).metrics["mask/num_tokens"] == 12
    assert trainer.version == 3
    assert trainer.publish().version == 3


def test_training_moves_the_tokens_of_good_trajectories_up_and_of_bad_ones_down(trainer):
    trainer.publish()
    trainer.put_batch(batch := batch_at(0))
    before = old_of(trainer, batch)
    trainer.train(before)
    trainer.put_batch(batch)
    change = trainer.scorer.score(all_tokens(batch), None) - before.values
    advantages = batch.advantages[batch.sequence[batch.loss_mask]]
    assert float((change * advantages).sum()) > 0.01


def test_old_equals_theta_to_1e_6_at_lag_0_at_every_version(trainer):
    errors = [train(trainer, version).lag0_max_abs_error for version in range(3)]
    assert max(errors) <= 1e-6
    assert trainer.scorer.checks.errors.lag0_max_abs_error == max(errors)


def test_a_false_old_at_lag_0_ends_the_run(trainer):
    trainer.publish()
    trainer.put_batch(batch := batch_at(0))
    scored = old_of(trainer, batch)
    scored.values[0] += 1e-3
    before = {name: weight.clone() for name, weight in named_weights(trainer.live.model).items()}
    with pytest.raises(ExactnessError, match=r"OLD of lag-0 tokens contradicts THETA .* differ by up to 1\.00e-03"):
        trainer.train(scored)
    assert all(torch.equal(weight, before[name]) for name, weight in named_weights(trainer.live.model).items()), (
        "nothing was stepped"
    )


def tamper(trainer, version, value):
    with trainer.store.store.checkout(version) as weights, torch.no_grad():
        weights["model.layers.0.mlp.up_proj.weight"][0] += value


@pytest.mark.slow
@pytest.mark.parametrize(
    "value",
    [0.01, -3.0, math.nan],
)
def test_a_stored_copy_that_was_tampered_with_is_noticed_when_it_scores(trainer, value):
    for version in range(2):
        train(trainer, version)
    trainer.put_batch(batch := batch_at(0))
    trainer.scorer.score(all_tokens(batch), 0)
    assert trainer.scorer.checks.errors.publish_max_abs_error == 0
    tamper(trainer, 0, value)
    with pytest.raises(ExactnessError, match="the checkout of version 0 contradicts the live weights at its publish"):
        trainer.scorer.score(all_tokens(batch), 0)
    with pytest.raises(ExactnessError, match=r"version 1 .*not those that were published"):
        trainer.scorer.score(all_tokens(batch), 1)
    assert trainer.scorer.checks.errors.publish_max_abs_error > 1e-5


def test_a_mixed_forward_witnesses_every_version_and_stands_in_for_none_that_is_gone(trainer):
    for version in range(2):
        train(trainer, version)
    segments = [sampled([12, 13], 0), sampled([14, 2], 1, kv="mixed"), [9], sampled([15, 2], 1)]
    trainer.put_batch(batch := batch_of([trajectory([3, 9], *segments)]))
    recomputed = old_of(trainer, batch).values
    mixed, computed_at = trainer.scorer.score_mixed()
    assert computed_at.tolist() == [0, 0, 1, 1, 1, 1]
    np.testing.assert_allclose(mixed[[0, 1, 4, 5]], recomputed[[0, 1, 4, 5]], rtol=0, atol=2e-6)
    assert np.abs(mixed - recomputed)[2:4].max() > 1e-3
    assert trainer.scorer.checks.errors.publish_max_abs_error == 0
    trainer.retain(1)
    with pytest.raises(VersionEvictedError, match="version 0 is not in the store"):
        trainer.scorer.score_mixed()


def test_a_mixed_forward_notices_weights_that_were_tampered_with(trainer):
    for version in range(2):
        train(trainer, version)
    trainer.put_batch(batch_of([trajectory([3, 9], sampled([12, 13], 0), sampled([14, 2], 1, kv="mixed"))]))
    trainer.scorer.score_mixed()
    tamper(trainer, 1, 0.01)
    with pytest.raises(ExactnessError, match=r"not those that were published|contradicts the live weights"):
        trainer.scorer.score_mixed()


def test_versions_that_are_not_retained_are_gone_and_the_others_score_on(trainer):
    for version in range(3):
        train(trainer, version)
    trainer.publish()
    trainer.retain(2)
    trainer.put_batch(batch := batch_at(0))
    for version in (0, 1):
        with pytest.raises(VersionEvictedError, match=f"version {version} is not in the store; .*2..3"):
            trainer.scorer.score(all_tokens(batch), version)
    trainer.scorer.score(all_tokens(batch), 2)
    trainer.scorer.score(all_tokens(batch), 3)


def test_a_publication_tells_version_weights_probe_and_bytes(trainer, tiny_folder):
    published = trainer.publish()
    model = load_model(tiny_folder).double()
    ids = torch.tensor([PROBE])
    logps = torch.log_softmax(model(ids).logits[0].detach(), 1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
    np.testing.assert_allclose(published.probe_logps, logps, rtol=0, atol=2e-6)
    assert_bitwise_equal(published.update.tensors, named_weights(load_model(tiny_folder)))
    assert published.store_bytes == 4 * trainer.live.num_parameters
    train(trainer, 0)
    second = trainer.publish()
    assert second.store_bytes == published.store_bytes + second.publication.stored_bytes
    assert second.publication.full_bytes == 4 * trainer.live.num_parameters


@pytest.mark.slow
def test_a_restored_trainer_goes_on_bit_for_bit(tiny_folder, recipe, tmp_path):
    config = recipe(trainer={"warmup_steps": 3, "minibatches_per_update": 2, "weight_decay": 0.1})
    straight = Trainer(trainer_spec(config), tiny_folder, PROBE)
    train(straight, 0)
    straight.save(tmp_path)
    expected = train(straight, 1, offset=1)
    restored = Trainer(trainer_spec(config), tmp_path / "model", PROBE)
    restored.restore(tmp_path)
    assert restored.version == 1
    found = train(restored, 1, offset=1)
    assert found.metrics == expected.metrics
    assert all(np.array_equal(found.table[name], column) for name, column in expected.table.items())
    assert_bitwise_equal(weights_of(restored), weights_of(straight))
    straight.save(tmp_path / "a")
    restored.save(tmp_path / "b")
    assert_bitwise_equal(*(read_state(tmp_path / name / "state") for name in "ab"))
    states = [json.loads((tmp_path / name / "state" / "trainer.json").read_text()) for name in "ab"]
    assert states[0]["schedule_steps"] == 4
    assert {k: states[0][k] for k in ("version", "schedule_steps")} == {k: states[1][k] for k in ("version", "schedule_steps")}


@pytest.mark.slow
def test_a_checkpoint_before_the_first_step_is_restored_too(tiny_folder, recipe, tmp_path):
    Trainer(trainer_spec(recipe()), tiny_folder, PROBE).save(tmp_path)
    straight, restored = (
        Trainer(trainer_spec(recipe()), tiny_folder, PROBE),
        Trainer(trainer_spec(recipe()), tiny_folder, PROBE),
    )
    restored.restore(tmp_path)
    for trainer in (straight, restored):
        train(trainer, 0)
    assert_bitwise_equal(weights_of(restored), weights_of(straight))


def test_restoring_brings_back_the_weights_of_the_checkpoint_and_its_witnesses(trainer, tiny_folder, recipe, tmp_path):
    train(trainer, 0)
    trainer.put_batch(batch_at(0))
    trainer.scorer.score(np.arange(3), 0)
    trainer.save(tmp_path)
    other = Trainer(trainer_spec(recipe()), tiny_folder, PROBE)
    other.restore(tmp_path)
    assert_bitwise_equal(weights_of(other), weights_of(trainer))
    assert asdict(other.scorer.checks.errors) == asdict(trainer.scorer.checks.errors)
    assert other.scorer.checks.errors.publish_max_abs_error == 0


def test_a_checkpoint_holds_a_model_folder_in_the_standard_format(trainer, tmp_path):
    train(trainer, 0)
    trainer.save(tmp_path)
    assert_bitwise_equal(named_weights(load_model(tmp_path / "model")), weights_of(trainer))
    assert load_tokenizer(tmp_path / "model").chat_template
    assert {path.name for path in tmp_path.iterdir()} == {"model", "state", "SHA256SUMS"}


@pytest.mark.parametrize(
    "missing",
    [
        "state/trainer.json",
        "state/trainer-00000-of-00001.safetensors",
    ],
)
def test_an_incomplete_checkpoint_is_refused(trainer, tmp_path, missing):
    trainer.save(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(RunFolderError, match="checkpoint"):
        trainer.restore(tmp_path)


def test_a_saved_batch_holds_every_array_of_the_batch_in_training(trainer, tmp_path):
    trainer.put_batch(batch := batch_at(0))
    assert trainer.save_batch(tmp_path / "failed") == tmp_path / "failed"
    saved = load_file(tmp_path / "failed" / "batch.safetensors")
    expected = {name: values for name, values in asdict(batch).items() if values is not None}
    assert tuple(json.loads((tmp_path / "failed" / "trajectories.json").read_text())) == expected.pop("trajectory_ids")
    assert set(saved) == set(expected)
    assert all(np.array_equal(saved[name].numpy(), values) for name, values in expected.items())


def test_the_learning_rate_warms_up_linearly_over_optimizer_steps(trainer):
    rates = []
    for version in range(2):
        train(trainer, version)
        rates.append(trainer.optimizer.lr)
    assert rates == pytest.approx([0.01 * 3 / 4, 0.01])


def test_the_learning_rate_falls_linearly_to_its_final_share_by_the_end_of_the_run(tiny_folder, recipe):
    table = {"warmup_steps": 0, "minibatches_per_update": 2, "min_lr_ratio": 0.5}
    trainer = Trainer(trainer_spec(recipe(trainer=table, num_updates=2)), tiny_folder, PROBE)
    rates = [trainer.optimizer.lr]
    for version in range(2):
        train(trainer, version)
        rates.append(trainer.optimizer.lr)
    assert rates == pytest.approx([0.01, 0.01 * 4 / 6, 0.005])  # steps 0..3 run at 6/6, 5/6, 4/6, 3/6


@pytest.fixture
def bf16_trainer(tiny_folder, recipe):
    trainer = {"warmup_steps": 0, "minibatches_per_update": 2, "lr": 1e-4}
    return Trainer(trainer_spec(recipe(trainer=trainer, model={"forward_dtype": "bf16"})), tiny_folder, PROBE)


@pytest.mark.slow
def test_bf16_versions_are_the_rounded_masters_and_score_to_the_last_bit(bf16_trainer):
    trainer = bf16_trainer
    thens = {}
    for version in range(3):
        masters = {name: weight.clone() for name, weight in named_weights(trainer.live.model).items()}
        published = trainer.publish()
        assert_bitwise_equal(published.update.tensors, {name: w.to(torch.bfloat16) for name, w in masters.items()})
        trainer.put_batch(batch := batch_at(0))
        thens[version] = trainer.scorer.score(all_tokens(batch), None)
        assert train(trainer, version).lag0_max_abs_error <= 1e-6
    trainer.put_batch(batch := batch_at(0))
    for version, then in thens.items():
        assert trainer.scorer.score(all_tokens(batch), version).tolist() == then.tolist()
    assert float(np.abs(thens[2] - thens[0]).max()) > 1e-4
    assert trainer.scorer.checks.errors.publish_max_abs_error == 0


def test_steps_below_a_bf16_unit_add_up_in_the_masters(tiny_folder, recipe):
    trainer = Trainer(
        trainer_spec(recipe(trainer={"lr": 1e-6, "warmup_steps": 0}, model={"forward_dtype": "bf16"})), tiny_folder, PROBE
    )
    start = {name: weight.clone() for name, weight in named_weights(trainer.live.model).items()}
    trainer.publish()
    train(trainer, 0)
    masters = named_weights(trainer.live.model)
    moved = sum(int((masters[name] != start[name]).sum()) for name in masters) / trainer.live.num_parameters
    publication = trainer.publish().publication
    assert moved > 0.3
    assert 0 < publication.share_changed < 0.05 * moved
    assert publication.full_bytes == 2 * trainer.live.num_parameters
    assert publication.stored_bytes < 0.1 * publication.full_bytes


@pytest.mark.slow
def test_a_restored_bf16_trainer_goes_on_bit_for_bit_from_masters_that_its_model_folder_does_not_hold(
    tiny_folder, recipe, tmp_path
):
    config = recipe(trainer={"lr": 1e-4, "minibatches_per_update": 2}, model={"forward_dtype": "bf16"})
    straight = Trainer(trainer_spec(config), tiny_folder, PROBE)
    train(straight, 0)
    straight.save(tmp_path)
    rounded, masters = named_weights(load_model(tmp_path / "model")), named_weights(straight.live.model)
    assert_bitwise_equal(rounded, {name: w.to(torch.bfloat16).float() for name, w in masters.items()})
    assert any(not torch.equal(rounded[name], master) for name, master in masters.items())
    restored = Trainer(trainer_spec(config), tmp_path / "model", PROBE)
    restored.restore(tmp_path)
    for trainer in (straight, restored):
        train(trainer, 1, offset=1)
    assert_bitwise_equal(named_weights(restored.live.model), named_weights(straight.live.model))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_activation_checkpointing_trains_the_same_weights_bit_for_bit(tiny_folder, recipe, dtype):
    ended = []
    for recomputes in (False, True):
        trainer = {"activation_checkpointing": recomputes, "minibatches_per_update": 2}
        trained = Trainer(trainer_spec(recipe(trainer=trainer, model={"forward_dtype": dtype})), tiny_folder, PROBE)
        train(trained, 0)
        ended.append(named_weights(trained.live.model))
    assert_bitwise_equal(*ended)


@pytest.mark.parametrize("numerics", ["bf16", "int8"])
def test_the_engines_view_rounds_the_bf16_weights_again(tiny_folder, recipe, numerics):
    trainer = Trainer(trainer_spec(recipe(engine={"precision": numerics}, model={"forward_dtype": "bf16"})), tiny_folder, PROBE)
    published = trainer.publish()
    noise = np.abs(published.engine_probe_logps - published.probe_logps).max()
    assert noise <= 1e-6 if numerics == "bf16" else noise > 1e-3


@pytest.fixture
def mixture(tiny_moe_folder, recipe):
    """Trainers of a mixture of four experts, by `model.routing`."""
    return lambda routing: Trainer(trainer_spec(recipe(model={"routing": routing})), tiny_moe_folder, PROBE)


def routed_batch():
    """A batch of two versions of each trajectory, with the experts of each: one of four, in two layers."""
    rng, made = np.random.default_rng(0), []
    for i in range(3):
        segments, position = [], 0
        for version in (0, 1):
            position += 5
            routing = Routing.of(rng.integers(4, size=(position - 1, 2, 1)).astype(np.uint8))
            said = sampled([12, 13 + i, 2], version, logp=-3.4)
            segments += [[3, 9 + i], replace(said, routing=routing)]
        made.append(trajectory(*segments, id=f"g0.{i}", reward=float(i % 2)))
    return batch_of(made, [-1.0, 1.0, -1.0])


@torch.no_grad()
def log_softmax_over(model, ids, chosen):
    """Of all tokens, by a model of top-1 experts whose routers are made to answer with these [token, layer, choice]."""

    def answer(layer):
        def instead(module, args, out):
            return out[0], out[0].softmax(-1).gather(1, chosen[:, layer]), chosen[:, layer]

        return instead

    blocks = enumerate(model.model.layers)
    hooks = [block.mlp.gate.register_forward_hook(answer(layer)) for layer, block in blocks]
    logp = model(ids[None]).logits[0].log_softmax(-1)
    for hook in hooks:
        hook.remove()
    return logp


def test_old_and_theta_are_forwards_over_the_experts_of_each_tokens_version(mixture, tiny_moe_folder):
    """The oracle: one trajectory and version at a time, by a model whose router's choice is forced."""
    trainer, batch = mixture("replayed"), routed_batch()
    trainer.publish()
    trainer.put_batch(batch)
    found = trainer.scorer.score(all_tokens(batch), None)
    forced = load_model(tiny_moe_folder)
    expected = []
    for i, start in enumerate(batch.starts[:-1]):
        for version in (0, 1):
            tokens = np.flatnonzero((batch.sequence == i) & (batch.version == version))
            ids = torch.from_numpy(batch.token_ids[start : tokens[-1]])
            chain = batch.chains.chain[tokens[0]]
            chosen = batch.chains.choices[batch.chains.starts[chain] :][: len(ids)]
            logp = log_softmax_over(forced, ids, torch.from_numpy(chosen).long())
            at = tokens - start - 1
            expected += logp[at, torch.from_numpy(batch.token_ids[tokens])].tolist()
    assert np.abs(found - np.array(expected)).max() < 1e-5
    trainer.live.version = 1  # the tokens of version 1 are at lag 0
    old = Scored(policy=OLD, values=found, computed_at=batch.version[batch.loss_mask], num_switches=1)
    result = trainer.train(old)
    assert result.lag0_max_abs_error <= 1e-6
    assert np.abs(result.table["logp_theta"] - found).max() <= 1e-6
    free = mixture("off")
    free.put_batch(batch)
    assert np.abs(free.scorer.score(all_tokens(batch), None) - found).max() > 1e-2, "experts matter, or nothing was tested"


def test_a_batch_without_the_experts_that_a_trainer_is_to_follow_is_refused(mixture):
    for routing in ("recorded", "replayed"):
        with pytest.raises(TrajectoryError, match=rf"without routing, model\.routing = '{routing}'"):
            mixture(routing).put_batch(batch_at(0))
    mixture("off").put_batch(batch_at(0))


def test_a_saved_batch_holds_its_routing(mixture, tmp_path):
    trainer = mixture("replayed")
    trainer.put_batch(batch := routed_batch())
    trainer.save_batch(tmp_path)
    saved = load_file(tmp_path / "batch.safetensors")
    for name, values in asdict(batch.chains).items():
        assert np.array_equal(saved[f"routing_{name}"].numpy(), values)
