"""Other trainers' own losses and corrections beside ours: the same loss and the same gradient, by their presets, too."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from areal.api.cli_args import RejectionSamplingConfig
from areal.trainer.ppo import actor as areal_actor
from areal.utils.functional import functional as areal
from trl import GRPOTrainer
from verl.trainer.config.algorithm import RolloutCorrectionConfig
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_rejection_mask
from verl.workers.config import ActorConfig

from oldlogits.config.load import config_from_table
from oldlogits.config.objective.presets import PRESETS
from oldlogits.core.loss import LOSSES, STEP_RULES, LossInputs, Objective
from oldlogits.core.objective.cards import CARDS
from oldlogits.core.objective.correction import Correction
from oldlogits.core.policies import ASYNC, MU, OLD, THETA, find_variant
from oldlogits.objective import correct, log_discrepancy, mean_weight, token_weights, weighted_loss
from oldlogits.train.spec import objective_of

pytestmark = pytest.mark.peers

ROWS, COLUMNS = 12, 10


@pytest.fixture(scope="module")
def data():
    """Padded log-probs of three policies, with rows of different lengths, and drifts that reach every bound."""
    draw = torch.Generator().manual_seed(5)

    def noise(scale):
        rows = torch.linspace(0.02, 1.0, ROWS)[:, None]
        return scale * rows * torch.randn(ROWS, COLUMNS, generator=draw, dtype=torch.float64)

    old = -0.2 - 2 * torch.rand(ROWS, COLUMNS, generator=draw, dtype=torch.float64)
    lengths = torch.randint(3, COLUMNS + 1, (ROWS,), generator=draw)
    mask = torch.arange(COLUMNS)[None] < lengths[:, None]
    advantages = torch.where(torch.arange(ROWS) % 2 == 0, 1.3, -0.7).double()[:, None].expand(ROWS, COLUMNS)
    clip = {"max": -1e-3}
    return {
        "old": old,
        "mu": (old + noise(0.6)).clamp(**clip),
        "theta": (old + noise(0.4)).clamp(**clip),
        "a": advantages,
        "mask": mask,
    }


def flat(data, theta, proximal):
    rows = torch.arange(ROWS)[:, None].expand(ROWS, COLUMNS)[data["mask"]]
    return LossInputs(
        logp={proximal: data["old"][data["mask"]], MU: data["mu"][data["mask"]], THETA: theta[data["mask"]]},
        advantages=data["a"][data["mask"]],
        loss_mask=torch.ones(len(rows), dtype=torch.bool),
        staleness=torch.zeros(len(rows), dtype=torch.int64),
        sequence_index=rows,
        num_sequences=ROWS,
    )


def ours(data, theta, name, knobs, aggregation="token-mean"):
    """The loss of the whole batch."""
    tokens = flat(data, theta, knobs.variant.proximal)
    if CARDS[name].step_rule:
        step_mask = STEP_RULES.find(CARDS[name].step_rule)(tokens, knobs)
        tokens = replace(tokens, step_mask=step_mask)
    terms = LOSSES.find(name)(tokens, knobs)
    kept = (
        correct(log_discrepancy(knobs.variant, tokens.logp), tokens, knobs).kept if aggregation == "token-mean-kept" else None
    )
    weights = token_weights(
        tokens.loss_mask,
        mode=aggregation,
        sequence_index=tokens.sequence_index,
        num_sequences=ROWS,
        kept_mask=kept,
        dtype=torch.float64,
    )
    return weighted_loss(terms.values, weights)


def same(data, theirs, mine, *, by_row=False):
    """Both losses, and their gradients with respect to theta; or what the gradients of each row sum up to."""
    thetas = [data["theta"].clone().requires_grad_() for _ in range(2)]
    losses = [loss(theta) for loss, theta in zip((theirs, mine), thetas, strict=True)]
    gradients = [torch.autograd.grad(loss, theta)[0] for loss, theta in zip(losses, thetas, strict=True)]
    gradients = [one.sum(1) for one in gradients] if by_row else gradients
    torch.testing.assert_close(losses[1], losses[0].double(), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-6, atol=1e-9)
    assert gradients[0].count_nonzero() > 0


def verl_config(**changes):
    given = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28, "clip_ratio_c": 3.0, **changes}
    made = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, **given)
    return made


def ppo_knobs(**changes):
    return Objective(variant=find_variant("ppo_clip"), eps_low=0.2, eps_high=0.28, **changes)


TIGHT = {"clip_ratio_low": 0.02, "clip_ratio_high": 0.05, "clip_ratio_c": 1.2}
VERL = {
    "gspo": ("gspo", {}, {}, "sequence-mean", {}),
    "sapo": ("sapo", {}, {}, "sequence-mean", {}),
    "cispo": ("cispo", {}, {"low": 0.8, "high": 1.28}, "token-mean", {}),
    "dppo_tv": ("dppo_tv", {}, {"low": 0.02, "high": 0.05, "cap": 1.2}, "token-mean", TIGHT),
    "dppo_kl": ("dppo_kl", {}, {"low": 0.02, "high": 0.05, "cap": 1.2}, "token-mean", TIGHT),
    "geo_mean": ("gmpo", {}, {"log_low": 0.2, "log_high": 0.28}, "sequence-mean", {}),
    "vanilla": ("masked_is", {"dual_clip": 3.0}, None, "token-mean", {}),
}


@pytest.mark.parametrize("theirs", VERL)
def test_verls_registered_losses_are_ours(data, theirs):
    name, changed, options, aggregation, clips = VERL[theirs]
    made = CARDS[name].options(**options) if CARDS[name].options else None
    knobs = ppo_knobs(**({"dual_clip": None} | changed), options=made)
    function, config = get_policy_loss_fn(theirs), verl_config(**clips)

    def loss(theta):
        mode = "token-mean" if aggregation == "token-mean" else "seq-mean-token-mean"
        return function(data["old"], theta, data["a"], data["mask"].double(), mode, config)[0]

    same(data, loss, lambda theta: ours(data, theta, name, knobs, aggregation))


def by_preset(name):
    config = config_from_table({"objective": {"preset": name}})
    knobs = objective_of(config.objective, config.correction, variant=config.variant, band=config.band)
    return config.objective.loss, knobs, config.objective.loss_aggregation


DECOUPLED = [name for name in PRESETS if name.startswith("verl:") and "bypass" not in name and "disabled" not in name]


@pytest.mark.parametrize("preset", DECOUPLED)
def test_verls_correction_of_a_preset_is_ours(data, preset):
    loose = {"rs_threshold": "0.9_1.1"} if "geo" in preset else {}
    made = getattr(RolloutCorrectionConfig, "decoupled_" + preset.partition(":")[2].replace("-", "_"))
    correction, (name, knobs, aggregation) = made(), by_preset(preset)
    mask, old = data["mask"].double(), data["old"]
    small = {**data, "mu": old + 0.01 * (data["mu"] - old)} if loose or "k3" in preset else data
    weights, kept, _ = compute_rollout_correction_and_rejection_mask(
        old_log_prob=old,
        rollout_log_prob=small["mu"],
        response_mask=mask,
        rollout_is=correction.rollout_is,
        rollout_is_threshold=correction.rollout_is_threshold,
        rollout_rs=correction.rollout_rs,
        rollout_rs_threshold=correction.rollout_rs_threshold,
    )
    if correction.rollout_rs and "k3" not in preset:
        assert 0 < kept.sum() < mask.sum(), "the rejection acts"
    config = verl_config(clip_ratio_high=0.2)
    of_weights = weights.batch["rollout_is_weights"] if weights is not None else None
    function = get_policy_loss_fn("vanilla")

    def loss(theta):
        return function(old, theta, data["a"], kept, "token-mean", config, of_weights)[0]

    same(small, loss, lambda theta: ours(small, theta, name, knobs, aggregation))


@pytest.mark.parametrize("preset", [name for name in PRESETS if name.startswith("verl:bypass")])
def test_verls_bypass_mode_of_a_preset_is_ours(data, preset):
    made = getattr(RolloutCorrectionConfig, preset.partition(":")[2].replace("-", "_"))
    config, (name, knobs, aggregation) = verl_config(clip_ratio_high=0.2), by_preset(preset)
    small = {**data, "theta": data["mu"] + 0.01 * (data["theta"] - data["mu"])} if "geo" in preset or "k3" in preset else data
    config.global_batch_info.update(batch_num_tokens=int(data["mask"].sum()), dp_size=1)
    object.__setattr__(config, "policy_loss", {"rollout_correction": vars(made())})
    function = get_policy_loss_fn("bypass_mode")

    def loss(theta):
        return function(small["mu"], theta, data["a"], data["mask"].double(), "token-mean", config)[0]

    same(small, loss, lambda theta: ours(small, theta, name, knobs, aggregation))


def test_verls_batch_normalised_weights_have_our_mean(data):
    for level in ("token", "sequence"):
        knobs = Objective(
            variant=find_variant("decoupled_exact"), band=math.inf, correction=Correction(weight_level=level, weight_high=2.0)
        )
        given = {"rollout_is": level, "rollout_is_threshold": 2.0, "rollout_rs": None, "rollout_rs_threshold": None}
        policies = {"old_log_prob": data["old"], "rollout_log_prob": data["mu"], "response_mask": data["mask"].double()}
        found = [
            compute_rollout_correction_and_rejection_mask(**policies, **given, rollout_is_batch_normalize=flag)[0].batch[
                "rollout_is_weights"
            ]
            for flag in (False, True)
        ]
        tokens = flat(data, data["theta"], OLD)
        mean = mean_weight(log_discrepancy(knobs.variant, tokens.logp), tokens, knobs)
        torch.testing.assert_close(found[0] / mean, found[1], rtol=1e-6, atol=1e-9)


def areal_loss(data, theta, *, rejection=None, **changes):
    given = {"eps_clip": 0.4, "loss_mask": data["mask"], "advantages": data["a"], "rejection_sampling": rejection, **changes}
    return areal.ppo_actor_loss_fn(theta, data["old"], data["mu"], **given)[0]


@pytest.mark.parametrize(
    ("preset", "rejection", "changes"),
    [
        ("areal:grpo", {"upper": 5.0}, {}),
        ("areal:grpo", {"upper": 1.2}, {}),
        ("areal:icepop", {"upper": 5.0, "lower": 0.5}, {}),
        ("areal:gspo", {"upper": 5.0}, {"importance_sampling_level": "sequence"}),
    ],
)
def test_areals_decoupled_loss_with_rejection_is_ours(data, preset, rejection, changes):
    name, knobs, aggregation = by_preset(preset)
    if rejection["upper"] != 5.0:
        knobs = replace(knobs, correction=replace(knobs.correction, token_high=rejection["upper"]))
    made = RejectionSamplingConfig(level="token", action="mask", metric="ratio", **rejection)
    same(
        data,
        lambda theta: areal_loss(data, theta, rejection=made, **changes),
        lambda theta: ours(data, theta, name, knobs, aggregation),
        by_row=preset == "areal:gspo",
    )


def test_areals_sapo_is_ours(data):
    name, knobs, aggregation = by_preset("areal:sapo")

    def loss(theta):
        return areal.sapo_loss_fn(
            logprobs=theta, old_logprobs=data["mu"], advantages=data["a"], tau_pos=1.0, tau_neg=1.05, loss_mask=data["mask"]
        )[0]

    same(data, loss, lambda theta: ours(data, theta, name, knobs, aggregation))


@pytest.mark.parametrize("threshold", [0.04, 0.001, 1.0])
def test_areals_m2po_masks_our_tokens(data, threshold):
    kept = areal_actor._apply_m2po_masking(data["mu"], data["old"], data["mask"], threshold)
    _, knobs, _ = by_preset("areal:m2po")
    knobs = replace(knobs, options=CARDS["m2po"].options(threshold=threshold))
    mine = STEP_RULES.find(CARDS["m2po"].step_rule)(flat(data, data["theta"], ASYNC), knobs)
    assert mine.tolist() == kept[data["mask"]].tolist()
    assert 0 < kept.sum() <= data["mask"].sum()


@pytest.mark.parametrize("threshold", [0.5, 0.05])
def test_trls_off_policy_sequence_mask_drops_our_sequences(data, threshold):
    kept = GRPOTrainer.get_off_policy_mask(data["a"][:, :1], data["theta"], data["mu"], data["mask"].double(), threshold)
    knobs = ppo_knobs(dual_clip=None, options=CARDS["opsm"].options(threshold=threshold))

    def loss(theta):
        r = (theta - data["old"]).exp()
        clipped = torch.minimum(r * data["a"], r.clamp(0.8, 1.28) * data["a"])
        return -(clipped * kept * data["mask"]).sum() / data["mask"].sum()

    same(data, loss, lambda theta: ours(data, theta, "opsm", knobs))


class Stub(SimpleNamespace):
    """What TRL's `_compute_loss` reads of a trainer, whose forward pass gives the log-probs of the test."""

    def _get_per_token_logps_and_entropies(self, *_, **__):
        return self.theta, torch.zeros_like(self.theta), None

    get_off_policy_mask = staticmethod(GRPOTrainer.get_off_policy_mask)


