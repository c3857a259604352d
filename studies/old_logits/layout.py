"""One small table type, written once for terminal, page and document; and how a study writes its figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from rich import box
from rich.table import Table as RichTable
from rich.text import Text

from studies.old_logits.analyse.stats import Estimate

DASH: Final = "—"
"""In place of what is missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows of text, with what is needed to read them.

    Args:
        part: The part of the study that it belongs to.
        title: What is compared.
        header: One text a column.
        rows: As wide as the header.
        caption: How to read it.
        legend: The marks that stand in it, and what is missing; a line each.
        is_detail: Folded on the page and in the document, not printed in the terminal.
    """

    part: str
    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""
    legend: tuple[str, ...] = ()
    is_detail: bool = False

    def __post_init__(self) -> None:
        """Hold rows to the width of the header."""
        assert all(len(row) == len(self.header) for row in self.rows), self.title

    @property
    def numeric(self) -> tuple[bool, ...]:
        """By column, whether it holds numbers, which stand at the right."""
        return tuple(bool(column) and all(map(_starts_as_number, column)) for column in self.columns)

    @property
    def columns(self) -> tuple[tuple[str, ...], ...]:
        """The cells by column."""
        return tuple(tuple(row[index] for row in self.rows) for index in range(len(self.header)))

    def markdown(self) -> str:
        """For a document: the table, its caption above it, its legend below."""
        rule = tuple("---:" if is_number else "---" for is_number in self.numeric)
        lines = [self.header, rule, *self.rows]
        body = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        return "\n\n".join(
            part for part in (f"**{self.title}.** {self.caption}".strip(), body, "  \n".join(self.legend)) if part
        )

    def rich(self) -> RichTable:
        """For the terminal."""
        notes = "\n".join([self.caption, *self.legend]).strip()
        caption = Text(notes, justify="left", style="dim") if notes else None
        title = Text(self.title, style="bold")
        table = RichTable(title=title, title_justify="left", caption=caption, box=box.SIMPLE_HEAD)
        for name, is_number in zip(self.header, self.numeric, strict=True):
            table.add_column(name, justify="right" if is_number else "left", overflow="fold")
        for row in self.rows:
            table.add_row(*(Text(cell) for cell in row))
        return table


def figure(value: float | None, form: str = ".3f") -> str:
    """A number, or a dash where there is none."""
    return DASH if value is None or math.isnan(value) else f"{value:{form}}"


def plus_minus(estimate: Estimate | None) -> str:
    """``0.712 ± 0.045``: a mean and half of its interval."""
    if estimate is None:
        return DASH
    half = (estimate.high - estimate.low) / 2
    return f"{estimate.mean:.3f} ± {half:.3f}" if math.isfinite(half) else f"{estimate.mean:.3f} ± {DASH}"


def interval(estimate: Estimate | None, form: str = "+.3f") -> str:
    """``-0.052 [-0.101, -0.003]``: a mean and its interval."""
    if estimate is None:
        return DASH
    if not math.isfinite(estimate.high):
        return f"{estimate.mean:{form}} [{DASH}]"
    return f"{estimate.mean:{form}} [{estimate.low:{form}}, {estimate.high:{form}}]"


def p_value(p: float | None) -> str:
    """``0.012``, ``< 0.001``."""
    return DASH if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def counted(count: int, one: str, many: str = "") -> str:
    """``1 run``, ``3 runs``."""
    return f"{count} {one}" if count == 1 else f"{count} {many or one + 's'}"


def blocks_named(blocks: Sequence[int]) -> str:
    """``block 3``, ``blocks 0, 2 to 5``: runs of consecutive numbers by their ends."""
    spans: list[list[int]] = []
    for block in blocks:
        if spans and block == spans[-1][-1] + 1:
            spans[-1].append(block)
        else:
            spans.append([block])
    named = ", ".join(f"{span[0]} to {span[-1]}" if len(span) > 2 else ", ".join(map(str, span)) for span in spans)
    return f"block{'' if len(blocks) == 1 else 's'} {named}"


def _starts_as_number(cell: str) -> bool:
    return cell == DASH or cell[:1].isdigit() or (cell[:1] in "+-<" and cell[1:2] in "0123456789. ")
