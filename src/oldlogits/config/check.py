"""The rules between the keys of a recipe; the range of each stands beside its field. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from operator import attrgetter
from pathlib import Path

from pydantic import JsonValue, TypeAdapter, ValidationError

from oldlogits.config.episodes import EnvConfig
from oldlogits.config.guard import refuse_idle
from oldlogits.config.mixture import check_mixture, mixture_files
from oldlogits.config.model_folder import check_model_folder
from oldlogits.config.objective.losses import check_loss
from oldlogits.config.objective.terms import check_terms
from oldlogits.config.programs import check_program
from oldlogits.config.reader import as_written, build, fields_by_key, registry_of
from oldlogits.config.schema import RunConfig
from oldlogits.config.servers import check_servers
from oldlogits.core.backend import BACKENDS
from oldlogits.core.environment import is_model_folder
from oldlogits.core.errors import ConfigError, reading
from oldlogits.core.policies import AGED, EWMA, LINEAR, LOGLINEAR, MU, OLD, find_variant
from oldlogits.core.source import SOURCES, check_source, sources_for


def resolve(config: RunConfig) -> RunConfig:
    """Replace "auto" where the recipe decides it.

    The source becomes the first one that provides what the variant needs, and nothing else; forward weights get the type that
    is computed in.

    Raises:
        ConfigError: The variant does not exist, or no built-in source provides what it needs.
    """
    if config.model.forward_dtype == "auto":
        config = replace(config, model=replace(config.model, forward_dtype=config.trainer.compute))
    if config.proximal.source != "auto":
        return config
    fitting = sources_for(config.variant)
    if not fitting:
        raise ConfigError(
            f"no built-in source provides what variant '{config.variant}' needs",
            got="proximal.source = 'auto'",
            allowed='proximal.source = "package.module:Name"',
            fix="name the source",
        )
    return replace(config, proximal=replace(config.proximal, source=fitting[0]))


def check(config: RunConfig, *, needs_model: bool = True) -> None:
    """Refuse a recipe that cannot be run as written.

    Raises:
        ConfigError: What is wrong, what was found, what is allowed, and how to fix it.
        ModelFolderError: The model folder does not exist or lacks its config.
    """
    build(RunConfig, asdict(config))  # the range of every key, overrides included
    config = resolve(config)
    find_variant(config.variant)
    _check_names(config)
    check_loss(config)
    check_source(config.variant, config.proximal.source)
    _check_against_each_other(config)
    check_mixture(config.env.mixture, config.env, EnvConfig())
    check_servers(config)
    template_kwargs(config)
    check_program(config.env, in_real_time=not BACKENDS.find(config.runtime.type).steps_engine)
    _check_kv(config)
    _check_average(config)
    _check_scoring(config)
    _check_device(config)
    _check_effects(config)
    check_terms(config)
    refuse_idle(config)
    if is_model_folder(config.model.path):
        check_model_folder(Path(config.model.path), needs_weights=needs_model)


def said(config: RunConfig, *keys: str) -> str:
    """The keys as the recipe has them, for an error."""
    return ", ".join(f"{key} = {as_written(attrgetter(key)(config))}" for key in keys)


def template_kwargs(config: RunConfig) -> Mapping[str, JsonValue]:
    """Read the variables that a recipe gives to the chat template.

    Raises:
        ConfigError: They are no JSON object.
    """
    try:
        return TypeAdapter(dict[str, JsonValue]).validate_json(config.model.chat_template_kwargs or "{}")
    except ValidationError as error:
        raise ConfigError(
            "the variables of the chat template cannot be read",
            got=f"{said(config, 'model.chat_template_kwargs')}: {error.errors()[0]['msg']}",
            allowed="a JSON object",
            fix="""model.chat_template_kwargs = '{"enable_thinking": false}'""",
        ) from error


def _check_names(config: RunConfig) -> None:
    """Refuse names that their registry neither has built in nor can import."""
    for key, hint in fields_by_key(RunConfig).items():
        registry, value = registry_of(hint), attrgetter(key)(config)
        for name in value if isinstance(value, tuple) else (value,):
            if registry is not None and name not in registry.names:
                registry.find(name)


def _check_against_each_other(config: RunConfig) -> None:
    """Refuse values whose range depends on another key, and files that are not there."""
    t, p, env, targets = config.trainer, config.proximal, config.env, config.model.lora_targets
    group, num, longest = config.rollout, config.rollout.prompts_per_update, config.max_staleness
    in_prompts = f"1 .. rollout.prompts_per_update ({num}): each step needs a group"
    has_beta = p.beta > 0 if p.decay == "fixed" else p.beta == 0
    whole = "in training, where mu has the full support of the trained policy; reshape only in evaluation"
    episodes, most = num * config.rollout.group_size, 1_000_000
    rules: tuple[tuple[str, bool, str, str], ...] = (
        ("sampling.top_p", config.sampling.top_p == 1.0, f"1.0 {whole}", "remove it"),
        ("sampling.top_k", config.sampling.top_k == 0, f"0 {whole}", "remove it"),
        (
            "rollout.min_group_size",
            group.min_group_size <= group.group_size,
            f"1 .. rollout.group_size ({group.group_size})",
            f"set rollout.min_group_size = {group.group_size}, or raise rollout.group_size",
        ),
        (
            "trainer.minibatches_per_update",
            t.minibatches_per_update <= num,
            in_prompts,
            f"set trainer.minibatches_per_update = {num}, or raise rollout.prompts_per_update",
        ),
        (
            "rollout.group_size",
            episodes <= most,
            f"at most {most:,} episodes an update: group_size times prompts_per_update ({num})",
            "lower one of them",
        ),
        (
            "lockstep.max_lag",
            config.window <= longest,
            f"0 .. max_staleness ({longest})",
            f"set lockstep.max_lag = {longest}, or raise max_staleness",
        ),
        (
            "model.lora_targets",
            0 < len(set(targets)) == len(targets),
            "layers by the last part of their name, each once",
            "correct the list",
        ),
        (
            "proximal.beta",
            has_beta,
            "in (0, 1) with proximal.decay = 'fixed', 0 otherwise",
            "set proximal.beta = 0.9" if p.decay == "fixed" else "remove it",
        ),
    )
    for key, holds, allowed, fix in rules:
        if not holds:
            got = f"{key} = {attrgetter(key)(config)}"
            raise ConfigError(f"{key} is out of range", got=got, allowed=allowed, fix=fix)
    files = [("env.train_data", env.train_data), ("env.eval_data", env.eval_data), *mixture_files(env.mixture)]
    for key, name in files:
        allowed, fix = "a JSONL file, or empty", f"correct the path, which begins at {Path.cwd()}, or write the file"
        with reading(ConfigError, f"{key} names no file", got=f"{name!r}", allowed=allowed, fix=fix):
            if name and not Path(name).is_file():
                raise FileNotFoundError("there is no such file")


def _check_kv(config: RunConfig) -> None:
    """Refuse stale keys and values where exact log-probs of OLD are needed, unless the recipe accepts what they are."""
    if config.engine.kv == "recompute" or OLD not in find_variant(config.variant).needs:
        return
    if not config.proximal.accept_mixed_kv:
        raise ConfigError(
            f"variant '{config.variant}' needs exact log-probs of OLD, but stale keys and values belong to no version",
            got=said(config, "engine.kv"),
            allowed="engine.kv = 'recompute', or proximal.accept_mixed_kv = true (tokens are labelled mixed_kv)",
            fix="remove engine.kv = 'stale'",
        )
    if not SOURCES.find(config.proximal.source).mixes_versions:
        mixing = [name for name in SOURCES.names if SOURCES.find(name).mixes_versions]
        raise ConfigError(
            f"source '{config.proximal.source}' scores each version by itself, but stale keys and values are of several",
            got=said(config, "engine.kv", "proximal.source"),
            allowed=f"engine.kv = 'recompute', or one of the sources {', '.join(mixing)}",
            fix=f"use source '{mixing[0]}', or remove engine.kv = 'stale'",
        )


def _check_average(config: RunConfig) -> None:
    """Refuse resets of an average that nothing reads, or that nothing would ever ask for, and to follow audits without any."""
    p, variant = config.proximal, find_variant(config.variant)
    if p.decay == "audited" and EWMA not in variant.needs:
        raise ConfigError(
            f"an audited decay makes the error of EWMA small, and variant '{config.variant}' does not use it",
            got=said(config, "proximal.decay", "variant"),
            allowed="another proximal.decay, or a variant whose proximal policy is EWMA",
            fix="remove proximal.decay, or use variant 'ppo_ewma_train_infer'",
        )
    if p.follows_audit and config.audit.share == 0:
        raise ConfigError(
            "the average is to follow the exact audit, and no batch is audited",
            got=said(config, "proximal.decay", "proximal.reset", "audit.share"),
            allowed="audit.share above 0, or another rule than 'audited'",
            fix="set audit.share = 0.25",
        )
    if p.reset == "none":
        return
    if not variant.needs & {EWMA, AGED}:
        raise ConfigError(
            f"variant '{config.variant}' over source '{p.source}' has no average to reset: its rho is that of another policy",
            got=said(config, "proximal.reset"),
            allowed="'none', or a variant whose proximal policy is EWMA or AGED",
            fix="remove proximal.reset, or use source 'ewma' and variant 'ppo_ewma_train_infer'",
        )
    if config.objective.clip == "truncated" and (variant.r_d.is_one or config.band == math.inf):
        raise ConfigError(
            "a reset comes when rho falls, and nothing lowers it: a truncation masks no token, and there is no band on r_d",
            got=said(config, "proximal.reset", "objective.clip", "band") + f", r_d = {variant.r_d}",
            allowed="objective.clip = 'ppo', or a finite band with r_d a ratio, or proximal.reset = 'none'",
            fix="remove proximal.reset, or use variant 'ppo_ewma_train_infer' with band = 1.5",
        )
    if p.reset == "guarded" and config.band == math.inf:
        raise ConfigError(
            "the guarded reset compares what the band keeps, and there is no band: it would never act",
            got=said(config, "proximal.reset", "band"),
            allowed="a finite band, or proximal.reset = 'none' or 'paper'",
            fix="set band = 1.5, or remove proximal.reset",
        )


def _check_scoring(config: RunConfig) -> None:
    """Refuse bf16 arithmetic over other weights, and to score in micro-batches what is scored before there is a batch."""
    p = config.proximal
    if config.trainer.compute == "bf16" and config.model.forward_dtype != "bf16":
        raise ConfigError(
            "bf16 arithmetic would round the weights of a version, which are fp32, once more",
            got=said(config, "trainer.compute", "model.forward_dtype"),
            allowed="model.forward_dtype = 'bf16', or 'auto', which follows trainer.compute",
            fix="remove model.forward_dtype",
        )
    if p.scoring == "prefix":
        return
    if not SOURCES.find(p.source).scores_batches or p.accept_mixed_kv:
        fitting = [name for name in SOURCES.names if SOURCES.find(name).scores_batches and SOURCES.find(name).provides is OLD]
        raise ConfigError(
            f"source '{p.source}' does not score tokens in the micro-batches that train them",
            got=said(config, "proximal.scoring", "proximal.accept_mixed_kv"),
            allowed=f"'prefix', or a source that scores batches ({', '.join(fitting)}) without accept_mixed_kv",
            fix=f"use source '{fitting[0]}', or remove proximal.scoring",
        )


def _check_device(config: RunConfig) -> None:
    """Refuse what is for GPUs on a CPU, and kernels for a head that they cannot compute."""
    t = config.trainer
    if t.device == "cpu" and (t.offload_optimizer or t.head_kernel == "liger"):
        raise ConfigError(
            "on a CPU the moments are in the host's memory already, and liger's kernels are for GPUs",
            got=said(config, "trainer.device", "trainer.offload_optimizer", "trainer.head_kernel"),
            allowed="trainer.offload_optimizer = false and trainer.head_kernel = 'own'",
            fix="remove them, or trainer.device",
        )
    if t.head_kernel == "liger" and t.compute == "bf16" and t.head_compute == "fp32":
        raise ConfigError(
            "liger's kernels round the logits to the type of their factors, bf16",
            got=said(config, "trainer.head_kernel", "trainer.compute", "trainer.head_compute"),
            allowed="trainer.head_compute = 'bf16', or trainer.head_kernel = 'own'",
            fix="set trainer.head_compute = 'bf16'",
        )


def _check_effects(config: RunConfig) -> None:
    """Refuse a measured band on more than noise, a schedule of no interpolation, and an audit that would not see all."""
    r_d, schedule = find_variant(config.variant).r_d, config.objective.interpolation_schedule
    if config.band == "auto" and r_d != OLD / MU:
        raise ConfigError(
            "a measured band holds the engine's own noise, old/mu, and would mask what else there is in r_d",
            got=said(config, "band", "variant") + f", r_d = {r_d}",
            allowed="a number above 1, inf, or a variant with r_d = old/mu",
            fix="set band = 1.5, or use variant 'decoupled_exact'",
        )
    if schedule != "fixed" and find_variant(config.variant).proximal not in (LINEAR, LOGLINEAR):
        raise ConfigError(
            f"variant '{config.variant}' interpolates nothing: objective.interpolation_mu has no effect",
            got=said(config, "objective.interpolation_schedule"),
            allowed="'fixed', or a variant whose proximal policy is LINEAR or LOGLINEAR",
            fix="remove objective.interpolation_schedule, or use variant 'loglinear_prox'",
        )
    steps_engine = BACKENDS.find(config.runtime.type).steps_engine
    if config.eval.overlap and (steps_engine or config.record.keep_best):
        raise ConfigError(
            "an evaluation that overlaps training "
            + ("needs real time" if steps_engine else "ends after the checkpoint of its version is written"),
            got=said(config, "eval.overlap", "runtime.type", "record.keep_best"),
            allowed="eval.overlap = false, or a runtime in real time and record.keep_best = false",
            fix="set eval.overlap = false" if steps_engine else "set record.keep_best = false",
        )
    if config.audit.share > 0 and config.objective.clip == "truncated":
        raise ConfigError(
            "the audit compares active sets, and a truncation acts on tokens that stay active: it would not see that",
            got=said(config, "audit.share", "objective.clip"),
            allowed="audit.share = 0, or objective.clip = 'ppo'",
            fix="set audit.share = 0",
        )
