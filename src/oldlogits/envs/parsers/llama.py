"""``{"name": ..., "parameters": {...}}``, bare or behind ``<|python_tag|>``: how Llama 3.1 and its successors write calls."""

from __future__ import annotations

import json
import re
from typing import Final

from oldlogits.core.environment import JsonValue
from oldlogits.core.parser import Malformed, ToolCall
from oldlogits.envs.text import read_json, write_json

MARK: Final = "<|python_tag|>"
_WRITE: Final = 'error : write {"name": tool, "parameters": {...}}'
_BETWEEN: Final = re.compile(rf"(?:[\s;,]|{re.escape(MARK)})*")
_FIRST_KEY: Final = re.compile(r'\{\s*"(?:name|type)"\s*:')


class LlamaParser:
    """Reads a turn that is calls, one after the other, and what follows a mark; other JSON is a message."""

    def parse(self, text: str) -> list[ToolCall | Malformed]:
        """Read the calls of a turn.

        Example:
            >>> LlamaParser().parse('{"name": "cancel", "parameters": {"order": "o17"}}')[0].named
            {'order': 'o17'}
        """
        return self.split(text)[1]

    def split(self, text: str) -> tuple[str, list[ToolCall | Malformed]]:
        """Return what is said before the calls of a turn, and the calls."""
        whole = text.strip()
        is_bare = bool(_FIRST_KEY.match(whole))
        said, mark, rest = ("", "", whole) if is_bare else whole.partition(MARK)
        calls = _calls(rest.lstrip()) if is_bare or mark else []
        if not mark and not any(calls):
            return whole, []
        return said.strip(), [call or Malformed(reason=_WRITE) for call in calls]

    def write(self, call: ToolCall) -> str:
        """Write a call whose arguments are all named."""
        return write_json({"name": call.name, "parameters": dict(call.named)})


def _calls(body: str) -> list[ToolCall | Malformed | None]:
    """The JSON values of a text as calls; None: one that does not look like a call."""
    calls: list[ToolCall | Malformed | None] = []
    at, decoder = 0, json.JSONDecoder()
    while at < len(body) or not calls:
        try:
            _, end = decoder.raw_decode(body, at)
            calls.append(_call(read_json(body[at:end])))
        except (ValueError, RecursionError) as error:
            said = "it is nested too deep" if isinstance(error, RecursionError) else str(error)
            return [*calls, Malformed(reason=f"error : the call is not JSON ; {said}")]
        between = _BETWEEN.match(body, end)
        at = between.end() if between else end
    return calls


def _call(value: JsonValue) -> ToolCall | Malformed | None:
    match value:
        case {"name": str(name), "parameters": dict(named), **others} if others in ({}, {"type": "function"}):
            return ToolCall(name=name, named=named)
        case {"name": str(name), "arguments": dict(named), **others} if others in ({}, {"type": "function"}):
            return ToolCall(name=name, named=named)
        case {"name": _, "parameters": _} | {"name": _, "arguments": _}:
            return Malformed(reason=_WRITE)
    return None
