"""The rules between the keys of a recipe; the range of each stands beside its field. Imports no torch."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from operator import attrgetter
from pathlib import Path

from pydantic import JsonValue, TypeAdapter, ValidationError

from oldlogits.config.episodes import EnvConfig
from oldlogits.config.guard import refuse_idle
from oldlogits.config.mixture import check_mixture, mixture_files
from oldlogits.config.model_folder import check_model_folder
from oldlogits.config.reader import build, fields_by_key, registry_of
from oldlogits.config.schema import RunConfig
from oldlogits.config.servers import check_servers
from oldlogits.core.backend import BACKENDS
from oldlogits.core.environment import PROGRAMS, is_model_folder
from oldlogits.core.errors import ConfigError, reading
from oldlogits.core.policies import AGED, EWMA, LINEAR, LOGLINEAR, OLD, find_variant
from oldlogits.core.source import SOURCES, check_source, sources_for

_SCRIPTS = frozenset({".py", ".js", ".mjs", ".ts", ".sh", ".rb", ".pl", ".php", ".lua", ".jar"})
"""Endings of words of a command that name a file for sure."""


def resolve(config: RunConfig) -> RunConfig:
    """Replace `proximal.source = "auto"` by the first source that provides what the variant needs, and nothing else.

    Raises:
        ConfigError: The variant does not exist, or no built-in source provides what it needs.
    """
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
    check_source(config.variant, config.proximal.source)
    _check_against_each_other(config)
    check_mixture(config.env.mixture, config.env, EnvConfig())
    check_servers(config)
    template_kwargs(config)
    _check_program(config)
    _check_kv(config)
    _check_average(config)
    _check_effects(config)
    refuse_idle(config)
    if is_model_folder(config.model.path):
        check_model_folder(Path(config.model.path), needs_weights=needs_model)


def said(config: RunConfig, *keys: str) -> str:
    """The keys as the recipe has them, for an error."""
    found = {key: attrgetter(key)(config) for key in keys}
    values = {key: list(value) if isinstance(value, tuple) else value for key, value in found.items()}
    return ", ".join(
        f"{key} = {value:g}" if isinstance(value, float) else f"{key} = {value!r}" for key, value in values.items()
    )


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
            f"2 .. rollout.group_size ({group.group_size})",
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


def _check_program(config: RunConfig) -> None:
    """Refuse an agent program where there is none, or where it cannot run."""
    env = config.env
    played = [key for key in ("program", "command", "verifiers") if getattr(env, key)]
    if len(played) > 1 or (env.verifiers and (env.mcp or env.mixture or env.reward or env.group_reward)):
        got, allowed = (
            said(config, *(f"env.{key}" for key in played)),
            "one of these" if len(played) > 1 else "env.verifiers alone",
        )
        raise ConfigError("several things play the episodes, or reward them", got=got, allowed=allowed, fix="remove one")
    if env.verifiers_args and not env.verifiers:
        got, allowed = said(config, "env.verifiers_args"), "an id in env.verifiers"
        raise ConfigError("arguments of no environment", got=got, allowed=allowed, fix="set env.verifiers, or remove them")
    if env.is_program and BACKENDS.find(config.runtime.type).steps_engine:
        got, allowed = said(config, "runtime.type"), "'local', 'ray', 'torchrun'"
        what = "an agent program runs in real time, which this runtime has not"
        raise ConfigError(what, got=got, allowed=allowed, fix="set runtime.type = 'local'")
    if env.is_program and (env.reward or env.group_reward):
        got, allowed = said(config, "env.reward" if env.reward else "env.group_reward"), "''"
        what = "an agent program gives its reward itself: this function would not be asked"
        raise ConfigError(what, got=got, allowed=allowed, fix="have the program call it, or remove it")
    if env.program:
        PROGRAMS.find(env.program)
    if env.command and shutil.which(env.command[0]) is None:
        got, allowed = f"env.command = {list(env.command)}", "a command whose first word is a program of this machine"
        raise ConfigError("the agent program cannot be found", got=got, allowed=allowed, fix="give its path, or install it")
    missing = [word for word in env.command[1:] if Path(word).suffix in _SCRIPTS and not Path(word).is_file()]
    if missing:
        got, allowed = f"{missing[0]} in env.command, from {Path.cwd()}", "files that are there"
        raise ConfigError("a file of the agent program is missing", got=got, allowed=allowed, fix="correct its path")


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
    """Refuse resets of an average that nothing reads, or that nothing would ever ask for."""
    p, variant = config.proximal, find_variant(config.variant)
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


def _check_effects(config: RunConfig) -> None:
    """Refuse a schedule of no interpolation, and an audit that would not see what the recipe does."""
    schedule = config.objective.interpolation_schedule
    if schedule != "fixed" and find_variant(config.variant).proximal not in (LINEAR, LOGLINEAR):
        raise ConfigError(
            f"variant '{config.variant}' interpolates nothing: objective.interpolation_mu has no effect",
            got=said(config, "objective.interpolation_schedule"),
            allowed="'fixed', or a variant whose proximal policy is LINEAR or LOGLINEAR",
            fix="remove objective.interpolation_schedule, or use variant 'loglinear_prox'",
        )
    if config.audit.share > 0 and config.objective.clip == "truncated":
        raise ConfigError(
            "the audit compares active sets, and a truncation acts on tokens that stay active: it would not see that",
            got=said(config, "audit.share", "objective.clip"),
            allowed="audit.share = 0, or objective.clip = 'ppo'",
            fix="set audit.share = 0",
        )
