"""The form of calls that a tokenizer describes itself, in its `response_template` (transformers' `parse_response`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Protocol, cast

from oldlogits.core.environment import JsonValue
from oldlogits.core.errors import ConfigError
from oldlogits.core.parser import Malformed, ToolCall
from oldlogits.envs.text import read_json, write_json

_REFUSED: Final = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)
"""What `parse_response` raises of a turn that does not have the form."""


class _Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that is used here."""

    eos_token: str | None

    def parse_response(self, response: str, *, prefix: str) -> Mapping[str, object]:
        """Read a turn as a message."""


class TemplateParser:
    """Reads the calls of a turn as the tokenizer says that its model writes them."""

    def __init__(self, tokenizer: _Tokenizer) -> None:
        self._tokenizer = tokenizer

    @classmethod
    def for_tokenizer(cls, tokenizer: object) -> TemplateParser:
        """Make the parser of a tokenizer.

        Raises:
            ConfigError: It has no `response_template`, or one that transformers cannot read.
        """
        got = getattr(tokenizer, "response_template", None)
        try:
            if got is None:
                raise ValueError("there is none")
            cast("_ParserMaker", tokenizer).get_response_parser(prefix="")
        except _REFUSED as error:
            raise ConfigError(
                "env.parser = 'template' needs a tokenizer with a response template",
                got=f"response_template = {got!s:.200}: {error}",
                allowed="a tokenizer whose tokenizer_config.json has a response_template that transformers reads",
                fix="name the form of the model's calls: env.parser = 'hermes', 'llama', 'qwen-coder', or a class of your own",
            ) from error
        return cls(cast(_Tokenizer, tokenizer))

    def parse(self, text: str) -> list[ToolCall | Malformed]:
        """Read the calls of a turn."""
        return self.split(text)[1]

    def split(self, text: str) -> tuple[str, list[ToolCall | Malformed]]:
        """Return what is said around the calls of a turn, and the calls.

        A template may want the token that ends a turn, which the text does not hold any more.
        """
        end, reason = self._tokenizer.eos_token or "", ""
        for ended in dict.fromkeys((text + end, text)):
            try:
                message = self._tokenizer.parse_response(ended, prefix="")
                calls = [_call(call) for call in cast("list[object]", message.get("tool_calls") or [])]
            except _REFUSED as error:
                reason = reason or " ".join(str(error).split())[:200]
            else:
                content = message.get("content")
                return (content.removesuffix(end).strip() if isinstance(content, str) else ""), calls
        return "", [Malformed(reason=f"error : the turn does not have the form of its model ; {reason}")]


class _ParserMaker(Protocol):
    def get_response_parser(self, *, prefix: str) -> object: ...


def _call(call: object) -> ToolCall | Malformed:
    """A call of a parsed message; arguments that are text may be so because the form has no types."""
    match call:
        case {"function": {"name": str(name), **given}}:
            arguments = given.get("arguments") or {}
            try:
                named: JsonValue = read_json(arguments if isinstance(arguments, str) else write_json(arguments))
            except ValueError as error:
                return Malformed(reason=f"error : the arguments are not JSON ; {error}")
            if isinstance(named, dict):
                texts = {key: value for key, value in named.items() if isinstance(value, str)}
                return ToolCall(name=name, named={key: v for key, v in named.items() if key not in texts}, texts=texts)
    return Malformed(reason="error : the call names no tool, or its arguments have no names")
