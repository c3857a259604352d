"""``oldlogits demo``: train the order desk's small agent, as ``oldlogits train desk`` does."""

from __future__ import annotations

from collections.abc import Sequence

from oldlogits.cli import train


def command(arguments: Sequence[str]) -> int:
    """Train the shipped recipe; what follows is read as by `oldlogits train`."""
    return train.command(["desk", *arguments], prog="oldlogits demo")
