import dataclasses
import inspect
import math
import re
import shutil

import pytest

from oldlogits.config.check import check
from oldlogits.config.check import check as check_function
from oldlogits.config.load import config_from_table, known_keys
from oldlogits.config.model_folder import check_model_folder
from oldlogits.config.programs import rows_in_words
from oldlogits.config.schema import RunConfig
from oldlogits.core.errors import ConfigError, MissingPolicyError, ModelFolderError

from .test_load import default_of

NAN, INF = math.nan, math.inf

REFUSED = {  # key -> values just outside, and beyond
    "band": [1.0, 0.0, -2.0, NAN],
    "seed": [-1, 2**32],
    "num_updates": [0, 10**9],
    "max_staleness": [-1, 10**9],
    "objective.eps_low": [0.0, 1.0, 1.01, NAN],
    "objective.eps_high": [0.0, INF, NAN],
    "objective.dual_clip": [1.0, NAN],
    "objective.is_cap": [1.0, 0.5, NAN],
    "objective.interpolation_mu": [-0.01, 1.01, NAN],
    "correction.weight_low": [-0.01, 1.01, NAN],
    "correction.weight_high": [0.99, NAN],
    "correction.token_low": [-0.01, 1.0, NAN],
    "correction.token_high": [1.0, NAN],
    "correction.reject_low": [-0.01, 1.01, NAN],
    "correction.reject_high": [0.0, NAN],
    "correction.veto_low": [-0.01, 1.0, NAN],
    "correction.veto_high": [1.0, NAN],
    "proximal.beta": [0.8, -0.1, 1.0, NAN],  # but with decay = "fixed"
    "proximal.reset_below": [0.0, 1.01, NAN],
    "proximal.scorer_versions": [0, -1],
    "audit.share": [-0.01, 1.01, NAN],
    "objective.loss_aggregation_tokens": [0.0, INF, NAN],
    "ray.num_workers": [0, -1, 10**6],  # these with runtime.type = "ray" in test_servers.py
    "ray.worker_cpus": [-1.0, INF, NAN],
    "ray.worker_gpus": [-1.0, INF, NAN],
    "ray.trainer_cpus": [-1.0, INF, NAN],
    "ray.trainer_gpus": [-1.0, INF, NAN],
    "ray.start_timeout_s": [0.0, INF, NAN],
    "model.seed": [-1, 2**64],
    "model.warm_start_steps": [-1],
    "model.lora_rank": [-1, 10**9],
    "model.lora_alpha": [0.0, -1.0, INF, NAN],
    "model.lora_targets": [(), ("q_proj", "q_proj")],
    "env.max_turns": [0],
    "env.max_tokens_per_turn": [0],
    "env.max_episode_tokens": [1, 2**31],
    "env.timeout_s": [0.0, NAN],
    "env.program_timeout_s": [0.0, NAN],
    "env.program_memory_bytes": [-1],
    "env.program_processes": [0, 1025],
    "env.latency_s": [-0.1, INF, NAN],
    "sampling.temperature": [0.0, -1.0, 1e-300, 1e300, INF, NAN],
    "sampling.top_p": [0.99, NAN],
    "sampling.top_k": [1, -1],
    "engine.max_num_seqs": [0, 10**9],
    "engine.probe_tolerance": [-1.0, -0.5, NAN],
    "engine.num_servers": [0, 10**6],
    "engine.max_restarts": [-1],
    "engine.recover_s": [0.0, 1e308, INF, NAN],
    "engine.request_timeout_s": [0.0, INF, NAN],
    "engine.control_timeout_s": [0.0, INF, NAN],
    "runtime.heartbeat_timeout_s": [0.0, INF, NAN],
    "engine.start_timeout_s": [0.0, INF, NAN],
    "objective.kl_coefficient": [-0.1, 1e308, INF, NAN],
    "objective.kl_reference_every": [-1, 10**9],
    "objective.entropy_bonus": [-0.1, 1e308, INF, NAN],
    "rollout.group_size": [0, 10**9],
    "rollout.max_failed_share": [0.0, 1.1],
    "rollout.max_filtered_batches": [0],
    "rollout.max_replays": [-1],
    "rollout.min_group_size": [0, 9],
    "rollout.prompts_per_update": [0, 10**9],
    "rollout.max_running_groups": [0, -1],
    "trainer.lr": [0.0, 1e308, 1e-300, INF, NAN],
    "trainer.warmup_steps": [-1],
    "trainer.min_lr_ratio": [-0.1, 1.1, NAN],
    "trainer.weight_decay": [-0.1, 1e308, INF, NAN],
    "trainer.beta1": [-0.1, 1.0, NAN],
    "trainer.beta2": [-0.1, 1.0, NAN],
    "trainer.max_grad_norm": [0.0, NAN],
    "trainer.minibatches_per_update": [0, 17],
    "trainer.num_threads": [0, 10**9],
    "trainer.micro_batch_tokens": [0],
    "trainer.head_chunk_tokens": [0],
    "lockstep.max_lag": [-1, 10**9],
    "lockstep.tokens_per_version": [0],
    "versions.uncompressed": [-1],
    "versions.budget_bytes": [-1, 2**63],
    "eval.num_episodes": [-1, 10**9],
    "eval.every": [-1],
    "eval.num_episodes_during": [-1],
    "eval.num_calibration": [-1],
    "eval.success_at": [math.inf, math.nan, -1e16],
    "eval.max_concurrent": [0],
    "record.tokens_every": [-1],
    "record.transcripts_every": [-1],
    "record.checkpoint_every": [-1],
    "record.keep_checkpoints": [0, -1],
    "record.keep_every": [-1],
}
LOCKSTEP_ONLY = {"lockstep.max_lag": [5]}  # local does not read it

