"""The rows of the table: written line by line while they are measured, read by whoever prints them, at 80 columns."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One figure.

    Args:
        name: What was measured.
        value: The figure; None: there is none, and the note says why.
        unit: Of the figure, such as "tokens/s".
        of_peak: The share of the device's peak that it stands for; None: it stands for none.
        least: The goal: the least share of the peak; None: there is none.
        most: The goal: the most that the figure may be; None: there is none.
        note: How it was measured, or why not.
    """

    name: str
    value: float | None
    unit: str = ""
    of_peak: float | None = None
    least: float | None = None
    most: float | None = None
    note: str = ""

    @property
    def is_met(self) -> bool | None:
        """Whether the goal is met; None: there is no goal, or nothing was measured."""
        if self.value is None or (self.least is None and self.most is None):
            return None
        if self.least is not None and (self.of_peak is None or self.of_peak < self.least):
            return False
        return self.most is None or self.value <= self.most

    @property
    def goal(self) -> str:
        """The goal in words; nothing where there is none."""
        if self.least is not None:
            return f">= {self.least:.0%}"
        return f"<= {_figure(self.most)} {self.unit}".rstrip() if self.most is not None else ""


class Rows:
    """A file of rows, one line of JSON each; what is written stays when its writer is killed."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def add(self, row: Row) -> None:
        """Write a row, and print it."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(row)) + "\n")
        print("\n".join(lines_of(row)), flush=True)

    def read(self) -> list[Row]:
        """Read what was written so far."""
        lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.is_file() else []
        return [Row(**json.loads(line)) for line in lines]


HEADER = f"{'':38}{'measured':>18}{'of peak':>9}{'goal':>13}"


def lines_of(row: Row) -> Iterator[str]:
    """A row at 80 columns: its figures, and below them its note."""
    measured = "-" if row.value is None else f"{_figure(row.value)} {row.unit}".rstrip()
    of_peak = "" if row.of_peak is None else f"{row.of_peak:.1%}"
    yield f"{row.name:38}{measured:>18}{of_peak:>9}{row.goal:>13}{' *' if row.is_met is False else ''}"
    words, line = row.note.split(), ""
    for word in words:
        if line and len(line) + len(word) + 5 > 80:
            yield f"    {line}"
            line = ""
        line = f"{line} {word}".strip()
    if line:
        yield f"    {line}"


def report(rows: Sequence[Row], facts: Mapping[str, object]) -> dict[str, object]:
    """What the JSON file holds: facts about machine and run, and every row with its goal."""
    return {**facts, "rows": [{**asdict(row), "goal": row.goal, "is_met": row.is_met} for row in rows]}


def _figure(value: float | None) -> str:
    """Three digits.

    Example:
        16342.1 -> "16,342", 0.7312 -> "0.731", 12.34 -> "12.3".
    """
    if value is None:
        return "-"
    size = abs(value)
    return f"{value:,.0f}" if size >= 100 else f"{value:.1f}" if size >= 10 else f"{value:.3g}"
