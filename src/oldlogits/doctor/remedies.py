"""What to do about a finding, in the configuration keys of the framework that wrote the batch."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

FRAMEWORKS: Final = ("verl", "TRL", "AReaL", "prime-rl", "SkyRL", "slime", "oldlogits")
"""As remedies call them. miles takes slime's."""

_OWN_OLD: Final = {
    "": "score OLD at each token's own version: oldlogits.versions.PatchStore keeps the weights of a window (docs/adopt.md)",
    "verl": "trainer.v1.trainer_mode = separate_async_exact, algorithm.rollout_correction.bypass_mode = False",
    "TRL": "oldlogits.integrations.trl.make_exact(trainer, model) before train() of AsyncGRPOTrainer; GRPOTrainer has OLD",
    "AReaL": "actor.use_decoupled_loss = true, prox_logp_method = recompute, with oldlogits.integrations.areal.ExactProxLogp",
    "prime-rl": "trainer.loss import_path = oldlogits.integrations.prime_rl.exact_loss; or max_off_policy_steps = 0",
    "SkyRL": "override fwd_logprobs_values_reward to score at each token's version; or fully_async.max_staleness_steps = 0",
    "slime": "--keep-old-actor keeps one version; a tag per version in TensorBackuper keeps all; drop --use-rollout-logprobs",
    "oldlogits": "a variant over OLD, such as decoupled_exact, with proximal.source = snapshot",
}
_CLIP: Final = {
    "": "bound the ratio: a clip on r_s over OLD, a band on r_d, a dual clip where A < 0",
    "verl": "actor.clip_ratio_low / clip_ratio_high / clip_ratio_c; algorithm.rollout_correction.rollout_rs and its threshold",
    "TRL": "epsilon, epsilon_high, delta; vllm_importance_sampling_clip_max / _mode",
    "AReaL": "actor.eps_clip, eps_clip_higher, c_clip, rejection_sampling",
    "prime-rl": "trainer.loss.dppo_mask_low / dppo_mask_high: they bound differences of probability, not ratios",
    "SkyRL": "trainer.algorithm.eps_clip_low / eps_clip_high / clip_ratio_c ('dual_clip'), off_policy_correction.*",
    "slime": "--eps-clip, --eps-clip-high, --eps-clip-c, --use-tis with --tis-clip",
    "oldlogits": "objective.eps_low, objective.eps_high, objective.dual_clip, band",
}
_LOGPROBS: Final = {
    "": "let the engine return a log-prob for every sampled token, and mask or drop tokens without one",
    "verl": "actor_rollout_ref.rollout.calculate_log_probs = True",
    "TRL": "vllm_importance_sampling_correction = True asks vLLM for them",
    "AReaL": "the workflow must pass output_logprobs on, of the very request that sampled the tokens",
    "prime-rl": "the environment's trace must hold inference log-probs for every trained token",
    "SkyRL": "generator.sampling_params.logprobs = 0 or more; a custom generator must fill rollout_logprobs",
    "slime": "a custom --rollout-function-path must fill Sample.rollout_log_probs for every response token",
    "oldlogits": "the server protocol must return log-probs (docs/servers.md)",
}
_POSSIBLE: Final = _LOGPROBS | {
    "": "pass on what are log-probs of softmax(logits / temperature) of one token each: no logits, no negated values, no NaN"
}
_DISTRIBUTION: Final = {
    "": "sample from the full support, at the trainer's temperature, and let the engine report processed log-probs",
    "verl": "actor_rollout_ref.rollout.temperature / top_p = 1 / top_k = -1; vLLM's logprobs_mode = processed_logprobs",
    "TRL": "temperature, top_p = 1, top_k = 0; vLLM's logprobs_mode = processed_logprobs",
    "AReaL": "gconfig.temperature equal to actor.temperature, gconfig.top_p = 1",
    "prime-rl": "sampling temperature of the orchestrator equal to the trainer's, top_p = 1; vLLM's processed log-probs",
    "SkyRL": "generator.sampling_params.temperature equal to trainer.algorithm.temperature, top_p = 1",
    "slime": "--rollout-temperature, --rollout-top-p 1",
    "oldlogits": "sampling.temperature; the server's logprobs mode (docs/servers.md)",
}
_LABELS: Final = {
    "": "take the version from the engine's own answer, a span for each piece, and never from the request's beginning or end",
    "verl": "keep (start, end, version) of each resumed piece in extra_fields, not min and max of global_steps",
    "TRL": "record the version per turn in _generate_one_turn; one model_version a group is too coarse",
    "AReaL": "output_versions of ModelResponse, per token; check head_version across an HTTP round trip",
    "prime-rl": "orchestrator max_off_policy_steps bounds the lag, but a group's dispatch version labels all its tokens",
    "SkyRL": "global_step_when_scheduled is of the group: record the version of every engine call",
    "slime": "Sample.weight_versions per call; a call that spans an update needs the engine's spans",
    "oldlogits": "engine spans label segments; a run whose labels were edited cannot be trusted",
}
_CACHE: Final = {
    "": "recompute or flush the KV cache, shared prefixes too, after each weight update",
    "verl": "reset_prefix_cache after update_weights; actor_rollout_ref.rollout.free_cache_engine = True",
    "TRL": "vLLM: reset_prefix_cache after the weight transfer",
    "AReaL": "pause with abort, so that interrupted requests prefill anew; flush the server's cache after the update",
    "prime-rl": "let the weight update of the inference server reset its prefix cache",
    "SkyRL": "reset_prefix_cache in the weight sync of the inference engines",
    "slime": "SGLang: flush_cache with the weight update",
    "oldlogits": "engine.kv = recompute, not stale",
}
_SAME_BATCH: Final = {
    "": "look at the queue between rollout and trainer, and at the seed of the data's order",
    "verl": "data.shuffle = True, data.seed",
    "TRL": "shuffle_dataset = True, seed (data_seed is not read)",
    "AReaL": "train_dataset.shuffle, seed",
    "prime-rl": "orchestrator seed",
    "SkyRL": "trainer.seed; the stateful dataloader must be advanced",
    "slime": "--rollout-shuffle, --rollout-seed",
    "oldlogits": "seed",
}
_DENOMINATOR: Final = {
    "": "count the denominator once, over the whole optimizer step, not in each micro-batch or rank",
    "verl": "actor_rollout_ref.actor.loss_agg_mode, with global batch information in each micro-batch",
    "TRL": "loss_type: 'dapo' is over all tokens of the step, 'grpo' over sequences, 'dr_grpo' constant",
    "AReaL": "actor.loss weights by tokens of all micro-batches (loss_weight_fn)",
    "prime-rl": "trainer.loss scale over all loss tokens of the step",
    "SkyRL": "trainer.algorithm.loss_reduction",
    "slime": "--calculate-per-token-loss, or the mean over rollouts",
    "oldlogits": "objective.loss_aggregation",
}
_ADVANTAGES: Final = {
    "": "filter groups with one reward before training, and check that rewards arrive",
    "verl": "algorithm.filter_groups.enable = True",
    "TRL": "scale_rewards; check that reward functions return different values in a group",
    "AReaL": "dynamic_filter_fn / should_accept_fn of the workflow; check rewards",
    "prime-rl": "orchestrator filter_zero_advantages = true",
    "SkyRL": "trainer.algorithm.zero_variance_filter = true",
    "slime": "--dynamic-sampling-filter-path",
    "oldlogits": "rewards must differ within a group (env.target's get_reward)",
}
_NUMERICS: Final = {
    "": "compare engine and trainer on one prompt at one version: the weights themselves, then the precision of the head",
    "verl": "check the weight sync; actor_rollout_ref.rollout.dtype against the trainer's; router replay for MoE",
    "TRL": "check the weight transfer; dtype of vLLM against the trainer's",
    "AReaL": "check weight_update; sglang/vllm dtype against actor.dtype",
    "prime-rl": "check the broadcast; router replay for MoE; fp32 head",
    "SkyRL": "check the weight sync; generator dtype; rollout_expert_indices for MoE",
    "slime": "--use-rollout-routing-replay for MoE; --get-mismatch-metrics; check update_weights",
    "oldlogits": "engine.precision; model.routing for MoE; the probe (docs/exactness.md)",
}

