"""Tables of a Markdown file, each under a mark that holds the command that makes it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from oldlogits.core.errors import ConfigError

BEGIN: Final = "<!-- figures: python -m benchmarks.simulate "
END: Final = "<!-- end of figures -->"

_MARKED: Final = re.compile(f"({re.escape(BEGIN)}([^\n]+) -->\n)(.*?)({re.escape(END)})", re.DOTALL)


def marked(text: str) -> list[tuple[list[str], str]]:
    """The words of every mark's command, and what stands under it."""
    return [(shlex.split(match[2]), match[3]) for match in _MARKED.finditer(text)]


def rewrite(document: Path, make: Callable[[Sequence[str]], str]) -> None:
    """Make everything between marks anew.

    Args:
        document: To change.
        make: From the words of a command to what it shows.

    Raises:
        ConfigError: There is no such document, or it has no marks.
    """
    text = document.read_text(encoding="utf-8") if document.is_file() else ""
    if not marked(text):
        raise ConfigError(
            "the document has no place for tables",
            got=str(document),
            allowed=f"a file with lines '{BEGIN}4b -->' and '{END}'",
            fix="give a preset, or a file with marks such as benchmarks/simulate/scale.md",
        )
    document.write_text(
        _MARKED.sub(lambda match: f"{match[1]}\n{make(shlex.split(match[2]))}\n{match[4]}", text), encoding="utf-8"
    )
