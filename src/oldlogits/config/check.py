"""The rules a recipe must keep, beyond the types of its keys. Imports no torch."""

from __future__ import annotations

import math
from pathlib import Path

from oldlogits.config.guard import refuse_idle
from oldlogits.config.schema import RunConfig
from oldlogits.config.servers import check_servers
from oldlogits.core.errors import ConfigError, ModelFolderError
from oldlogits.core.policies import AGED, EWMA, LINEAR, LOGLINEAR, OLD, SOURCES, check_source, find_variant


def check(config: RunConfig, *, needs_model: bool = True) -> None:
    """Refuse a recipe that cannot be run as written.

    Args:
        config: The recipe.
        needs_model: Whether the model folder must be there.

    Raises:
        ConfigError: What is wrong, what was found, what is allowed, and how to fix it.
        ModelFolderError: The model folder does not exist or lacks its config.
    """
    find_variant(config.variant)
    check_source(config.variant, config.proximal.source)
    _check_ranges(config)
    _check_one_distribution(config)
    check_servers(config)
    _check_kv(config)
    _check_average(config)
    _check_schedule(config)
    _check_referee(config)
    refuse_idle(config)
    _check_rows(config)
    if needs_model and not config.model.is_tiny:
        check_model_folder(Path(config.model.path))
    if config.env.target not in ("desk", "desk_long", "desk_slow"):
        _check_other_environment(config)


def _check_other_environment(config: RunConfig) -> None:
    """Embedded models and warm starts know the order desk only."""
    m, env = config.model, f"env.target = '{config.env.target}'"
    if m.is_tiny:
        raise ConfigError(
            "the tiny model knows only the words of the order desk",
            got=f"model.path = '{m.path}', {env}",
            allowed="model.path = FOLDER with this environment",
            fix="set model.path to a Hugging Face folder whose tokenizer has a chat template",
        )
    if m.warm_start_steps > 0:
        raise ConfigError(
            "only the order desk has demonstrations",
            got=f"model.warm_start_steps = {m.warm_start_steps}, {env}",
            allowed="0 with this environment, or a desk",
            fix="remove model.warm_start_steps, and begin with a model that was trained on such demonstrations",
        )


MODEL_FIX = "pass --model.path FOLDER, or --model.path tiny (or tiny-moe) for an embedded model"


def check_model_folder(folder: Path, fix: str = MODEL_FIX) -> None:
    """Refuse a model folder without `config.json` or weights.

    Args:
        folder: The folder.
        fix: What to do if it is none.

    Raises:
        ModelFolderError: The folder or a part of it is missing.
    """
    allowed = "a folder with config.json, *.safetensors and a tokenizer with a chat template"
    if not folder.is_dir():
        raise ModelFolderError("model.path is no folder", got=str(folder), allowed=allowed, fix=fix)
    for what, found in {
        "config.json": (folder / "config.json").is_file(),
        "weights (*.safetensors)": any(folder.glob("*.safetensors")),
        "tokenizer.json": (folder / "tokenizer.json").is_file() or (folder / "tokenizer_config.json").is_file(),
    }.items():
        if not found:
            raise ModelFolderError(f"the model folder lacks {what}", got=str(folder), allowed=allowed, fix=fix)


