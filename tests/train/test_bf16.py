"""bf16 arithmetic: what is computed, what packing does to it, and what is exact in spite of it."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from oldlogits.config.check import check
from oldlogits.core.errors import ConfigError, ExactnessError, MissingLogprobError, NonFiniteError
from oldlogits.core.policies import OLD
from oldlogits.core.scoring import Scored
from oldlogits.models.forward import Arithmetic, round_at_use
from oldlogits.models.load import load_model, point_at
from oldlogits.run.run import run
from oldlogits.run.specs import trainer_spec
from oldlogits.train.consistency import check_rescored
from oldlogits.train.reports import PackingNoise
from oldlogits.train.trainer import Trainer

from .. import runs
from ..builders import batch_of, sampled, trajectory

BF16, FP32 = torch.bfloat16, torch.float32
PROBE = [3, 9, 10, 11, 12, 2, 4, 13]
IDS = torch.arange(40).remainder(27).view(2, 20)


def computing(folder, *, head):
    model = load_model(folder)
    round_at_use(model, BF16, Arithmetic(compute=BF16, head=head))
    return model


def in_bf16(folder):
    """The same model as transformers computes it in bf16."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=BF16).eval()


def test_with_its_head_in_bf16_the_forward_is_that_of_transformers_in_bf16(tiny_folder):
    found = computing(tiny_folder, head=BF16)(input_ids=IDS).logits
    assert torch.equal(found, in_bf16(tiny_folder)(input_ids=IDS).logits)


def test_a_head_in_fp32_sums_the_products_of_bf16_numbers_without_rounding_the_sums(tiny_folder):
    model, plain = computing(tiny_folder, head=FP32), in_bf16(tiny_folder)
    found = model(input_ids=IDS).logits
    hidden = plain.base_model(input_ids=IDS).last_hidden_state
    exact = hidden.double() @ plain.get_output_embeddings().weight.double().T
    assert found.dtype == FP32
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-5)
    assert float((plain(input_ids=IDS).logits.double() - exact).detach().abs().max()) > 1e-4, "rounded logits are seen"


@pytest.mark.parametrize("head", [BF16, FP32])
def test_masters_receive_in_fp32_the_gradient_that_transformers_computes_in_bf16(tiny_folder, head):
    def loss_of(model):
        return torch.log_softmax(model(input_ids=IDS).logits.float(), -1)[..., 5].mean()

    found, plain = computing(tiny_folder, head=head), in_bf16(tiny_folder)
    loss_of(found).backward()
    loss_of(plain).backward()
    for (name, mine), theirs in zip(found.named_parameters(), plain.parameters(), strict=True):
        assert mine.grad.dtype == FP32
        scale = float(theirs.grad.float().abs().max())
        torch.testing.assert_close(mine.grad, theirs.grad.float(), rtol=0, atol=0.03 * scale, msg=name)


def long_batch(*versions):
    """Trajectories of several lengths, each with one turn at each of the versions."""
    made = []
    for i in range(6):
        segments = [
            s
            for v in versions
            for s in ([3] + [9 + (7 * i + k) % 15 for k in range(2 + 3 * i)], sampled([12, 13 + i, 2], v, logp=-3.4))
        ]
        made.append(trajectory(*segments, id=f"g{i // 2}.{i % 2}", group=f"g{i // 2}", reward=float(i % 2)))
    return batch_of(made, [-1.0, 1.0] * 3, num_steps=2)


def trainer_of(folder, recipe, layout="shared", **proximal):
    config = recipe(trainer={"compute": "bf16", "minibatches_per_update": 2, "layout": layout}, proximal=proximal)
    return Trainer(trainer_spec(config), folder, PROBE)


def scored_by(trainer, batch, version, *, checked_every=16):
    """Each token at its own version, but for those that are left to the training forward."""
    asked = batch.entering(version, checked_every=checked_every)
    left_out = asked.from_training if checked_every else np.zeros(len(asked.versions), np.bool_)
    values = np.full(len(asked.versions), np.nan, np.float32)
    for at in np.unique(asked.versions[~left_out]):
        tokens = np.flatnonzero((asked.versions == at) & ~left_out)
        values[tokens] = trainer.scorer.score(tokens, int(at))
    return Scored(
        policy=OLD, values=values, computed_at=asked.versions, num_switches=1, left_out=left_out if left_out.any() else None
    )


