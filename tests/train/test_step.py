"""One update against the paper's objective in plain float64, each sequence in a forward of its own."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch

from oldlogits.core.errors import ExactnessError, MissingLogprobError, NonFiniteError
from oldlogits.core.policies import AGED, ASYNC, BALANCE, EWMA, OLD, RESCORE, THETA, Provenance
from oldlogits.core.scoring import Scored
from oldlogits.models.load import load_model, named_weights
from oldlogits.models.ranks import ALONE, Ranks
from oldlogits.run.specs import trainer_spec
from oldlogits.train import step as step_module
from oldlogits.train.loss_tokens import LossTokens, TokenRecord
from oldlogits.train.step import update

from ..builders import batch_of, sampled, trajectory

VERSION = 5
TURNS = [  # (read, said, version) of each turn; two groups of two, versions 4 and 5
    [([3, 9, 10], [11, 12, 2], 4), ([13, 14], [15, 16, 2], 5)],
    [([3, 9, 10], [17, 18, 19, 2], 4)],
    [([3, 20], [21, 22, 23, 24, 2], 4), ([8], [25, 2], 5)],
    [([3, 20, 7], [26, 27, 28, 2], 5)],
]
ADVANTAGES = [1.5, -1.0, -2.0, 0.5]
ROWS = {  # variant -> numerator of r_d over mu, or None; denominator of r_s
    "ppo_clip": (None, "old"),
    "ppo_clip_train_infer": (None, "mu"),
    "decoupled_exact": ("old", "old"),
    "decoupled_async": ("async", "async"),
    "linear_prox": (None, "linear"),
    "loglinear_prox": (None, "loglinear"),
    "ppo_ewma": (None, "ewma"),
    "ppo_ewma_train_infer": ("ewma", "ewma"),
    "linear_train_infer": ("linear", "linear"),
    "loglinear_train_infer": ("loglinear", "loglinear"),
    "aged_train_infer": ("aged", "aged"),
    "rescore_train_infer": ("rescore", "rescore"),
    "mis_balance": (None, "balance"),
}
BAND, EPS_LOW, EPS_HIGH, DUAL, WEIGHT_MU = 1.5, 0.2, 0.28, 3.0, 0.25


def perturbed(model, scale, seed):
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(scale * p.std() * torch.randn(p.shape, generator=generator))
    return other


def logps(model, batch):
    """Float64, of every token but the first of each sequence; 0 there. Keeps the graph."""
    pieces = []
    for start, end in zip(batch.starts[:-1], batch.starts[1:], strict=True):
        ids = torch.from_numpy(batch.token_ids[start:end])
        logits = model(ids[None]).logits[0].double() / torch.from_numpy(batch.temperature[start:end, None]).double().roll(-1, 0)
        picked = torch.log_softmax(logits[:-1], 1).gather(1, ids[1:, None])[:, 0]
        pieces += [torch.zeros(1, dtype=torch.float64), picked]
    return torch.cat(pieces)


@dataclasses.dataclass
class Case:
    """A batch, the live model, and the float64 log-probs of the loss tokens by policy."""

    batch: object
    model: object
    double: object
    logp: dict

    def scored(self, policy):
        tags = self.batch.version[self.batch.loss_mask]
        return Scored(policy=policy, values=self.logp[policy.value].float().numpy(), computed_at=tags, num_switches=2)


@pytest.fixture(scope="module")
def case(tiny_folder):
    """Versions 4 (perturbed) and 5 (live); mu is OLD with noise that leaves the band for some tokens."""
    live = load_model(tiny_folder)
    models = {
        4: perturbed(live, 0.5, 4),
        5: live,
        "async": perturbed(live, 0.2, 6),
        "ewma": perturbed(live, 0.3, 7),
        "aged": perturbed(live, 0.4, 8),
        "rescore": perturbed(live, 0.4, 9),
        "balance": perturbed(live, 0.3, 10),
    }
    segments = [[s for read, said, v in turns for s in (read, sampled(said, v, temperature=0.8))] for turns in TURNS]
    made = [trajectory(*s, id=f"g{i // 2}.{i % 2}", group=f"g{i // 2}") for i, s in enumerate(segments)]
    batch = batch_of(made, ADVANTAGES, num_steps=2)
    with torch.no_grad():
        by_model = {key: logps(copy.deepcopy(m).double(), batch) for key, m in models.items()}
    old = torch.where(torch.from_numpy(batch.version) == 4, by_model[4], by_model[5])[batch.loss_mask]
    noise = torch.randn(len(old), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mu = (old + 0.3 * noise).clamp(max=0).float()
    logp_mu = np.zeros(batch.num_tokens, np.float32)
    logp_mu[batch.loss_mask] = mu.numpy()
    others = {k: by_model[k][batch.loss_mask] for k in ("async", "ewma", "aged", "rescore", "balance")}
    logp = {"old": old, "mu": mu.double()} | others
    logp = {name: values.float().double() for name, values in logp.items()}  # what a float32 record keeps
    return Case(dataclasses.replace(batch, logp_mu=logp_mu), live, copy.deepcopy(live).double(), logp)


def oracle(case, variant, *, step=None, denominator="token-mean", discrepancy="weight_and_mask"):
    """Loss and gradient by name, as PAPER.md writes them: one token at a time. Also the masks, for the test's own sake."""
    batch = case.batch
    theta = logps(case.double, batch)[batch.loss_mask]
    logp = case.logp | {"theta": theta.detach()}
    mu_p, theta_p = logp["mu"].exp(), logp["theta"].exp()
    logp["linear"] = (WEIGHT_MU * mu_p + (1 - WEIGHT_MU) * theta_p).log()
    logp["loglinear"] = WEIGHT_MU * logp["mu"] + (1 - WEIGHT_MU) * logp["theta"]
    numerator, proximal = ROWS[variant]
    sequence = batch.sequence[batch.loss_mask]
    here = [i for i in range(len(theta)) if step is None or batch.step[sequence[i]] == step]
    values, kept, active = {}, [], []
    for i in here:
        r_d = 1.0 if numerator is None else math.exp(logp[numerator][i] - logp["mu"][i])
        r_s = (theta[i] - logp[proximal][i]).exp()
        a = float(batch.advantages[sequence[i]])
        inside = 1 / BAND <= r_d <= BAND
        h = r_s.clamp(max=1 + EPS_HIGH) if a > 0 else r_s.clamp(1 - EPS_LOW, DUAL)
        weight = r_d if discrepancy == "weight_and_mask" else 1.0
        values[i] = weight * inside * a * h
        kept += [i] if inside else []
        active += [i] if inside and bool(h == r_s) else []
    if denominator == "token-mean":
        shares = {i: 1 / len(here) for i in here}
    elif denominator == "token-mean-kept":
        shares = {i: 1 / len(kept) for i in here}
    elif denominator == "constant":
        shares = dict.fromkeys(here, 1 / 7.0)
    else:
        sizes = {s: sum(sequence[i] == s for i in here) for s in {int(sequence[i]) for i in here}}
        shares = {i: 1 / (sizes[int(sequence[i])] * len(sizes)) for i in here}
    loss = -sum(shares[i] * values[i] for i in here)
    case.double.zero_grad()
    loss.backward()
    grads = {name: p.grad.clone() for name, p in case.double.named_parameters()}
    return float(loss.detach()), grads, kept, active


