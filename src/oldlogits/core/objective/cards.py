"""The built-in losses as one table, cards.toml: what a recipe must know of each without importing it. Imports no torch."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from types import MappingProxyType
from typing import Any, Final

from oldlogits.core.objective import options


@dataclass(frozen=True, slots=True, kw_only=True)
class LossCard:
    """What is known of a loss without importing it. A loss from outside may have one as its attribute ``card``.

    Args:
        what: What it does to a token, in a line.
        paper: The source of the formula.
        variant: The row of the paper's table that is the paper's own; every other row may be used.
        options: The class of its own knobs, a dataclass with ranges in the annotations; None: it has none.
        bounds: Those of the recipe's bounds on r_s that it reads; another one that is not the default is refused.
        has_active_set: Whether its masks say all of what r_s does; the audit, which compares them, is refused where not.
        is_guarded: Whether the rules of config/guard.py, which are about the band and the PPO clip, are about this loss.
        step_rule: The import path of a function from all tokens of an optimizer step (`LossInputs` without THETA) and the
            `Objective` to a bool [token], which each micro-batch receives its part of; empty: there is none.
        splits: Whether the parts of a batch add up to the whole however it is split into micro-batches.
        one_advantage: Whether the formula is of one advantage for a whole sequence, so that advantages of turns are refused.
    """

    what: str
    paper: str
    variant: str
    options: type | None = None
    bounds: tuple[str, ...] = ()
    has_active_set: bool = True
    is_guarded: bool = False
    step_rule: str = ""
    splits: bool = True
    one_advantage: bool = False


R_S_BOUNDS: Final = ("eps_low", "eps_high", "dual_clip", "clip_by_lag", "clip", "is_cap")
"""The recipe's bounds on r_s, of which each loss reads some."""

OUTSIDE: Final = LossCard(what="a loss from outside", paper="-", variant="-", bounds=R_S_BOUNDS)


def _card(table: dict[str, Any]) -> LossCard:
    kind = getattr(options, table.pop("options")) if "options" in table else None
    return LossCard(options=kind, bounds=tuple(table.pop("bounds", ())), **table)


_TABLES: Final = tomllib.loads(resources.files(__package__).joinpath("cards.toml").read_text(encoding="utf-8"))

CARDS: Final[Mapping[str, LossCard]] = MappingProxyType({name: _card(table) for name, table in _TABLES.items()})
"""The built-in losses by name, and what is known of each."""
