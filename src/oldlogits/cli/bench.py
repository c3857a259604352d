"""``oldlogits bench NAME``: measurements and predictions. One file per bench, imported only when it is called."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final

from oldlogits.core.errors import ConfigError

BENCHES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "versions": "measure what exact versions cost on this machine",
        "scaling": "measure how trajectories per second grow with rollout workers, and Ray beside local",
        "simulate": "predict throughput, idle shares and staleness of a run or a cluster from step times",
    }
)
"""Each bench is the function ``command(arguments) -> exit status`` of ``oldlogits.cli.bench_NAME``."""


def command(arguments: Sequence[str]) -> int:
    """Run a bench; returns the exit status."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: oldlogits bench NAME ...\n\n" + "\n".join(f"  {name:<10}{text}" for name, text in BENCHES.items()))
        return 0
    if arguments[0] not in BENCHES:
        raise ConfigError("unknown bench", got=arguments[0], allowed=", ".join(BENCHES), fix="run `oldlogits bench --help`")
    status: int = importlib.import_module(f"oldlogits.cli.bench_{arguments[0]}").command(arguments[1:])
    return status