class Recording:
    """An optimizer that keeps the gradients of every step, and does not move."""

    lr = 0.25

    def __init__(self, model):
        self.model, self.grads = model, []

    def zero_grad(self):
        self.model.zero_grad(set_to_none=True)

    def step(self):
        self.grads.append({name: p.grad.clone() for name, p in self.model.named_parameters()})


def run(case, config, scored, batch=None, version=VERSION):
    optimizer = Recording(case.model)
    result = update(case.model, optimizer, batch or case.batch, scored, version=version, spec=trainer_spec(config))
    return result, optimizer.grads


def assert_same_gradient(found, expected, tolerance=1e-5):
    scale = max(float(g.abs().max()) for g in expected.values())
    assert scale > 1e-3, "a gradient of nothing proves nothing"
    for name, grad in expected.items():
        assert float((found[name].double() - grad.double()).abs().max()) < tolerance * scale, name


def config_of(recipe, variant, **table):
    objective = {"interpolation_mu": WEIGHT_MU, "loss_aggregation_tokens": 7.0} | table.pop("objective", {})
    return recipe(variant=variant, band=BAND, objective=objective, **table)


def scored_for(case, variant):
    needed = {"old": OLD, "async": ASYNC, "ewma": EWMA, "aged": AGED, "rescore": RESCORE, "balance": BALANCE}.get(
        ROWS[variant][1]
    )
    return None if needed is None else case.scored(needed)