ACCEPTED = {  # the ends of the ranges
    "band": [1.0001, INF],
    "max_staleness": [0],
    "objective.eps_low": [0.001, 0.999],
    "objective.dual_clip": [1.01, INF],
    "objective.is_cap": [1.01, INF],
    "objective.interpolation_mu": [0.0, 1.0],
    "correction.weight_low": [0.0, 1.0],
    "correction.weight_high": [1.0, INF],
    "correction.token_low": [0.0, 0.99],
    "correction.veto_high": [1.01, INF],
    "proximal.reset_below": [0.01, 1.0],
    "proximal.scorer_versions": [1, 100],
    "audit.share": [0.0, 1.0],
    "env.max_episode_tokens": [2],
    "env.timeout_s": [0.001],
    "engine.probe_tolerance": ["auto", 0.0],
    "rollout.group_size": [2],
    "rollout.max_failed_share": [0.01, 1.0],
    "rollout.max_filtered_batches": [1],
    "rollout.max_replays": [0, 9],
    "rollout.min_group_size": [2, 8],
    "trainer.min_lr_ratio": [0.0, 1.0],
    "trainer.weight_decay": [0.0],
    "trainer.beta1": [0.0],
    "trainer.max_grad_norm": [INF],
    "trainer.minibatches_per_update": [1, 16],
    "lockstep.max_lag": [0, 99],  # local does not read it
}


def changed(key, value, base=None):
    base = base or RunConfig()
    first, _, rest = key.partition(".")
    inner = dataclasses.replace(getattr(base, first), **{rest: value}) if rest else value
    return dataclasses.replace(base, **{first: inner})


LOCKSTEP = changed("runtime.type", "lockstep")


ROW_FILES = ("env.train_data", "env.eval_data")


