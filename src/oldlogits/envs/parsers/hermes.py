"""``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``: how Hermes and Qwen models write calls."""

from __future__ import annotations

from oldlogits.core.parser import Malformed, ToolCall
from oldlogits.envs.text import read_json, write_json

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class HermesParser:
    """Reads every call of a turn; text around the calls is ignored."""

    def parse(self, text: str) -> list[ToolCall | Malformed]:
        """Read the calls of a turn.

        Example:
            >>> HermesParser().parse('<tool_call>{"name": "cancel", "arguments": {"order": "o17"}}</tool_call>')
            [ToolCall(name='cancel', positional=(), named={'order': 'o17'})]
        """
        calls: list[ToolCall | Malformed] = []
        before, opened, rest = text.partition(OPEN)
        if not opened and CLOSE in before:
            return [Malformed(reason=f"error : {CLOSE} without {OPEN}")]
        while opened:
            body, closed, rest = rest.partition(CLOSE)
            calls.append(_read(body) if closed else Malformed(reason=f"error : {OPEN} is not closed"))
            _, opened, rest = rest.partition(OPEN)
        return calls

    def write(self, call: ToolCall) -> str:
        """Write a call whose arguments are all named."""
        return f"{OPEN}{write_json({'name': call.name, 'arguments': dict(call.named)})}{CLOSE}"


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
