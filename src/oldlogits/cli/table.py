"""Tables that a narrow terminal does not break: columns where every cell has room, one block of lines a row where not."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence
from typing import Final

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

INDENT: Final = "    "


class Rows:
    """Rows under named columns; it takes the form that the console's width allows.

    Args:
        columns: The names of the columns; the first one names a row.
        rows: One cell a column.
    """

    def __init__(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        self.columns, self.rows = columns, rows

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Columns if every cell has room on one line, else blocks."""
        table = Table(*self.columns, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        for row in self.rows:
            table.add_row(*map(Text, row))
        if Measurement.get(console, options.update(max_width=10_000), table).maximum <= options.max_width:
            yield table
            return
        for name, *cells in self.rows:
            yield Text(name, style="bold")
            parts = [f"{column}: {cell}" for column, cell in zip(self.columns[1:], cells, strict=True) if cell]
            yield Text("\n".join(packed(parts, options.max_width)))


def packed(parts: Sequence[str], width: int) -> list[str]:
    """Parts side by side on indented lines, each whole if a line has room for it."""
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + 3 + len(part) <= width:
            lines[-1] += f"   {part}"
        else:
            lines += wrapped(part, width, indent=INDENT)
    return lines


def wrapped(text: str, width: int | None = None, *, indent: str = "", later: str | None = None) -> list[str]:
    """A text as lines that end between words.

    Args:
        text: One paragraph.
        width: The width of a line in characters; by default the terminal's.
        indent: What each line begins with.
        later: What all lines but the first begin with instead.
    """
    return textwrap.wrap(
        text,
        max(width or shutil.get_terminal_size().columns, 8),
        initial_indent=indent,
        subsequent_indent=indent if later is None else later,
        break_long_words=False,
        break_on_hyphens=False,
    )