def test_the_case_meets_band_and_clip_on_both_sides(case):
    _, _, kept, active = oracle(case, "decoupled_exact")
    num = int(case.batch.loss_mask.sum())
    assert 0 < len(active) < len(kept) < num
    lag = VERSION - case.batch.version[case.batch.loss_mask]
    assert set(lag.tolist()) == {0, 1}
    assert {int(lag[i]) for i in active} == {0, 1}


@pytest.mark.parametrize("variant", ROWS)
def test_loss_and_gradient_are_the_papers_for_every_variant(case, recipe, variant):
    result, (found,) = run(case, config_of(recipe, variant), scored_for(case, variant), batch=one_step(case.batch))
    loss, grads, _, active = oracle(case, variant)
    assert result.metrics["loss/value"] == pytest.approx(loss, abs=2e-6)
    assert_same_gradient(found, grads)
    assert np.flatnonzero(result.table["active_mask"]).tolist() == active


def one_step(batch):
    return dataclasses.replace(batch, step=np.zeros_like(batch.step))


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["decoupled_exact", "linear_train_infer"])
@pytest.mark.parametrize("denominator", ["token-mean", "token-mean-kept", "sequence-mean", "constant"])
def test_each_optimizer_step_trains_its_groups_under_its_own_denominator(case, recipe, variant, denominator):
    config = config_of(recipe, variant, trainer={"minibatches_per_update": 2}, objective={"loss_aggregation": denominator})
    result, found = run(case, config, scored_for(case, variant))
    losses = []
    for step in (0, 1):
        loss, grads, _, _ = oracle(case, variant, step=step, denominator=denominator)
        assert_same_gradient(found[step], grads)
        losses.append(loss)
    assert result.metrics["loss/value"] == pytest.approx(sum(losses) / 2, abs=2e-6)


def test_the_discrepancy_ratio_may_mask_without_weighting(case, recipe):
    config = config_of(recipe, "decoupled_exact", objective={"mismatch_correction": "mask"})
    _, (found,) = run(case, config, case.scored(OLD), batch=one_step(case.batch))
    _, grads, _, _ = oracle(case, "decoupled_exact", discrepancy="mask")
    assert_same_gradient(found, grads)


