"""``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``: how Hermes and Qwen models write calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from oldlogits.core.parser import Malformed, ToolCall
from oldlogits.envs.text import read_json, write_json

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_CLOSE_IN_JSON: Final = CLOSE.replace("/", r"\/")
"""The same text inside of a string of JSON."""


class HermesParser:
    """Reads every call of a turn; text around the calls is ignored."""

    def parse(self, text: str) -> list[ToolCall | Malformed]:
        """Read the calls of a turn.

        Example:
            >>> HermesParser().parse('<tool_call>{"name": "cancel", "arguments": {"order": "o17"}}</tool_call>')[0].named
            {'order': 'o17'}
        """
        return self.split(text)[1]

    def split(self, text: str) -> tuple[str, list[ToolCall | Malformed]]:
        """Return what is said around the calls of a turn, and the calls."""
        return split_blocks(text, _read)

    def write(self, call: ToolCall) -> str:
        """Write a call whose arguments are all named."""
        body = write_json({"name": call.name, "arguments": dict(call.named)}).replace(CLOSE, _CLOSE_IN_JSON)
        return f"{OPEN}{body}{CLOSE}"


def split_blocks(text: str, read: Callable[[str], ToolCall | Malformed]) -> tuple[str, list[ToolCall | Malformed]]:
    """Return what stands outside of ``<tool_call>...</tool_call>``, and the calls that are read of what stands inside."""
    calls: list[ToolCall | Malformed] = []
    before, opened, rest = text.partition(OPEN)
    if not opened and CLOSE in before:
        return "", [Malformed(reason=f"error : {CLOSE} without {OPEN}")]
    said = [before]
    while opened:
        body, closed, rest = rest.partition(CLOSE)
        calls.append(read(body) if closed else Malformed(reason=f"error : {OPEN} is not closed"))
        between, opened, rest = rest.partition(OPEN)
        said.append(between)
    return "".join(said).strip(), calls


def _read(body: str) -> ToolCall | Malformed:
    try:
        call = read_json(body)
    except ValueError as error:
        return Malformed(reason=f"error : the call is not JSON ; {error}")
    match call:
        case {"name": str(name), "arguments": dict(arguments)}:
            return ToolCall(name=name, named=arguments)
        case {"name": str(name), **others} if not others:
            return ToolCall(name=name)
    return Malformed(reason='error : write {"name": tool, "arguments": {...}}')