def _check_ranges(config: RunConfig) -> None:
    o, e, r, m = config.objective, config.env, config.rollout, config.model
    _require(config.band > 1, "band", config.band, "a number > 1 (inf: no band)", "band = 1.5")
    _require(config.seed >= 0, "seed", config.seed, ">= 0", "seed = 0")
    _require(config.num_updates >= 1, "num_updates", config.num_updates, ">= 1", "num_updates = 60")
    _require(config.max_staleness >= 0, "max_staleness", config.max_staleness, ">= 0", "max_staleness = 4")
    _require(0 < o.eps_low < 1, "objective.eps_low", o.eps_low, "in (0, 1): at 1 nothing is below 1 - eps_low", "eps_low = 0.2")
    _require(0 < o.eps_high < math.inf, "objective.eps_high", o.eps_high, "> 0", "eps_high = 0.28")
    _require(o.dual_clip > 1, "objective.dual_clip", o.dual_clip, "> 1 (inf: off)", "dual_clip = 3.0")
    _require(o.is_cap > 1, "objective.is_cap", o.is_cap, "> 1 (inf: no bound)", "truncation = 2.0")
    _require(config.proximal.scorer_versions >= 1, "proximal.scorer_versions", config.proximal.scorer_versions, ">= 1", "2")
    _require(0 <= o.interpolation_mu <= 1, "objective.interpolation_mu", o.interpolation_mu, "in [0, 1]", "weight_mu = 0.5")
    share = config.audit.share
    _require(0 <= share <= 1, "audit.share", share, "in [0, 1] (0: no referee)", "0.25")
    n = o.loss_aggregation_tokens
    _require(0 < n < math.inf, "objective.loss_aggregation_tokens", n, "> 0", "a number of tokens")
    _require(m.lora_rank >= 0, "model.lora_rank", m.lora_rank, ">= 0 (0: no adapters)", "16")
    _require(0 < m.lora_alpha < math.inf, "model.lora_alpha", m.lora_alpha, "> 0", "32")
    targets = m.lora_targets
    allowed = "layers by the last part of their name, each once"
    _require(0 < len(set(targets)) == len(targets), "model.lora_targets", str(targets), allowed, "['q_proj', 'v_proj']")
    _require(m.seed >= -1, "model.seed", m.seed, ">= 0, or -1: the run's seed", "-1")
    _require(m.warm_start_steps >= -1, "model.warm_start_steps", m.warm_start_steps, ">= 0, or -1: the built-in number", "-1")
    _require(e.max_turns >= 1, "env.max_turns", e.max_turns, ">= 1", "max_turns = 16")
    _require(e.max_tokens_per_turn >= 1, "env.max_tokens_per_turn", e.max_tokens_per_turn, ">= 1", "32")
    _require(e.max_episode_tokens >= 2, "env.max_episode_tokens", e.max_episode_tokens, ">= 2", "256")
    _require(e.timeout_s > 0, "env.timeout_s", e.timeout_s, "> 0 seconds", "20")
    _require(0 <= e.latency_s < math.inf, "env.latency_s", e.latency_s, ">= 0 seconds", "0")
    _require(e.parser in ("plain", "hermes"), "env.parser", e.parser, "plain, hermes", "choose one of these")
    _require(config.engine.max_num_seqs >= 1, "engine.max_num_seqs", config.engine.max_num_seqs, ">= 1", "128")
    tolerance = config.engine.probe_tolerance
    _require(tolerance == -1 or tolerance >= 0, "engine.probe_tolerance", tolerance, ">= 0 nats, or -1: as known", "-1")
    _require(r.group_size >= 2, "rollout.group_size", r.group_size, ">= 2: rewards of a group are compared", "8")
    _require(r.prompts_per_update >= 1, "rollout.prompts_per_update", r.prompts_per_update, ">= 1", "16")
    _require(r.max_running_groups >= 0, "rollout.max_running_groups", r.max_running_groups, ">= 0", "0")
    _check_trainer(config)
    _check_runtime(config)
    _check_counts(config)
    _check_versions(config)


def _check_trainer(config: RunConfig) -> None:
    t, num_groups = config.trainer, config.rollout.prompts_per_update
    _require(0 < t.lr < math.inf, "trainer.lr", t.lr, "> 0", "5e-4")
    _require(0 <= t.weight_decay < math.inf, "trainer.weight_decay", t.weight_decay, ">= 0", "0")
    _require(0 <= t.beta1 < 1, "trainer.beta1", t.beta1, "in [0, 1)", "0.9")
    _require(0 <= t.beta2 < 1, "trainer.beta2", t.beta2, "in [0, 1)", "0.99")
    _require(t.warmup_steps >= 0, "trainer.warmup_steps", t.warmup_steps, ">= 0", "4")
    _require(0 <= t.min_lr_ratio <= 1, "trainer.min_lr_ratio", t.min_lr_ratio, "in [0, 1]", "1.0: constant")
    _require(t.max_grad_norm > 0, "trainer.max_grad_norm", t.max_grad_norm, "> 0", "1.0")
    _require(t.num_threads >= 1, "trainer.num_threads", t.num_threads, ">= 1", "1")
    _require(t.micro_batch_tokens >= 1, "trainer.micro_batch_tokens", t.micro_batch_tokens, ">= 1", "8192")
    _require(t.head_chunk_tokens >= 1, "trainer.head_chunk_tokens", t.head_chunk_tokens, ">= 1", "2048")
    _require(
        1 <= t.minibatches_per_update <= num_groups,
        "trainer.minibatches_per_update",
        t.minibatches_per_update,
        f"1 .. rollout.prompts_per_update ({num_groups}): each step needs a group",
        "2",
    )


def _check_runtime(config: RunConfig) -> None:
    longest = config.max_staleness
    if config.runtime.type == "lockstep":
        r = config.lockstep
        _require(0 <= r.max_lag <= longest, "lockstep.max_lag", r.max_lag, f"0 .. max_staleness ({longest})", "smaller")
        _require(r.tokens_per_version >= 1, "lockstep.tokens_per_version", r.tokens_per_version, ">= 1", "12")


def _check_versions(config: RunConfig) -> None:
    v = config.versions
    _require(v.uncompressed >= 0, "versions.uncompressed", v.uncompressed, ">= 0", "0 compresses every patch")
    _require(v.budget_bytes >= 0, "versions.budget_bytes", v.budget_bytes, ">= 0", "0 sets no bound")


def _check_counts(config: RunConfig) -> None:
    e, r = config.eval, config.record
    counts = {
        "eval.num_episodes": e.num_episodes,
        "eval.every": e.every,
        "eval.num_episodes_during": e.num_episodes_during,
        "eval.num_calibration": e.num_calibration,
        "record.tokens_every": r.tokens_every,
        "record.transcripts_every": r.transcripts_every,
        "record.checkpoint_every": r.checkpoint_every,
    }
    for name, value in counts.items():
        _require(value >= 0, name, value, ">= 0", "0 switches it off")
    _require(e.max_concurrent >= 1, "eval.max_concurrent", e.max_concurrent, ">= 1", "256")