@pytest.mark.slow
@pytest.mark.parametrize("key", ROW_FILES)
@pytest.mark.parametrize("name", ["no_such_file.jsonl", "tests", "x" * 5000, "rows\0.jsonl"])
def test_a_row_file_that_is_not_there_is_said_to_be_missing(key, name):
    with pytest.raises(
        ConfigError, match=f"^{re.escape(key)} names no file; got: .*; allowed: a JSONL file.*fix: correct the path"
    ):
        check(changed(key, name))


@pytest.mark.parametrize("count", [0, 2])
def test_the_remedy_for_too_many_minibatches_is_one_that_helps(count):
    table = {"rollout": {"prompts_per_update": 1}, "trainer": {"minibatches_per_update": count}}
    with pytest.raises(ConfigError, match=r"fix: (set )?trainer\.minibatches_per_update = 1"):
        check(config_from_table(table))


def test_an_update_of_more_episodes_than_a_machine_can_hold_is_refused():
    with pytest.raises(ConfigError, match=r"rollout\.group_size is out of range; .*at most 1,000,000 episodes an update"):
        check(config_from_table({"rollout": {"group_size": 10_000, "prompts_per_update": 1000}}))


def test_the_defaults_pass_in_both_runtimes():
    check(RunConfig())
    check(LOCKSTEP)


@pytest.mark.parametrize("key, value", [(key, value) for key, values in REFUSED.items() for value in values])
def test_a_value_out_of_range_is_refused_by_its_key(key, value):
    with pytest.raises(
        ConfigError, match=f"^{re.escape(key)} is out of range; got: {re.escape(f'{key} = {value}')}; allowed: .*fix"
    ):
        check(changed(key, value))


@pytest.mark.parametrize("key, value", [(key, value) for key, values in LOCKSTEP_ONLY.items() for value in values])
def test_a_lag_out_of_range_is_refused_in_lockstep(key, value):
    with pytest.raises(ConfigError, match=f"^{re.escape(key)} is out of range"):
        check(changed(key, value, LOCKSTEP))


@pytest.mark.parametrize("key, value", [(key, value) for key, values in ACCEPTED.items() for value in values])
def test_the_ends_of_a_range_are_accepted(key, value):
    check(changed(key, value))


def test_every_number_of_the_recipe_has_a_range_that_is_tested():
    numbers = {key for key in known_keys() if type(default_of(key)) in (int, float)}
    assert numbers <= set(REFUSED) | set(LOCKSTEP_ONLY)


def test_every_key_whose_range_depends_on_another_key_is_tested():
    source = inspect.getsource(inspect.getmodule(check_function)._check_against_each_other)
    named = {key for key in known_keys() if f'"{key}"' in source}
    assert named <= {*REFUSED, *LOCKSTEP_ONLY, *ROW_FILES}


@pytest.mark.parametrize(
    "variant, source", [("decoupled_exact", "arrival"), ("decoupled_async", "snapshot"), ("ppo_clip", "none")]
)
def test_a_variant_that_its_source_cannot_feed_is_refused_when_the_recipe_is_read(variant, source):
    with pytest.raises(MissingPolicyError):
        check(changed("variant", variant, changed("proximal.source", source)))


NAMES = [
    ("variant", "ppo"),
    ("proximal.source", "disk"),
    ("env.parser", "xml"),
    ("engine.type", "sglang"),
    ("runtime.type", "slurm"),
]


@pytest.mark.parametrize("key, value", NAMES)
def test_unknown_names_are_refused(key, value):
    with pytest.raises(ConfigError, match="unknown"):
        check(changed(key, value))


def test_stale_keys_and_values_are_refused_where_old_is_needed_unless_mixed_is_accepted():
    stale = changed("engine.kv", "stale")
    with pytest.raises(ConfigError, match="stale keys and values belong to no version"):
        check(stale)
    check(changed("proximal.accept_mixed_kv", True, stale))
    check(changed("variant", "decoupled_async", changed("proximal.source", "arrival", stale)))


