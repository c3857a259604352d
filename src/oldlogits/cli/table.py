"""Tables that a narrow terminal does not break: columns where every word has room, one block of lines a row where not."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence
from typing import Final

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.table import Table
from rich.text import Text

INDENT: Final = "    "
_GAP: Final = 3
"""Characters between two columns."""


class Rows:
    """Rows under named columns; it takes the form that the console's width allows.

    Args:
        columns: The names of the columns; the first one names a row.
        rows: One cell a column.
    """

    def __init__(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        self.columns, self.rows = tuple(columns), [tuple(row) for row in rows]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Columns if no word has to be broken, else blocks."""
        widths = column_widths([self.columns, *self.rows], options.max_width)
        yield self._as_blocks(options.max_width) if widths is None else self._as_columns(widths)

    def _as_columns(self, widths: Sequence[int]) -> Table:
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        for column, width in zip(self.columns, widths, strict=True):
            table.add_column(column, width=width)
        for row in self.rows:
            table.add_row(*map(Text, row))
        return table

    def _as_blocks(self, width: int) -> Group:
        lines: list[Text] = []
        for name, *cells in self.rows:
            lines.append(Text(name, style="bold"))
            parts = [f"{column}: {cell}" for column, cell in zip(self.columns[1:], cells, strict=True) if cell]
            lines += map(Text, packed(parts, width))
        return Group(*lines)


def column_widths(lines: Sequence[Sequence[str]], width: int) -> list[int] | None:
    """Widths at which all columns stand side by side and every word is whole; None: there are none.

    Args:
        lines: The cells of every line, headers included.
        width: The console's width in characters.

    Example:
        >>> [column_widths([["a", "two words"], ["b", "more words here"]], width) for width in (20, 10, 8)]
        [[1, 15], [1, 6], None]
    """
    cells = list(zip(*lines, strict=True))
    widths = [max(map(len, column)) for column in cells]
    longest = [max(len(word) for cell in column for word in cell.split() or [""]) for column in cells]
    room = width - _GAP * (len(widths) - 1)
    while sum(widths) > room:
        wide = [i for i, found in enumerate(widths) if found > longest[i]]
        if not wide:
            return None
        widths[max(wide, key=widths.__getitem__)] -= 1
    return widths


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
