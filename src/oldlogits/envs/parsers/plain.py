"""``<call> name word ... </call>``: a call of a few words, for models with one token a word."""

from __future__ import annotations

from oldlogits.core.parser import Malformed, ToolCall


class PlainParser:
    """Reads a turn that is one call with its arguments by position, one a word."""

    def parse(self, text: str) -> list[ToolCall | Malformed]:
        """Read the turn, which is a call from its first to its last word, or a message.

        Example:
            >>> PlainParser().parse("<call> cancel o17 </call>")[0].positional
            ('o17',)
        """
        words = text.split()
        if "<call>" not in words and "</call>" not in words:
            return []
        if words[0] != "<call>" or words[-1] != "</call>" or words.count("<call>") + words.count("</call>") != 2:
            return [Malformed(reason="error : write one call as <call> tool argument </call>")]
        if len(words) == 2:
            return [Malformed(reason="error : the call names no tool")]
        return [ToolCall(name=words[1], positional=tuple(words[2:-1]))]

    def split(self, text: str) -> tuple[str, list[ToolCall | Malformed]]:
        """Return the words of a message, or the call."""
        calls = self.parse(text)
        return "" if calls else text.strip(), calls

    def write(self, call: ToolCall) -> str:
        """Write a call; the names of its arguments are left out."""
        return " ".join(
            ["<call>", call.name, *call.positional, *map(str, call.named.values()), *call.texts.values(), "</call>"]
        )
