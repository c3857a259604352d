"""``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``: how Hermes and Qwen models write calls."""

from __future__ import annotations

import json

from oldlogits.core.parser import Malformed, ToolCall

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
        return f"{OPEN}{json.dumps({'name': call.name, 'arguments': dict(call.named)})}{CLOSE}"


def _read(body: str) -> ToolCall | Malformed:
    try:
        call = json.loads(body)
    except (ValueError, RecursionError) as error:
        return Malformed(reason=f"error : the call is not JSON ; {error}")
    if not isinstance(call, dict) or not isinstance(call.get("name"), str) or not isinstance(call.get("arguments", {}), dict):
        return Malformed(reason='error : write {"name": tool, "arguments": {...}}')
    return ToolCall(name=call["name"], named=call.get("arguments", {}))