def _check_one_distribution(config: RunConfig) -> None:
    s = config.sampling
    allowed = "> 0: greedy rollouts have no log-prob to train on"
    _require(0 < s.temperature < math.inf, "sampling.temperature", s.temperature, allowed, "1.0")
    fix = "remove it: training samples from the full support; reshape only in evaluation"
    why = ", since mu would have another support than the trained policy"
    _require(s.top_p == 1, "sampling.top_p", s.top_p, "1.0 in training" + why, fix)
    _require(s.top_k == 0, "sampling.top_k", s.top_k, "0 in training" + why, fix)


def _check_kv(config: RunConfig) -> None:
    if config.engine.kv == "recompute" or OLD not in find_variant(config.variant).needs:
        return
    if not config.proximal.accept_mixed_kv:
        raise ConfigError(
            f"variant '{config.variant}' needs exact log-probs of OLD, but stale keys and values belong to no version",
            got="engine.kv = 'stale'",
            allowed="engine.kv = 'recompute', or proximal.accept_mixed_kv = true (tokens are labelled mixed_kv)",
            fix="remove engine.kv = 'stale'",
        )
    mixing = [name for name, route in SOURCES.items() if route.mixes_versions]
    if config.proximal.source not in mixing:
        raise ConfigError(
            f"source '{config.proximal.source}' scores each version by itself, but stale keys and values are of several",
            got=f"engine.kv = 'stale', proximal.source = '{config.proximal.source}'",
            allowed=f"engine.kv = 'recompute', or one of the sources {', '.join(mixing)}",
            fix=f"use source '{mixing[0]}', or remove engine.kv = 'stale'",
        )


def _check_average(config: RunConfig) -> None:
    s = config.proximal
    fixed = s.decay == "fixed"
    allowed = "in (0, 1) with proximal.decay = 'fixed', 0 otherwise"
    _require(0 < s.beta < 1 if fixed else s.beta == 0, "proximal.beta", s.beta, allowed, "proximal.decay = 'fixed', beta = 0.8")
    _require(0 < s.reset_below <= 1, "proximal.reset_below", s.reset_below, "in (0, 1]", "0.9")
    if s.reset == "none":
        return
    variant = find_variant(config.variant)
    if not variant.needs & {EWMA, AGED}:
        raise ConfigError(
            f"variant '{config.variant}' over source '{s.source}' has no average to reset: its rho is that of another policy",
            got=f"proximal.reset = '{s.reset}'",
            allowed="'none', or a variant whose stand-in is EWMA or AGED",
            fix="remove proximal.reset, or use source 'ewma' and variant 'ppo_ewma_train_infer'",
        )
    if config.objective.clip == "truncated" and (variant.r_d.is_one or config.band == math.inf):
        raise ConfigError(
            "a reset comes when rho falls, and nothing lowers it: a truncation masks no token, and there is no band on r_d",
            got=f"proximal.reset = '{s.reset}', objective.clip = 'truncated', r_d = {variant.r_d}, band = {config.band:g}",
            allowed="objective.clip = 'ppo', or a finite band with r_d a ratio, or proximal.reset = 'none'",
            fix="remove proximal.reset, or use variant 'ppo_ewma_train_infer' with band = 1.5",
        )
    if s.reset == "guarded" and config.band == math.inf:
        raise ConfigError(
            "the guarded reset compares what the band keeps, and there is no band: it would never act",
            got="proximal.reset = 'guarded', band = inf",
            allowed="a finite band, or proximal.reset = 'none' or 'paper'",
            fix="set band = 1.5, or remove proximal.reset",
        )


def _check_schedule(config: RunConfig) -> None:
    schedule = config.objective.interpolation_schedule
    if schedule != "fixed" and find_variant(config.variant).stand_in not in (LINEAR, LOGLINEAR):
        raise ConfigError(
            f"variant '{config.variant}' interpolates nothing: weight_mu has no effect",
            got=f"objective.interpolation_schedule = '{schedule}'",
            allowed="'fixed', or a variant whose stand-in is LINEAR or LOGLINEAR",
            fix="remove objective.interpolation_schedule, or use variant 'loglinear_prox'",
        )


def _check_referee(config: RunConfig) -> None:
    share = config.audit.share
    if share > 0 and config.objective.clip == "truncated":
        raise ConfigError(
            "the referee compares active sets, and a truncation acts on tokens that stay active: it would not see that",
            got=f"audit.share = {share:g}, objective.clip = 'truncated'",
            allowed="audit.share = 0, or objective.clip = 'ppo'",
            fix="set audit.share = 0",
        )


def _check_rows(config: RunConfig) -> None:
    for name, value in {"env.train_data": config.env.train_data, "env.eval_data": config.env.eval_data}.items():
        _require(not value or Path(value).is_file(), name, value, "a JSONL file, or empty", "check the path")


def _require(holds: bool, key: str, got: object, allowed: str, fix: str) -> None:
    if not holds:
        raise ConfigError(f"{key} is out of range", got=f"{key} = {got}", allowed=allowed, fix=fix)
