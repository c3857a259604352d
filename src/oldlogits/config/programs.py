"""The rules of what plays the episodes: an agent program, what names it, and the keys that it takes no notice of."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from oldlogits.config.episodes import EnvConfig
from oldlogits.core.environment import PROGRAMS
from oldlogits.core.errors import ConfigError

_SCRIPTS: Final = frozenset({".py", ".js", ".mjs", ".ts", ".sh", ".rb", ".pl", ".php", ".lua", ".jar"})
"""Endings of words of a command that name a file for sure."""
_OF_CLASSES: Final = ("reward", "group_reward", "tool_errors", "latency_s", "mcp")
_OF_PROGRAMS: Final = ("program_timeout_s", "program_memory_bytes", "program_processes", "unmet_wishes")


def check_program(env: EnvConfig, *, in_real_time: bool) -> None:
    """Refuse an agent program that cannot run, several things that would play, and keys that what plays does not read.

    Args:
        env: What is played.
        in_real_time: Whether the runtime has real time, which programs need.

    Raises:
        ConfigError: One of these.
    """
    played = [key for key in ("program", "command", "verifiers") if getattr(env, key)]
    if len(played) > 1:
        got = _said(env, *played)
        raise ConfigError("several things play the episodes", got=got, allowed="one of these", fix="remove one")
    if env.is_program and not in_real_time:
        got, allowed = "runtime.type = 'lockstep'", "'local', 'ray', 'torchrun'"
        what = "an agent program runs in real time, which this runtime has not"
        raise ConfigError(what, got=got, allowed=allowed, fix="set runtime.type = 'local'")
    for key, why in _ignored(env):
        if getattr(env, key) != getattr(EnvConfig(), key):
            raise ConfigError(f"{why}: env.{key} has no effect", got=_said(env, key), allowed="its default", fix="remove it")
    if env.program:
        PROGRAMS.find(env.program)
    if env.command and shutil.which(env.command[0]) is None:
        got, allowed = _said(env, "command"), "a command whose first word is a program of this machine"
        raise ConfigError("the agent program cannot be found", got=got, allowed=allowed, fix="give its path, or install it")
    missing = [word for word in env.command[1:] if Path(word).suffix in _SCRIPTS and not Path(word).is_file()]
    if missing:
        got, allowed = f"{missing[0]} in env.command, from {Path.cwd()}", "files that are there"
        raise ConfigError("a file of the agent program is missing", got=got, allowed=allowed, fix="correct its path")


def _ignored(env: EnvConfig) -> Iterator[tuple[str, str]]:
    """Keys of `env` that nothing would read, and why."""
    if env.is_program:
        why = "an agent program gives its reward itself, and calls its own tools"
        yield from ((key, why) for key in _OF_CLASSES)
    else:
        yield from ((key, "no agent program plays the episodes") for key in _OF_PROGRAMS)
    if not env.command:
        yield "program_memory_bytes", "no command plays the episodes"
    else:
        yield "program_processes", "a command has processes of its own"
    if not env.verifiers:
        yield "verifiers_args", "arguments of no environment"
    for instead in ("verifiers", "mcp"):
        if getattr(env, instead):
            yield from ((key, f"env.{instead} takes its place") for key in ("target", "adapter", "mixture"))


def rows_in_words(env: EnvConfig, *, only_heldout: bool = False) -> str:
    """Where training rows and held-out rows come from, or the latter alone."""

    def origin(target: str, train: str, heldout: str) -> str:
        made = "made by " + (f"env.verifiers = '{env.verifiers}'" if env.verifiers else f"env.target = '{target}'")
        return ("" if only_heldout else f"training: {train or made}, ") + f"held-out: {heldout or made}"

    parts = env.mixture or (env,)
    return "; ".join(origin(part.target, part.train_data, part.eval_data) for part in parts)


def _said(env: EnvConfig, *keys: str) -> str:
    values = {key: getattr(env, key) for key in keys}
    return ", ".join(f"env.{key} = {list(one) if isinstance(one, tuple) else one!r}" for key, one in values.items())
