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
    """A call that the agent wrote.

    Args:
        name: The tool.
        positional: Arguments by position, as text.
        named: Arguments by name, as JSON values.
        texts: Arguments by name, as text: the form in which they are written has no types.
    """

    name: str
    positional: tuple[str, ...] = ()
    named: Mapping[str, JsonValue] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Malformed:
    """A call that cannot be run; the agent is told `reason`."""

    reason: str


class Parser(Protocol):
    """Reads calls. The class is named by the recipe and made without arguments, unless it is `MadeForTokenizer`."""

    def parse(self, text: str) -> Sequence[ToolCall | Malformed]:
        """Return the calls of a turn, without its thoughts, in their order; none: the turn is a plain message."""


@runtime_checkable
class MadeForTokenizer(Protocol):
    """A class of parsers whose form of calls the tokenizer decides."""

    def for_tokenizer(self, tokenizer: object) -> Parser:
        """Make the parser of a tokenizer (a class method); raises `ConfigError` where there is none."""


@runtime_checkable
class SplittingParser(Parser, Protocol):
    """A parser that tells the calls of a turn from what is said around them."""

    def split(self, text: str) -> tuple[str, Sequence[ToolCall | Malformed]]:
        """Return what is said around the calls of a turn, and the calls as `parse` does."""


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
        "llama": "oldlogits.envs.parsers.llama:LlamaParser",
        "qwen-coder": "oldlogits.envs.parsers.qwen_coder:QwenCoderParser",
        "template": "oldlogits.envs.parsers.template:TemplateParser",
    },
    needs=("parse",),
)
"""What `env.parser` names."""


def make_parser(name: str, tokenizer: object) -> Parser:
    """Make the parser that `env.parser` names, for the turns of a model with this tokenizer.

    Raises:
        ConfigError: There is no such parser, or the tokenizer has nothing that it could read turns by.
    """
    found = PARSERS.find(name)
    return found.for_tokenizer(tokenizer) if isinstance(found, MadeForTokenizer) else found()


def call_writer(name: str) -> WritingParser | None:
    """Return a writer of the calls that the parser `env.parser` reads; None where only the tokenizer or nobody knows how."""
    found = PARSERS.find(name)
    parser = None if isinstance(found, MadeForTokenizer) else found()
    return parser if isinstance(parser, WritingParser) else None


def split_turn(parser: Parser, text: str) -> tuple[str, Sequence[ToolCall | Malformed]]:
    """Return what is said around the calls of a turn, and the calls; a parser that does not tell has turns of either."""
    if isinstance(parser, SplittingParser):
        return parser.split(text)
    calls = parser.parse(text)
    return "" if calls else text.strip(), calls