def test_old_of_the_current_version_is_theta_of_the_first_step_and_the_sample_agrees(tiny_folder, recipe):
    trainer = trainer_of(tiny_folder, recipe)
    trainer.publish()
    trainer.put_batch(batch := long_batch(0, 0))
    scored = scored_by(trainer, batch, 0, checked_every=2)
    first = batch.old_is_theta(0)
    assert 0 < int(scored.left_out.sum()) < int(first.sum()) < len(first)
    result = trainer.train(scored)
    assert result.lag0_max_abs_error == 0
    table = result.table
    assert (table["logp_proximal"][first] == table["logp_theta"][first]).all()
    assert (table["logp_proximal"][~first] == scored.values[~first]).all()
    assert result.metrics["score/taken_share"] == pytest.approx(scored.left_out.mean())
    errors = trainer.scorer.checks.errors
    assert 0 <= errors.packing_mean_abs_error <= errors.packing_max_abs_error < 0.1
    assert errors.rescored_max_abs_error <= 10 * errors.packing_max_abs_error


def test_scored_in_the_micro_batches_that_train_them_tokens_have_no_packing_noise(tiny_folder, recipe):
    """At an unchanged version THETA is OLD: to the bit where the shape is the same, up to the noise where it is not."""
    errors = {}
    for scoring in ("same-shape", "prefix"):
        trainer = trainer_of(tiny_folder, recipe, scoring=scoring, current_version="scored")
        trainer.publish()
        trainer.put_batch(batch := long_batch(0, 0))
        errors[scoring] = trainer.train(scored_by(trainer, batch, 0, checked_every=0)).rescored_max_abs_error
    assert errors["same-shape"] == 0
    assert 0 <= errors["prefix"] < 0.1


@pytest.mark.parametrize(
    "compute, micro_batch_tokens, num_forwards",
    [("fp32", 8, 0), ("fp32", 4096, 1 + 6), ("bf16", 8, 6 + 6), ("bf16", 4096, 1 + 6 + 1)],
)
def test_packing_noise_is_computed_where_trajectories_are_packed(
    tiny_folder, recipe, compute, micro_batch_tokens, num_forwards
):
    """And what bf16 rounds off, in any case."""
    sizes = {"compute": compute, "minibatches_per_update": 2, "micro_batch_tokens": micro_batch_tokens}
    trainer = Trainer(trainer_spec(recipe(trainer=sizes)), tiny_folder, PROBE)
    trainer.publish()
    read = []
    trainer.live.scoring.base_model.register_forward_hook(lambda *given: read.append(given))
    trainer.put_batch(long_batch(0))
    assert len(read) == num_forwards
    errors = trainer.scorer.checks.errors
    assert (errors.packing_max_abs_error > 0) == (micro_batch_tokens > 8)
    assert (errors.rounding_max_abs_error > 0) == (compute == "bf16")


def test_in_place_only_the_micro_batches_with_such_tokens_are_read(tiny_folder, recipe):
    trainer = trainer_of(tiny_folder, recipe, scoring="same-shape", current_version="scored")
    trainer.publish()
    trainer.put_batch(batch := long_batch(0))
    before, tokens = trainer.scorer.work.read_tokens, np.array([0])
    trainer.scorer.score(tokens, 0)
    lengths = batch.lengths[batch.step == 0] - 1
    assert trainer.scorer.work.read_tokens - before == int(lengths.sum())


def test_a_stored_version_in_bf16_scores_to_the_bit_what_it_gave_at_its_publish(tiny_folder, recipe):
    trainer = trainer_of(tiny_folder, recipe, current_version="scored")
    trainer.publish()
    trainer.put_batch(batch := long_batch(0))
    tokens = np.arange(int(batch.loss_mask.sum()))
    then = trainer.scorer.score(tokens, 0)
    trainer.train(scored_by(trainer, batch, 0, checked_every=0))
    trainer.publish()
    trainer.put_batch(batch)
    assert trainer.scorer.score(tokens, 0).tolist() == then.tolist()
    assert trainer.scorer.checks.errors.publish_max_abs_error == 0
    assert trainer.scorer.checks.errors.num_digests == 3


def test_a_token_that_is_left_out_and_not_of_the_first_step_is_refused(tiny_folder, recipe):
    trainer = trainer_of(tiny_folder, recipe)
    trainer.publish()
    trainer.put_batch(batch := long_batch(0))
    scored = scored_by(trainer, batch, 0)
    left_out = np.ones(len(scored.values), np.bool_)
    with pytest.raises(MissingLogprobError, match="tokens have no log-prob of OLD"):
        trainer.train(replace(scored, left_out=left_out))