def test_truncated_importance_sampling_trains_every_token_with_a_capped_total_ratio(case, recipe):
    cap = 1.1
    config = config_of(recipe, "ppo_clip_train_infer", objective={"clip": "truncated", "is_cap": cap})
    result, (found,) = run(case, config, None, batch=one_step(case.batch))
    theta = logps(case.double, case.batch)[case.batch.loss_mask]
    ratio = (theta.detach() - case.logp["mu"]).exp()
    a = torch.from_numpy(case.batch.advantages[case.batch.sequence[case.batch.loss_mask]]).double()
    assert 0 < int((ratio > cap).sum()) < len(ratio)
    case.double.zero_grad()
    (-(ratio.clamp(max=cap) * a * theta).mean()).backward()
    assert_same_gradient(found, {name: p.grad for name, p in case.double.named_parameters()})
    value = a * torch.where(ratio > cap, cap * (1 + (ratio / cap).log()), ratio)
    assert result.metrics["loss/value"] == pytest.approx(-float(value.mean()), abs=2e-6)
    assert result.table["active_mask"].all()
    assert result.metrics["mask/rho"] == result.metrics["mask/rho_clip"] == 1
    assert sum(result.metrics[f"mask/num_clipped_{side}"] for side in ("high", "low", "dual")) == 0
    assert result.metrics["mask/num_truncated"] == int((ratio > cap).sum())
    ppo = config_of(recipe, "ppo_clip_train_infer", objective={"is_cap": cap})
    assert run(case, ppo, None, batch=one_step(case.batch))[0].metrics["mask/num_truncated"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("denominator", ["token-mean", "token-mean-kept", "sequence-mean"])
def test_loss_and_gradient_do_not_depend_on_the_size_of_micro_batches_and_head_chunks(case, recipe, denominator):
    def of(micro, chunk):
        trainer = {"micro_batch_tokens": micro, "head_chunk_tokens": chunk}
        config = config_of(recipe, "linear_train_infer", trainer=trainer, objective={"loss_aggregation": denominator})
        result, (grads,) = run(case, config, None, batch=one_step(case.batch))
        return result.metrics["loss/value"], grads

    loss, grads = of(1000, 1000)
    for micro, chunk in [(1, 1000), (12, 3), (1000, 1)]:
        other_loss, other_grads = of(micro, chunk)
        assert other_loss == pytest.approx(loss, abs=1e-6)
        assert_same_gradient(other_grads, grads, tolerance=1e-5)


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("micro", [1, 12, 1000])
def test_ranks_that_average_their_gradients_get_that_of_one_whatever_the_micro_batches(case, recipe, num_ranks, micro):
    """Each rank's part is computed here one after the other; processes that do it: `tests/backends/test_torchrun.py`."""
    batch = one_step(case.batch)

    def of(micro, ranks):
        model = copy.deepcopy(case.model)
        config = config_of(recipe, "decoupled_exact", trainer={"micro_batch_tokens": micro})
        tokens = LossTokens.of(batch, case.scored(OLD), VERSION)
        seen = TokenRecord.empty(len(tokens.flat), torch.device("cpu"))
        step_module._accumulate(model, batch, tokens, 0, seen, trainer_spec(config), ranks)
        return {name: p.grad for name, p in model.named_parameters()}

    whole = of(1000, ALONE)
    parts = [of(micro, Ranks(rank=rank, num_ranks=num_ranks, mesh=None)) for rank in range(num_ranks)]
    average = {name: sum(part[name] for part in parts) / num_ranks for name in whole}
    assert_same_gradient(average, whole, tolerance=1e-6)


@pytest.mark.parametrize("variant", ["loglinear_prox", "loglinear_train_infer"])
@pytest.mark.parametrize("denominator", ["token-mean", "token-mean-kept"])
def test_under_a3pos_schedule_each_token_has_the_weight_of_its_own_staleness(case, recipe, variant, denominator):
    version = VERSION + 2  # staleness 2 and 3
    objective = {"interpolation_schedule": "a3po", "loss_aggregation": denominator}
    config = config_of(recipe, variant, objective=objective)
    result, _ = run(case, config, None, batch=one_step(case.batch), version=version)
    table = result.table
    alpha = (table["staleness"] - 1) / table["staleness"]
    expected = table["logp_mu"] + alpha * (table["logp_theta"] - table["logp_mu"])
    assert set(table["staleness"].tolist()) == {2, 3}
    np.testing.assert_allclose(table["logp_proximal"], expected, rtol=0, atol=2e-6)
    if denominator == "token-mean-kept" and variant == "loglinear_train_infer":
        kept = np.abs(table["log_r_d"]) <= math.log(BAND)
        h = np.exp(table["log_r_s"].astype(float))
        positive = table["advantage"] > 0
        h = np.where(positive, np.minimum(h, 1 + EPS_HIGH), np.clip(h, 1 - EPS_LOW, DUAL))
        values = np.exp(table["log_r_d"]) * table["advantage"] * h
        assert 0 < kept.sum() < len(kept)
        assert result.metrics["loss/value"] == pytest.approx(-values[kept].sum() / kept.sum(), rel=1e-5)


def test_a_route_that_fell_back_labels_its_tokens_by_what_they_are(case, recipe):
    scored = dataclasses.replace(case.scored(AGED), provenance=Provenance.ASYNC)
    result, _ = run(case, config_of(recipe, "aged_train_infer"), scored)
    assert result.provenance == {"async": len(scored.values)}
    assert set(result.table["provenance"].tolist()) == {"async"}
    result, _ = run(case, config_of(recipe, "aged_train_infer"), case.scored(AGED))
    assert result.provenance == {"aged": len(scored.values)}


def test_old_of_lag_0_tokens_equals_theta_before_the_first_step(case, recipe):
    result, _ = run(case, config_of(recipe, "decoupled_exact", trainer={"minibatches_per_update": 2}), case.scored(OLD))
    assert result.lag0_max_abs_error == 0
    assert 0 <= result.rescored_max_abs_error < 2e-6


def test_a_false_old_shows_in_the_lag_0_witness_by_its_size(case, recipe):
    scored = case.scored(OLD)
    lag0 = np.flatnonzero(case.batch.version[case.batch.loss_mask] == VERSION)
    values = scored.values.copy()
    values[lag0[1]] -= 0.125
    config = config_of(recipe, "decoupled_exact")
    with pytest.raises(ExactnessError, match=r"differ by up to 1\.25e-01"):
        run(case, config, dataclasses.replace(scored, values=values), batch=one_step(case.batch))


def test_with_experts_the_lag_0_witness_leaves_out_one_sequence_and_counts_its_tokens(case, recipe, monkeypatch):
    monkeypatch.setattr(step_module, "is_routed", lambda model: True)
    scored, mask = case.scored(OLD), case.batch.loss_mask
    lag0 = case.batch.version[mask] == VERSION
    sequence = case.batch.sequence[mask]
    config, batch = config_of(recipe, "decoupled_exact"), one_step(case.batch)
    assert np.bincount(sequence[lag0]).tolist() == [3, 0, 2, 4]

    def moved(chosen):
        values = np.where(chosen, scored.values - np.float32(0.125), scored.values)
        return run(case, config, dataclasses.replace(scored, values=values), batch=batch)[0]

    assert moved(lag0 & False).metrics["consistency/num_lag0_above"] == 0
    result = moved(lag0 & (sequence == 3))
    assert result.metrics["consistency/num_lag0_above"] == 4
    assert result.rescored_max_abs_error == pytest.approx(0.125, abs=1e-5)
    with pytest.raises(ExactnessError, match=r"differ by up to 1\.25e-01"):
        moved(lag0 & (sequence != 2))


def test_with_replayed_experts_the_lag_0_witness_leaves_out_no_token(case, recipe, monkeypatch):
    monkeypatch.setattr(step_module, "is_routed", lambda model: True)
    scored, mask = case.scored(OLD), case.batch.loss_mask
    lag0 = np.flatnonzero(case.batch.version[mask] == VERSION)
    config = config_of(recipe, "decoupled_exact", model={"routing": "replayed"})
    assert "consistency/num_lag0_above" not in run(case, config, scored, batch=one_step(case.batch))[0].metrics
    values = scored.values.copy()
    values[lag0[0]] -= 0.125
    with pytest.raises(ExactnessError, match=r"differ by up to 1\.25e-01"):
        run(case, config, dataclasses.replace(scored, values=values), batch=one_step(case.batch))


def test_a_nan_among_lag_0_tokens_does_not_hide_a_false_old(case, recipe):
    scored = case.scored(OLD)
    lag0 = np.flatnonzero(case.batch.version[case.batch.loss_mask] == VERSION)
    values = scored.values.copy()
    values[lag0[0]], values[lag0[1]] = np.nan, values[lag0[1]] - 0.125
    config = config_of(recipe, "decoupled_exact")
    with pytest.raises(ExactnessError, match="OLD of lag-0 tokens contradicts THETA"):
        run(case, config, dataclasses.replace(scored, values=values), batch=one_step(case.batch))


def test_lag_0_tokens_over_entries_of_older_versions_are_no_witness(case, recipe):
    scored = case.scored(OLD)
    lag0 = np.flatnonzero(case.batch.loss_mask & (case.batch.version == VERSION))
    values, mixed = scored.values.copy(), np.zeros_like(case.batch.loss_mask)
    values[np.searchsorted(np.flatnonzero(case.batch.loss_mask), lag0[1])] -= 0.125
    mixed[lag0[1]] = True
    config, batch = config_of(recipe, "decoupled_exact"), dataclasses.replace(one_step(case.batch), mixed_kv=mixed)
    result, _ = run(case, config, dataclasses.replace(scored, values=values), batch=batch)
    assert 0 <= result.lag0_max_abs_error < 2e-6


@pytest.mark.parametrize("variant", ["decoupled_async", "linear_prox"])
def test_there_is_no_lag_0_witness_where_the_proximal_policy_is_not_old(case, recipe, variant):
    result, _ = run(case, config_of(recipe, variant), scored_for(case, variant))
    assert math.isnan(result.lag0_max_abs_error)


def test_there_is_no_lag_0_witness_without_tokens_of_the_current_version(case, recipe):
    result, _ = run(case, config_of(recipe, "decoupled_exact"), case.scored(OLD), version=VERSION + 1)
    assert math.isnan(result.lag0_max_abs_error)
    assert set(result.staleness_counts) == {1, 2}


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_a_non_finite_log_prob_drops_its_token_and_is_counted(case, recipe, bad):
    where = np.flatnonzero(case.batch.loss_mask)[[0, 5]]
    logp_mu = case.batch.logp_mu.copy()
    logp_mu[where] = bad
    batch = one_step(dataclasses.replace(case.batch, logp_mu=logp_mu))
    result, (found,) = run(case, config_of(recipe, "decoupled_exact"), case.scored(OLD), batch=batch)
    mu = case.logp["mu"].clone()
    mu[[0, 5]] = 50.0  # far outside the band: the same as dropped, and the denominator still counts it
    _, grads, _, active = oracle(dataclasses.replace(case, logp=case.logp | {"mu": mu}), "decoupled_exact")
    assert_same_gradient(found, grads)
    assert result.metrics["mask/num_nonfinite"] == 2
    assert not result.table["active_mask"][[0, 5]].any()
    assert np.flatnonzero(result.table["active_mask"]).tolist() == active


def test_a_gradient_that_is_not_finite_ends_the_update_before_the_step_with_version_and_step(case, recipe):
    batch = dataclasses.replace(case.batch, advantages=np.float32([1, 1, -3e38, 3e38]))  # the second step's
    before = {name: w.clone() for name, w in named_weights(case.model).items()}
    config = config_of(recipe, "decoupled_exact", trainer={"minibatches_per_update": 2})
    optimizer = Recording(case.model)
    with pytest.raises(NonFiniteError, match=f"not finite at version {VERSION}, optimizer step 1"):
        update(case.model, optimizer, batch, case.scored(OLD), version=VERSION, spec=trainer_spec(config))
    assert len(optimizer.grads) == 1
    assert all(torch.equal(w, before[name]) for name, w in named_weights(case.model).items())


@pytest.mark.parametrize("variant, policy", [("decoupled_exact", None), ("decoupled_exact", ASYNC), ("decoupled_async", OLD)])
def test_log_probs_that_the_variant_needs_are_never_made_up(case, recipe, variant, policy):
    needed = "OLD" if variant == "decoupled_exact" else "ASYNC"
    with pytest.raises(MissingLogprobError, match=f"variant '{variant}' needs log-probs of {needed}"):
        run(case, config_of(recipe, variant), policy and case.scored(policy))


def test_the_gradient_is_clipped_to_its_norm_and_the_norm_before_is_reported(case, recipe):
    free, (grads,) = run(case, config_of(recipe, "decoupled_exact"), case.scored(OLD), batch=one_step(case.batch))
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in grads.values()))
    assert free.metrics["grad/norm"] == pytest.approx(norm, rel=1e-5)
    config = config_of(recipe, "decoupled_exact", trainer={"max_grad_norm": norm / 4})
    clipped, (found,) = run(case, config, case.scored(OLD), batch=one_step(case.batch))
    assert clipped.metrics["grad/norm"] == pytest.approx(norm, rel=1e-5)
    assert_same_gradient({name: 4 * g for name, g in found.items()}, grads)


