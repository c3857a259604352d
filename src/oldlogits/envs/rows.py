"""Whether a row fits the environment that is to play it."""

from __future__ import annotations

import inspect

from oldlogits.core.environment import Environment
from oldlogits.envs.delegate import BY, Delegate


def row_misfit(environment_class: type[Environment], row: object) -> str:
    """Say why a row is not what the environment's `reset` can be called with; empty: it can."""
    if not isinstance(row, dict) or not all(isinstance(key, str) for key in row):
        return "no JSON object"
    if issubclass(environment_class, Delegate):
        player, given = environment_class.player_of(row)
        if player is None:
            return f"no environment {row.get(BY)!r}: its key {BY} is one of {', '.join(environment_class.players)}"
        return row_misfit(player.environment, given)
    try:
        signature = inspect.signature(environment_class.reset)
    except (AttributeError, TypeError, ValueError):  # it says nothing of itself
        return ""
    itself = [None] if inspect.isfunction(inspect.getattr_static(environment_class, "reset")) else []
    try:
        signature.bind(*itself, **row)
    except TypeError as error:
        return str(error)
    return ""