def test_every_kth_trajectory_of_the_first_step_is_scored_all_the_same():
    batch = long_batch(3)
    first = batch.old_is_theta(3)
    assert first.tolist() == [step == 0 for step in batch.step[batch.sequence[batch.loss_mask]]]
    asked = batch.entering(3, checked_every=3)
    sequence = batch.sequence[batch.loss_mask]
    assert sorted(set(sequence[first & ~asked.from_training].tolist())) == np.unique(sequence[first])[::3].tolist()
    assert not batch.entering(4, checked_every=3).from_training.any()
    assert batch.entering(3).from_training is None


@pytest.mark.parametrize(
    ("mean", "largest", "passes"), [(0.0, 1e-5, True), (0.0, 2e-5, False), (3.9e-3, 0.05, True), (6e-3, 0.05, False)]
)
def test_a_sample_may_be_off_by_a_few_times_the_packing_noise(mean, largest, passes):
    errors = np.full(1000, mean, np.float32)
    errors[0] = largest
    noise = PackingNoise(mean=1e-3, max=0.01) if mean else PackingNoise()
    if passes:
        return check_rescored(errors, noise)
    with pytest.raises(ExactnessError, match="OLD of lag-0 tokens contradicts THETA"):
        check_rescored(errors, noise)


def test_bf16_arithmetic_brings_bf16_forward_weights_and_refuses_others(recipe):
    assert recipe(trainer={"compute": "bf16"}).model.forward_dtype == "bf16"
    assert recipe().model.forward_dtype == "fp32"
    with pytest.raises(ConfigError, match="bf16 arithmetic would round the weights of a version"):
        check(recipe(trainer={"compute": "bf16"}, model={"forward_dtype": "fp32"}))


@pytest.mark.parametrize("source", ["eager", "dedicated", "interruption"])
def test_what_is_scored_before_there_is_a_batch_has_not_its_shape(recipe, source):
    with pytest.raises(ConfigError, match=f"source '{source}' does not score tokens in the micro-batches"):
        check(recipe(proximal={"source": source, "scoring": "same-shape"}))


@pytest.mark.slow
def test_a_run_in_bf16_tells_its_noise_and_is_exact_at_lag_0(tiny_folder, tmp_path):
    config = runs.recipe(tiny_folder, trainer={"compute": "bf16"}, engine={"precision": "fp8"})
    result = run(config, tmp_path / "run")
    assert result.error is None
    summary = result.summary
    assert summary.consistency_lag0_max_abs_error == summary.consistency_publish_max_abs_error == 0
    assert 0 < summary.packing_mean_abs_error < summary.packing_max_abs_error
    assert summary.num_digests > 0
    assert summary.provenance == {"exact": sum(summary.provenance.values())}


def even_batch(num=4, *, prompt=30, said=6):
    """Trajectories of one length: a kernel takes them alike side by side and each by itself."""
    made = [
        trajectory([3] + [9 + (5 * i + k) % 15 for k in range(prompt)], sampled(range(10 + i, 10 + i + said), 0, logp=-3.4))
        for i in range(num)
    ]
    return batch_of([replace(one, id=f"g{i}.0", group_id=f"g{i}") for i, one in enumerate(made)])


@pytest.mark.parametrize("num", [1, 4])
def test_where_two_packings_happen_to_agree_what_bf16_rounds_off_is_still_allowed(tiny_folder, recipe, num):
    """A later batch, of other lengths, does not end a sound run."""
    trainer = trainer_of(tiny_folder, recipe, layout="padded")
    trainer.publish()
    trainer.put_batch(even_batch(num))
    noise = trainer.scorer.checks.noise
    assert noise.max < 1e-3 < noise.rounding_max < 0.1
    assert noise.mean < 1e-4 < noise.rounding_mean < noise.rounding_max
    check_rescored(np.full(20, 2 * noise.rounding_mean, np.float32), noise)
    with pytest.raises(ExactnessError, match="the mean OLD of lag-0 tokens contradicts THETA"):
        check_rescored(np.full(20, 4.5 * noise.rounding_mean, np.float32), noise)


def test_in_fp32_arithmetic_bf16_weights_have_no_rounding_beside_the_packing(tiny_folder, recipe):
    trainer = Trainer(trainer_spec(recipe(model={"forward_dtype": "bf16"})), tiny_folder, PROBE)
    trainer.publish()
    trainer.put_batch(long_batch(0))
    noise = trainer.scorer.checks.noise
    assert (noise.rounding_mean, noise.rounding_max) == (0, 0)
    assert noise.expected_max == noise.max < 1e-5