def test_the_table_has_one_row_per_loss_token_with_what_the_objective_saw(case, recipe):
    batch = one_step(case.batch)
    result, _ = run(case, config_of(recipe, "decoupled_exact"), case.scored(OLD), batch=batch)
    table, mask = result.table, batch.loss_mask
    assert table["token_id"].tolist() == batch.token_ids[mask].tolist()
    assert table["trajectory"].tolist() == [batch.trajectory_ids[s] for s in batch.sequence[mask]]
    assert table["index"].tolist() == [int(i - batch.starts[batch.sequence[i]]) for i in np.flatnonzero(mask)]
    assert table["staleness"].tolist() == (VERSION - batch.version[mask]).tolist()
    np.testing.assert_allclose(table["log_r_d"], case.logp["old"] - case.logp["mu"], atol=1e-6)
    np.testing.assert_allclose(table["log_r_s"], table["logp_theta"] - table["logp_proximal"], atol=1e-6)
    old = np.where(batch.old_is_theta(VERSION), table["logp_theta"], case.scored(OLD).values)
    np.testing.assert_array_equal(table["logp_proximal"], old)
    np.testing.assert_array_equal(table["active_mask"], table["band_mask"] & table["clip_mask"])
    assert {len(column) for name, column in table.items() if name != "context"} == {int(mask.sum())}
    assert set(table["provenance"]) == {"exact"}


