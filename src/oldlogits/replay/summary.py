"""What came out of a replay: ``replay.json``, and the same as a page to read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Final

from oldlogits.record.folder import write_atomic
from oldlogits.record.jsonl import Json, encode
from oldlogits.replay.figures import UpdateFigures, WeightsApart

OTHER_MODEL: Final = 0.2
"""Nats: the same weights give no token log-probs that are further apart, whatever rounds them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplaySummary:
    """A replay.

    Args:
        record: The run folder, or the file of a neutral table.
        is_run: Whether it is a run folder, whose own recipe is known.
        model: The model folder that it started from.
        recipe: The variant, the source and the band that it trained under.
        changes: The keys that differ from the recorded recipe, each with both values.
        start: The version that the first batch entered training at.
        updates: The figures of each update.
        weights: How far the weights of the two recipes are apart in the end; None: there is one recipe.
    """

    record: str
    is_run: bool
    model: str
    recipe: Mapping[str, str | float]
    changes: Mapping[str, tuple[object, object]]
    start: int
    updates: Sequence[UpdateFigures]
    weights: WeightsApart | None

    @property
    def num_tokens(self) -> int:
        """Tokens that were trained."""
        return sum(one.num_tokens for one in self.updates)

    @property
    def is_same(self) -> bool:
        """Whether the recorded recipe gave all recorded values and weights again, bit for bit."""
        return self.is_run and not any(one.num_unlike or one.checkpoint_unlike > 0 for one in self.updates)

    def write(self, folder: Path) -> None:
        """Write ``replay.json`` and ``replay.md``.

        Raises:
            RunWriteError: They cannot be written.
        """
        table: dict[str, Json] = {name: _plain(value) for name, value in asdict(self).items()}
        table |= {"num_tokens": self.num_tokens, "is_same": self.is_same}
        write_atomic(folder / "replay.json", encode(table) + "\n")
        write_atomic(folder / "replay.md", self.page())

    def page(self) -> str:
        """Write it down in Markdown."""
        lines = [f"# Replay of {self.record}", "", *self.sentences(), "", "```text", header(has_other=self.weights is not None)]
        return "\n".join([*lines, *map(row, self.updates), "```", ""])

    def sentences(self) -> list[str]:
        """Say what came out, a sentence a line."""
        n = self.num_tokens
        said = [f"{len(self.updates)} updates from version {self.start} on, {n:,} trained tokens."]
        said += [self._repeated()] if self.is_run else [self._unlike_table()]
        changed = [one.change for one in self.updates if one.change is not None]
        if not changed or self.weights is None:
            return said
        said += ["Changed: " + ", ".join(f"{key} {old} -> {new}" for key, (old, new) in self.changes.items()) + "."]
        gained, lost = sum(c.num_gained for c in changed), sum(c.num_lost for c in changed)
        share = f"{(gained + lost) / max(n, 1):.2%}"
        said += [f"{gained + lost:,} tokens ({share}) are decided otherwise: {gained:,} more are active, {lost:,} fewer."]
        cosines = [c.gradient_cosine for c in changed if not math.isnan(c.gradient_cosine)]
        if cosines:
            said += [f"The cosine between both gradients is {fmean(cosines):.4f} on average, {min(cosines):.4f} at least."]
        w = self.weights
        moved = f", {w.distance / w.moved:.1%} of what the recorded recipe moved them by" if w.moved else ""
        return [*said, f"The weights are {w.distance:.4g} apart in the end{moved}."]

    def _repeated(self) -> str:
        checked = [one for one in self.updates if not math.isnan(one.checkpoint_unlike)]
        if self.is_same:
            named = ", ".join(str(one.version) for one in checked)
            weights = f", and the weights of the checkpoints of version {named}" if named else ""
            return f"The recorded recipe gave every recorded value again, bit for bit{weights}."
        unlike = [one for one in self.updates if one.num_unlike or one.checkpoint_unlike > 0]
        num, most = sum(one.num_unlike for one in unlike), max(one.logp_unlike_max for one in self.updates)
        return (
            f"The recorded recipe did NOT give the recorded values again: {num:,} tokens differ, from version "
            f"{unlike[0].version} on, THETA by up to {most:.2e} nats. {self._why()}"
        )

    def _why(self) -> str:
        if self.updates[0].logp_unlike_max > OTHER_MODEL:
            return "That is far more than rounding, from the first batch on: the model is not the recorded one."
        return "Other threads, devices or packages round otherwise."

    def _unlike_table(self) -> str:
        first = self.updates[0].logp_unlike_max
        if math.isnan(first):
            return "The table has no logp_theta: nothing tells whether the model is the recorded one."
        far = ": far more than rounding, so it is not the recorded one, or the recipe is another" if first > OTHER_MODEL else ""
        return f"The model gives the first batch the recorded logp_theta within {first:.2e} nats{far}."


def header(*, has_other: bool) -> str:
    """Name the columns of `row`, beside another recipe or without one."""
    return " ".join(f"{name:>{width}}" for name, width, _ in (_CHANGED if has_other else _ALONE))


def row(one: UpdateFigures) -> str:
    """Write one update as a line of a table that fits 80 columns."""
    columns = _CHANGED if one.change is not None else _ALONE
    return " ".join(f"{cell(one):>{width}}" for _, width, cell in columns)


Cell = Callable[[UpdateFigures], str]


def _of_change(form: str, name: str) -> Cell:
    return lambda one: format(getattr(one.change, name), form)


_BOTH: Final[tuple[tuple[str, int, Cell], ...]] = (
    ("version", 7, lambda one: str(one.version)),
    ("tokens", 8, lambda one: f"{one.num_tokens:,}"),
    ("loss", 10, lambda one: f"{one.loss:.3g}"),
)
_ALONE: Final[tuple[tuple[str, int, Cell], ...]] = (
    *_BOTH,
    ("gradient", 10, lambda one: f"{one.gradient_norm:.3g}"),
    ("active", 8, lambda one: f"{one.num_active / max(one.num_tokens, 1):.2%}"),
    ("unlike", 8, lambda one: f"{one.num_unlike:,}"),
    ("THETA off by", 12, lambda one: f"{one.logp_unlike_max:.2g}"),
)
_CHANGED: Final[tuple[tuple[str, int, Cell], ...]] = (
    *_BOTH,
    ("new loss", 10, _of_change(".3g", "loss")),
    ("cosine", 8, _of_change(".4f", "gradient_cosine")),
    ("gained", 7, _of_change(",", "num_gained")),
    ("lost", 7, _of_change(",", "num_lost")),
    ("weight", 7, _of_change(".1%", "weight_share")),
    ("unlike", 7, lambda one: f"{one.num_unlike:,}"),
)


def _plain(value: object) -> Json:
    """Give a value as JSON has it: tuples are lists, and what JSON does not know is text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