@pytest.mark.parametrize("source", ["dedicated", "interruption", "eager"])
def test_a_route_that_scores_version_by_version_is_refused_over_stale_keys_and_values(source):
    routed = changed("proximal.accept_mixed_kv", True, changed("proximal.source", source))
    check(routed)
    with pytest.raises(ConfigError, match=f"source '{source}' scores each version by itself.*fix: use source 'snapshot'"):
        check(changed("engine.kv", "stale", routed))


def test_a_folder_that_is_not_there_is_refused_unless_it_is_not_needed():
    config = changed("model.path", "nowhere")
    check_function(config, needs_model=False)
    with pytest.raises(ModelFolderError, match=r"model\.path is no folder"):
        check(config)


def test_a_fixed_decay_needs_its_beta_and_no_other_decay_takes_one():
    fixed = changed("proximal.decay", "fixed")
    check(changed("proximal.beta", 0.8, fixed))
    for beta in (0.0, 1.0, -0.5, NAN):
        with pytest.raises(ConfigError, match=r"^proximal\.beta is out of range"):
            check(changed("proximal.beta", beta, fixed))


AVERAGED = [("ppo_ewma", "ewma"), ("ppo_ewma_train_infer", "ewma"), ("aged_train_infer", "aged")]


@pytest.mark.parametrize("rule", ["paper", "guarded", "audited"])
def test_a_reset_is_refused_where_the_variant_reads_no_average(rule):
    audited = changed("audit.share", 1.0)
    for variant, source in AVERAGED:
        check(changed("proximal.reset", rule, changed("variant", variant, changed("proximal.source", source, audited))))
    unread = [("ppo_clip_train_infer", "ewma"), ("linear_prox", "aged"), ("loglinear_train_infer", "ewma")]
    for variant, source in [("decoupled_exact", "snapshot"), *unread]:
        fed = changed("variant", variant, changed("proximal.source", source, audited))
        check(fed)
        with pytest.raises(ConfigError, match=f"variant '{variant}' over source '{source}' has no average to reset"):
            check(changed("proximal.reset", rule, fed))


@pytest.mark.parametrize("variant, source, band, lowered", [
    ("ppo_ewma", "ewma", 1.5, False),
    ("ppo_ewma_train_infer", "ewma", INF, False),
    ("aged_train_infer", "aged", INF, False),
    ("ppo_ewma_train_infer", "ewma", 1.5, True),
    ("aged_train_infer", "aged", 1.5, True),
])  # fmt: skip
def test_a_reset_is_refused_where_nothing_lowers_rho(variant, source, band, lowered):
    clipped = changed("variant", variant, changed("proximal.source", source, changed("band", band)))
    check(changed("proximal.reset", "paper", clipped))
    truncated = changed("objective.clip", "truncated", clipped)
    check(truncated)
    if lowered:
        check(changed("proximal.reset", "paper", truncated))
    else:
        with pytest.raises(ConfigError, match="a reset comes when rho falls, and nothing lowers it"):
            check(changed("proximal.reset", "paper", truncated))


def test_a_guarded_reset_that_could_never_act_is_refused():
    ewma = changed("variant", "ppo_ewma", changed("proximal.source", "ewma", changed("band", INF)))
    check(changed("proximal.reset", "paper", ewma))
    with pytest.raises(ConfigError, match="there is no band: it would never act"):
        check(changed("proximal.reset", "guarded", ewma))


@pytest.mark.parametrize("key", ["proximal.decay", "proximal.reset"])
def test_an_average_that_is_to_follow_audits_is_refused_where_no_batch_is_audited(key):
    ewma = changed("variant", "ppo_ewma_train_infer", changed("proximal.source", "ewma"))
    check(changed(key, "audited", changed("audit.share", 0.01, ewma)))
    with pytest.raises(ConfigError, match="no batch is audited") as refused:
        check(changed(key, "audited", ewma))
    assert refused.value.fix == "set audit.share = 0.25"


