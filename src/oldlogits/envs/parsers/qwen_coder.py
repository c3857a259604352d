"""``<tool_call><function=name><parameter=x>...``: how Qwen3-Coder and Qwen3.5 models write calls."""

from __future__ import annotations

import re
from typing import Final

from oldlogits.core.parser import Malformed, ToolCall
from oldlogits.envs.parsers.hermes import CLOSE, OPEN, split_blocks
from oldlogits.envs.text import write_json

_WRITE: Final = f"error : write {OPEN}<function=tool><parameter=name>value</parameter></function>{CLOSE}"
_FUNCTION: Final = re.compile(r"\s*<function=([^<>\n]+)>(.*)</function>\s*", re.DOTALL)
_PARAMETER: Final = re.compile(r"\s*<parameter=([^<>\n]+)>(?:\n)?(.*?)(?:\n)?</parameter>\s*", re.DOTALL)


class QwenCoderParser:
    """Reads every call of a turn; arguments are text, which a tool is given as the type that its parameter has."""

    def parse(self, text: str) -> list[ToolCall | Malformed]:
        """Read the calls of a turn.

        Example:
            >>> text = "<tool_call><function=cancel><parameter=order>o17</parameter></function></tool_call>"
            >>> QwenCoderParser().parse(text)[0].texts
            {'order': 'o17'}
        """
        return self.split(text)[1]

    def split(self, text: str) -> tuple[str, list[ToolCall | Malformed]]:
        """Return what is said around the calls of a turn, and the calls."""
        return split_blocks(text, _read)

    def write(self, call: ToolCall) -> str:
        """Write a call whose arguments are all named; one that is no text as JSON."""
        texts = {name: value if isinstance(value, str) else write_json(value) for name, value in call.named.items()}
        given = {**texts, **call.texts}
        parameters = "".join(f"<parameter={name}>\n{value}\n</parameter>\n" for name, value in given.items())
        return f"{OPEN}\n<function={call.name}>\n{parameters}</function>\n{CLOSE}"


def _read(body: str) -> ToolCall | Malformed:
    if not (function := _FUNCTION.fullmatch(body)):
        return Malformed(reason=_WRITE)
    name, rest = function.groups()
    texts: dict[str, str] = {}
    at = len(rest) - len(rest.lstrip())
    while at < len(rest):
        if not (parameter := _PARAMETER.match(rest, at)):
            return Malformed(reason=_WRITE)
        if parameter[1] in texts:
            return Malformed(reason=f"error : the call gives {parameter[1]} twice")
        texts[parameter[1]], at = parameter[2], parameter.end()
    return ToolCall(name=name, texts=texts)