REMEDIES: Final[Mapping[str, Mapping[str, str]]] = MappingProxyType(
    {
        **dict.fromkeys(
            ("ratio-is-one", "old-is-mu", "old-is-theta", "old-of-another-version", "missing-old", "decisions-with-old"),
            _OWN_OLD,
        ),
        **dict.fromkeys(("clip-never-acts", "unbounded-negative"), _CLIP),
        **dict.fromkeys(("zero-logprobs", "missing-logprobs", "shifted-by-one"), _LOGPROBS),
        "impossible-logprobs": _POSSIBLE,
        **dict.fromkeys(("versions-missing", "versions-impossible", "version-per-group", "labels-late"), _LABELS),
        "mean-r-d": _DISTRIBUTION,
        **dict.fromkeys(("stale-cache", "jump-at-borders"), _CACHE),
        **dict.fromkeys(("confident-disagreement", "few-tokens"), _NUMERICS),
        "zero-advantages": _ADVANTAGES,
        "wrong-denominator": _DENOMINATOR,
        **dict.fromkeys(("trained-twice", "same-order"), _SAME_BATCH),
    }
)
"""By check, then by framework; "" for any."""


def remedy(check: str, framework: str) -> str:
    """What to do about a check's finding in a framework."""
    known = REMEDIES[check]
    own = known.get("slime" if framework == "miles" else framework)
    return f"{known['']}. {framework}: {own}" if framework and own else known[""]