@pytest.mark.parametrize(("variant", "source"), [("aged_train_infer", "aged"), ("decoupled_exact", "snapshot")])
def test_an_audited_decay_is_refused_where_the_variant_does_not_use_the_average_itself(variant, source):
    audited = changed("audit.share", 1.0, changed("variant", variant, changed("proximal.source", source)))
    check(audited)
    with pytest.raises(ConfigError, match=f"and variant '{variant}' does not use it"):
        check(changed("proximal.decay", "audited", audited))


def test_a_schedule_of_weight_mu_is_refused_where_nothing_is_interpolated():
    scheduled = changed("objective.interpolation_schedule", "a3po")
    for variant in ("linear_prox", "loglinear_prox", "linear_train_infer", "loglinear_train_infer"):
        check(changed("variant", variant, changed("proximal.source", "none", scheduled)))
    for variant, source in (("decoupled_exact", "snapshot"), ("ppo_clip_train_infer", "none")):
        with pytest.raises(ConfigError, match="interpolates nothing"):
            check(changed("variant", variant, changed("proximal.source", source, scheduled)))


def test_a_referee_is_refused_where_a_truncation_acts_beside_the_active_set():
    truncated = changed("objective.clip", "truncated")
    check(truncated)
    check(changed("audit.share", 0.25))
    with pytest.raises(ConfigError, match=r"compares active sets.*fix: set audit\.share = 0"):
        check(changed("audit.share", 0.25, truncated))


def test_an_evaluation_overlaps_training_only_where_time_is_real_and_no_checkpoint_is_chosen_by_it():
    overlapping = changed("eval.overlap", True, changed("runtime.type", "local"))
    refusal = r"ends after the checkpoint .*got: eval\.overlap = true, .*fix: set record\.keep_best = false"
    with pytest.raises(ConfigError, match=refusal):
        check(overlapping)
    check(changed("record.keep_best", False, overlapping))
    with pytest.raises(ConfigError, match=r"needs real time.*fix: set eval\.overlap = false"):
        check(changed("runtime.type", "lockstep", changed("record.keep_best", False, overlapping)))


@pytest.mark.parametrize("key, value", [("trainer.offload_optimizer", True), ("trainer.head_kernel", "liger")])
def test_what_is_for_gpus_is_refused_for_a_trainer_on_the_cpu(key, value):
    check(changed(key, value))
    with pytest.raises(ConfigError, match=f"for GPUs.*{key}"):
        check(changed(key, value, changed("trainer.device", "cpu")))


def test_kernels_that_round_logits_are_refused_where_the_recipe_does_not():
    bf16 = changed("model.forward_dtype", "bf16", changed("trainer.compute", "bf16", changed("trainer.head_kernel", "liger")))
    with pytest.raises(ConfigError, match=r"round the logits.*fix: set trainer\.head_compute = 'bf16'"):
        check(bf16)
    check(changed("trainer.head_compute", "bf16", bf16))


