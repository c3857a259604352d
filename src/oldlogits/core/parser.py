"""The seam of tool-call parsers: from the text of an assistant turn to the calls that it holds.

A parser never raises on what an agent can write: a call that cannot be read becomes a `Malformed`, whose reason the agent
is told.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol, runtime_checkable

from oldlogits.core.environment import JsonValue
from oldlogits.core.registry import Registry


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A call that the agent wrote, with arguments by position (text) or by name (JSON values)."""

    name: str
    positional: tuple[str, ...] = ()
    named: Mapping[str, JsonValue] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Malformed:
    """A call that cannot be run; the agent is told `reason`."""

    reason: str


class Parser(Protocol):
    """Reads calls. The class is named by the recipe and made without arguments."""

    def parse(self, text: str) -> Sequence[ToolCall | Malformed]:
        """Return the calls of a turn in their order; none: the turn is a plain message."""


@runtime_checkable
class WritingParser(Parser, Protocol):
    """A parser that writes calls as well, which demonstrations need."""

    def write(self, call: ToolCall) -> str:
        """Return the text that `parse` reads as this call."""


PARSERS: Final[Registry[type[Parser]]] = Registry(
    "tool-call parser",
    key="env.parser",
    builtin={
        "plain": "oldlogits.envs.parsers.plain:PlainParser",
        "hermes": "oldlogits.envs.parsers.hermes:HermesParser",
    },
    needs=("parse",),
)
"""What `env.parser` names."""
