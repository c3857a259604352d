"""Several environments in one run: a table ``[[env.mixture]]`` each, and their check. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Gt, Le

from oldlogits.core.environment import ADAPTERS
from oldlogits.core.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class MixturePart:
    """One environment of a mixture."""

    target: str
    """As `env.target`."""
    weight: Annotated[float, Gt(0), Le(1e6)] = 1.0
    """Its share of the groups, compared with the weights of the others."""
    name: str = ""
    """What its rows are marked by; empty: the last part of the target."""
    adapter: Annotated[str, ADAPTERS] = "class"
    """As `env.adapter`."""
    train_data: str = ""
    """As `env.train_data`."""
    eval_data: str = ""
    """As `env.eval_data`."""


def check_mixture(mixture: Sequence[MixturePart], env: object, default: object) -> None:
    """Refuse a mixture beside a single environment.

    Raises:
        ConfigError: Both are there.
    """
    for key in ("target", "adapter", "train_data", "eval_data") if mixture else ():
        if getattr(env, key) != getattr(default, key):
            raise ConfigError(
                "a mixture takes the place of env.target, env.adapter, env.train_data and env.eval_data",
                got=f"env.{key} = {getattr(env, key)!r} and {len(mixture)} tables [[env.mixture]]",
                allowed="either one environment or a mixture",
                fix=f"move env.{key} into a table [[env.mixture]]",
            )


def mixture_files(mixture: Sequence[MixturePart]) -> Iterator[tuple[str, str]]:
    """Return the keys that name files, and what they say."""
    for i, part in enumerate(mixture):
        yield from ((f"env.mixture[{i}].{key}", getattr(part, key)) for key in ("train_data", "eval_data"))