def test_rows_that_exist_are_accepted(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n")
    check(changed("env.train_data", str(rows), changed("env.eval_data", str(rows))))


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_model_folder_that_lacks_a_part_is_refused_by_the_part(missing, tiny_folder, tmp_path):
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        shutil.copy(tiny_folder / name, tmp_path)
    (tmp_path / missing).unlink()
    part = "weights" if missing.startswith("model") else missing
    with pytest.raises(ModelFolderError, match=f"the model folder lacks {re.escape(part)}"):
        check(changed("model.path", str(tmp_path)))
    shutil.copy(tiny_folder / missing, tmp_path)
    check(changed("model.path", str(tmp_path), changed("env.target", "my.package:Shop")))


def test_a_model_folder_that_is_none_is_refused(tmp_path):
    with pytest.raises(ModelFolderError, match=r"model\.path is no folder; got: .*gone"):
        check_model_folder(tmp_path / "gone")


@pytest.mark.parametrize(
    "sections, device",
    [
        ({}, "auto"),
        ({"trainer": {"device": "cuda"}}, "cuda"),
        ({"runtime": {"type": "lockstep"}}, "cpu"),
        ({"runtime": {"type": "ray"}}, "cpu"),
        ({"runtime": {"type": "ray"}, "ray": {"trainer_gpus": 1.0}}, "auto"),
        ({"engine": {"type": "vllm"}}, "cpu"),
        ({"engine": {"type": "vllm", "urls": ["http://127.0.0.1:8000"]}}, "auto"),
    ],
)
def test_auto_leaves_gpus_to_those_that_have_them(sections, device):
    assert config_from_table(sections).trainer_device == device


@pytest.mark.parametrize("key", ["reward", "group_reward"])
def test_a_reward_function_that_an_agent_program_would_never_reach_is_refused(key):
    env = {"program": "tests.envs.test_base:program", key: "tests.envs.test_base:reward"}
    with pytest.raises(ConfigError, match=rf"an agent program gives its reward itself.*env\.{key}"):
        check(config_from_table({"env": env, "runtime": {"type": "local"}}))


PROGRAM = {"program": "tests.rollout.agent_programs:plays"}


@pytest.mark.parametrize(
    ("env", "key", "value", "why"),
    [
        (PROGRAM, "tool_errors", "answer", "calls its own tools"),
        (PROGRAM, "latency_s", 0.5, "calls its own tools"),
        (PROGRAM, "mcp", [{"url": "http://127.0.0.1:1/mcp"}], "calls its own tools"),
        (PROGRAM, "program_memory_bytes", 2**30, "no command plays the episodes"),
        ({"command": ["python", "-c", "pass"]}, "tool_errors", "fail", "calls its own tools"),
        ({"command": ["python", "-c", "pass"]}, "verifiers_args", "{}", "arguments of no environment"),
        ({}, "program_timeout_s", 5.0, "no agent program plays the episodes"),
        ({}, "program_memory_bytes", 2**30, "no agent program plays the episodes"),
        ({}, "unmet_wishes", "refuse", "no agent program plays the episodes"),
        ({"verifiers": "x"}, "target", "desk_long", "verifiers takes its place"),
        ({"verifiers": "x"}, "adapter", "trl", "verifiers takes its place"),
        ({"verifiers": "x"}, "latency_s", 0.5, "calls its own tools"),
        ({"mcp": [{"url": "http://127.0.0.1:1/mcp"}]}, "target", "desk_long", "mcp takes its place"),
        ({"mcp": [{"url": "http://127.0.0.1:1/mcp"}]}, "mixture", [{"target": "desk"}], "mcp takes its place"),
    ],
)
def test_a_key_that_what_plays_takes_no_notice_of_is_refused(env, key, value, why):
    table = {"env": {**env, key: value}, "runtime": {"type": "local"}}
    with pytest.raises(ConfigError, match=rf"{why}: env\.{key} has no effect"):
        check(config_from_table(table))


def test_an_agent_program_is_checked_with_the_keys_that_it_does_read():
    env = {**PROGRAM, "program_timeout_s": 5.0, "unmet_wishes": "refuse", "timeout_s": 3.0, "target": "desk_long"}
    check(config_from_table({"env": env, "runtime": {"type": "local"}}))


def test_it_is_told_where_rows_come_from():
    env = config_from_table({"env": {**PROGRAM, "train_data": "a.jsonl"}}).env
    assert rows_in_words(env) == "training: a.jsonl, held-out: made by env.target = 'desk'"
    mixed = config_from_table({"env": {"mixture": [{"target": "desk", "eval_data": "b.jsonl"}, {"target": "desk_long"}]}}).env
    assert rows_in_words(mixed, only_heldout=True) == "held-out: b.jsonl; held-out: made by env.target = 'desk_long'"
    assert "made by env.verifiers = 'x'" in rows_in_words(config_from_table({"env": {"verifiers": "x"}}).env)