def test_weights_that_are_not_finite_are_told_from_a_store_that_is_wrong(tiny_folder, recipe):
    trainer = trainer_of(tiny_folder, recipe)
    trainer.publish()
    with torch.no_grad():
        trainer.live.model.get_output_embeddings().weight[3] = math.nan
    trainer.put_batch(batch := long_batch(0))
    values = trainer.scorer.score(np.arange(int(batch.loss_mask.sum())), None)
    scored = Scored(policy=OLD, values=values, computed_at=np.zeros(len(values), np.int64), num_switches=1)
    with pytest.raises(NonFiniteError, match="the loss or its gradient is not finite at version 0"):
        trainer.train(scored)


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_a_checkpoint_of_another_machine_goes_on_though_its_log_probs_are_rounded_otherwise(
    tiny_folder, recipe, tmp_path, compute
):
    """The live version and an older one are held against this machine's log-probs from then on, to the last bit."""
    spec = trainer_spec(recipe(trainer={"compute": compute}))
    first = Trainer(spec, tiny_folder, PROBE)
    first.publish()
    first.put_batch(batch := long_batch(0))
    first.train(scored_by(first, batch, 0, checked_every=0))
    first.publish()
    first.save(tmp_path)
    file = tmp_path / "state/trainer.json"
    counters = json.loads(file.read_text())
    off = 5e-5 if compute == "fp32" else 2e-3  # on another kind of GPU, or another CPU
    counters["probe_logps"] = {v: [p + off for p in logps] for v, logps in counters["probe_logps"].items()}
    counters["device"] = "cuda" if compute == "fp32" else counters["device"]
    file.write_text(json.dumps(counters))
    trainer = Trainer(spec, tmp_path / "model", PROBE)
    trainer.restore(tmp_path)
    trainer.publish()
    trainer.put_batch(batch)
    tokens = np.arange(int(batch.loss_mask.sum()))
    then = trainer.scorer.score(tokens, 0)
    assert trainer.scorer.score(tokens, 0).tolist() == then.tolist()
    assert trainer.scorer.checks.errors.publish_max_abs_error == 0
    trainer.scorer.checks.published[0] = trainer.scorer.checks.published[0] + np.float32(off)
    with pytest.raises(ExactnessError, match="the checkout of version 0 contradicts the live weights"):
        trainer.scorer.score(tokens, 0)


def test_weights_one_step_of_1e_6_behind_pass_the_sample_in_bf16_and_not_the_probe_of_the_checkout(tiny_folder, recipe):
    """What docs/exactness.md says: this step is smaller than what bf16 rounds off; fp32 tells it apart."""
    noticed = {}
    for compute in ("bf16", "fp32"):
        config = recipe(trainer={"compute": compute, "lr": 1e-6, "warmup_steps": 0}, proximal={"current_version": "scored"})
        trainer = Trainer(trainer_spec(config), tiny_folder, PROBE)
        trainer.publish()
        trainer.put_batch(batch := long_batch(0))
        tokens = np.arange(int(batch.loss_mask.sum()))
        behind = trainer.scorer.score(tokens, 0)
        trainer.train(scored_by(trainer, batch, 0, checked_every=0))
        trainer.publish()
        trainer.put_batch(batch)
        moved, checks = np.abs(trainer.scorer.score(tokens, 1) - behind), trainer.scorer.checks
        assert moved.max() > 0
        with trainer.store.store.checkout(0) as weights:
            point_at(trainer.live.scoring, weights)
            with pytest.raises(ExactnessError, match="version 0 in place of 1 contradicts the live weights at its publish"):
                checks.check(trainer.live.scoring, "version 0 in place of 1", 1)
        try:
            check_rescored(moved, checks.noise)
            noticed[compute] = False
        except ExactnessError:
            noticed[compute] = True
    assert noticed == {"bf16": False, "fp32": True}


def test_a_batch_that_is_kept_for_a_post_mortem_says_which_tokens_were_left_to_the_training_forward(
    tiny_folder, recipe, tmp_path
):
    trainer = trainer_of(tiny_folder, recipe)
    trainer.publish()
    trainer.put_batch(batch := long_batch(0))
    scored = scored_by(trainer, batch, 0)
    with torch.no_grad():
        trainer.live.model.get_output_embeddings().weight[3] = math.nan
    with pytest.raises(NonFiniteError):
        trainer.train(scored)
    found = load_file(trainer.save_batch(tmp_path / "failed") / "batch.safetensors")
    assert found["left_out"].tolist() == np.isnan(found["logp_old"]).tolist() == scored.left_out.tolist()
    assert found["left_out"].any()