def test_the_table_holds_all_that_the_update_has_read(case, recipe):
    batch = case.batch
    table = run(case, config_of(recipe, "decoupled_exact"), case.scored(OLD), batch=batch)[0].table
    assert table["step"].tolist() == batch.step[batch.sequence[batch.loss_mask]].tolist()
    assert table["temperature"].tolist() == batch.temperature[batch.loss_mask].tolist()
    assert table["mixed_kv"].tolist() == batch.mixed_kv[batch.loss_mask].tolist()
    context, rebuilt, before = iter(table["context"].tolist()), [], None
    for name, index, token in zip(table["trajectory"], table["index"], table["token_id"], strict=True):
        follows = rebuilt[-1][1] + 1 if before == name else 0
        rebuilt += [(next(context), at) for at in range(follows, index)] + [(int(token), int(index))]
        before = name
    assert next(context, None) is None
    read = [np.flatnonzero(batch.loss_mask & (batch.sequence == s)).max() for s in range(batch.num_sequences)]
    whole = [i for s, last in enumerate(read) for i in range(batch.starts[s], last + 1)]
    assert [token for token, _ in rebuilt] == batch.token_ids[whole].tolist()


def test_tokens_are_counted_by_staleness_and_by_provenance(case, recipe):
    mask = case.batch.loss_mask
    mixed = mask & (case.batch.version == 5) & (case.batch.sequence == 0)
    batch = dataclasses.replace(case.batch, mixed_kv=mixed)
    exact, _ = run(case, config_of(recipe, "decoupled_exact"), case.scored(OLD), batch=batch)
    num_mixed, num_lag0 = int(mixed.sum()), int((case.batch.version[mask] == VERSION).sum())
    assert exact.staleness_counts == {0: num_lag0, 1: int(mask.sum()) - num_lag0}
    assert exact.provenance == {"exact": int(mask.sum()) - num_mixed, "mixed_kv": num_mixed}
    assert (exact.table["provenance"] == "mixed_kv").tolist() == mixed[mask].tolist()
    other, _ = run(case, config_of(recipe, "decoupled_async"), case.scored(ASYNC), batch=batch)
    assert other.provenance == {"async": int(mask.sum())}


