"""``oldlogits demo``: the order desk, from its shipped recipe."""

from __future__ import annotations

from collections.abc import Sequence

from oldlogits.cli import train


def command(arguments: Sequence[str]) -> int:
    """Train as ``oldlogits train desk`` does; every option of it is taken."""
    return train.command(["desk", *arguments])