def trl_loss(data, theta, *, ratio, **changes):
    gathered = SimpleNamespace(
        num_processes=1, gather=lambda x: x, gather_for_metrics=lambda x: x, reduce=lambda x, reduction: x, sync_gradients=True
    )
    args = SimpleNamespace(delta=None, sapo_temperature_pos=1.0, sapo_temperature_neg=1.05, use_bias_correction_kl=False)
    settings = {
        "loss_type": "dapo", "importance_sampling_level": "token", "epsilon_low": 0.2, "epsilon_high": 0.2, "beta": 0.0,
        "off_policy_mask_threshold": None, "top_entropy_quantile": 1.0, "use_vllm": True, "entropy_coef": 0.0,
        "vllm_importance_sampling_correction": True, "aux_loss_enabled": False, "_entropy_bonus_enabled": False,
        "use_adaptive_entropy": False, "current_gradient_accumulation_steps": 1,
    } | changes  # fmt: skip
    metrics = {mode: defaultdict(list) for mode in ("train", "eval")}
    stub = Stub(
        theta=theta, args=args, accelerator=gathered, model=SimpleNamespace(training=False), _metrics=metrics, **settings
    )
    mask = data["mask"].double()
    ids = torch.zeros(ROWS, COLUMNS, dtype=torch.int64)
    inputs = {
        "prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1], "completion_ids": ids, "completion_mask": mask,
        "advantages": data["a"][:, 0], "old_per_token_logps": data["old"], "sampling_per_token_logps": data["mu"],
        "importance_sampling_ratio": ratio, "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    return GRPOTrainer._compute_loss(stub, None, inputs)


def sequence_mask(data):
    """TRL's default: the product of r_d over a sequence weighs it, and one above 3 masks it."""
    product = ((data["old"] - data["mu"]) * data["mask"]).sum(1, keepdim=True).exp()
    return torch.where(product > 3.0, 0.0, product)


TRL = {
    "trl:grpo": (sequence_mask, {}),
    "trl:token-truncate": (lambda d: (d["old"] - d["mu"]).exp().clamp(max=3.0), {}),
    "trl:token-mask": (lambda d: (d["old"] - d["mu"]).exp().where((d["old"] - d["mu"]).exp() <= 3.0, 0.0), {}),
    "trl:sequence-truncate": (lambda d: ((d["old"] - d["mu"]) * d["mask"]).sum(1, keepdim=True).exp().clamp(max=3.0), {}),
    "trl:gspo": (
        sequence_mask,
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon_low": 3e-4, "epsilon_high": 4e-4},
    ),
    "trl:cispo": (sequence_mask, {"loss_type": "cispo", "epsilon_high": 5.0}),
    "trl:sapo": (sequence_mask, {"loss_type": "sapo"}),
    "trl:off-policy-mask": (sequence_mask, {"off_policy_mask_threshold": 0.5}),
}


@pytest.mark.parametrize("preset", TRL)
def test_trls_loss_of_a_preset_is_ours(data, preset):
    name, knobs, aggregation = by_preset(preset)
    ratio, changes = TRL[preset]
    same(
        data,
        lambda theta: trl_loss(data, theta, ratio=ratio(data), **changes),
        lambda theta: ours(data, theta, name, knobs, aggregation),
    )
    assert set(TRL) == {one for one in PRESETS if one.startswith("trl:")}
