"""A tool-call parser from outside of the package: the recipe names it by ``tests.extension.own_parser:MarkParser``."""

from __future__ import annotations

from collections.abc import Sequence

from oldlogits.core.parser import Malformed, ToolCall


class MarkParser:
    """Reads each ``<tool> word`` of a turn as a call of the tool look; other words are ignored."""

    def parse(self, text: str) -> Sequence[ToolCall | Malformed]:
        """Read the calls of a turn."""
        return [_read(part.split()) for part in text.split("<tool>")[1:]]


def _read(words: list[str]) -> ToolCall | Malformed:
    return ToolCall(name="look", positional=(words[0],)) if words else Malformed(reason="error : look at what ?")