def test_policies_of_the_oracle_are_those_of_the_package():
    assert {name for row in ROWS.values() for name in row if name} <= {p.value for p in type(THETA)}


@pytest.mark.slow
@pytest.mark.parametrize("variant, policy", [("decoupled_exact", OLD), ("loglinear_train_infer", None)])
@pytest.mark.parametrize("denominator", ["token-mean", "token-mean-kept", "sequence-mean", "constant"])
def test_a_step_computes_on_the_device_of_the_model(variant, policy, denominator, case, recipe, monkeypatch):
    """ "meta" stands for a GPU: like one it refuses to be mixed with the CPU. What is read back from it is made up."""
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: torch.ones_like(self, device="cpu"))
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda position_ids: None)
    model, there = copy.deepcopy(case.model).to("meta"), torch.device("meta")
    config = recipe(variant=variant, band=BAND, objective={"loss_aggregation": denominator}, trainer={"head_chunk_tokens": 3})
    tokens = LossTokens.of(case.batch, case.scored(policy) if policy else None, VERSION).to(there)
    seen = TokenRecord.empty(len(tokens.flat), there)
    loss, _ = step_module._accumulate(model, case.batch, tokens, 0, seen, trainer_spec(config), ALONE)
    assert {loss.device, *(p.grad.device for p in model.parameters())} == {there}
