"""From messages to token ids, through the tokenizer's own chat template; what was sampled is never re-tokenised.

template(messages with SENTINEL in place of somebody's words) -> what the template writes: its control tokens
template(messages)                                            -> the text; where it differs, there are the words
-> models/content.py encodes the text, the words without control tokens; both have the same ones, or it is an error
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final, Literal, Protocol

from jinja2 import TemplateError

from oldlogits.core.errors import ConfigError
from oldlogits.models.content import ContentEncoder, Encoder, Span

Message = Mapping[str, str]
"""``{"role": ..., "content": ...}``."""

Role = Literal["tool", "user"]
Place = Literal["template", "system", "user"]

NAMES_ONLY: Final = "{#- oldlogits: tools by name -#}"
"""A template that holds this comment shows the names of tools and nothing else of them, and means to."""

_SENTINEL: Final = "SENTINEL7Q"
_SENTINEL_TOOL: Final = {
    "type": "function",
    "function": {
        "name": "SENTINEL7Qname",
        "description": "SENTINEL7Qdescription",
        "parameters": {
            "type": "object",
            "properties": {"SENTINEL7Qparameter": {"type": "string"}},
            "required": ["SENTINEL7Qparameter"],
        },
    },
}
_NUM_CACHED: Final = 4096
"""Continuations that are kept: tool results repeat, and rendering a template costs more than an environment step."""
_LARGEST_CACHED: Final = 4096
"""Characters of the longest words whose continuation is kept."""

_HOW_TO_FIX: Final = "set model.chat_tools = 'system' or 'user', or use the chat template of a model that calls tools"


class ChatTokenizer(Encoder, Protocol):
    """The part of a Hugging Face tokenizer that is used here."""

    eos_token_id: int | None
    chat_template: object

    def apply_chat_template(
        self,
        conversation: Sequence[Message],
        *,
        tools: object,
        add_generation_prompt: bool,
        tokenize: Literal[False],
        **options: object,
    ) -> str:
        """Write the conversation as text."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        """Give the text of token ids."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatOptions:
    """How conversations are written.

    Args:
        tools_in: Where tools are described. "template": the chat template does it. "system", "user": in the system message,
            or at the beginning of the first user message together with the system prompt, for templates without tools or
            without a system role; results of tools are then user messages.
        template_kwargs: Further variables of the template, such as ``enable_thinking``.
        eos_ids: Tokens besides the tokenizer's own eos that end a turn, as ``generation_config.json`` lists them.
    """

    tools_in: Place = "template"
    template_kwargs: Mapping[str, object] = field(default_factory=dict)
    eos_ids: tuple[int, ...] = ()


AS_IT_IS: Final = ChatOptions()
"""The template writes everything."""


class ChatFormat:
    """How one tokenizer writes the conversations of one environment.

    ``prompt_ids + sampled turn + continuation_ids + sampled turn + ...`` are the tokens of the whole conversation, where
    every sampled turn ends with its end-of-turn token.

    Args:
        tokenizer: A tokenizer with a chat template.
        tools: What the template is told of the tools: ``{"type": "function", "function": {...}}`` each.
        system_prompt: The environment's; its author's words, which may spell control tokens. Empty: there is none.
        options: How conversations are written.

    Raises:
        ConfigError: The template does not write an assistant turn as its content followed by an end-of-turn token, or drops
            something that the model must read.
    """

    def __init__(
        self,
        tokenizer: ChatTokenizer,
        tools: Sequence[Mapping[str, object]] = (),
        system_prompt: str = "",
        options: ChatOptions = AS_IT_IS,
    ) -> None:
        self._tokenizer, self._encoder = tokenizer, ContentEncoder(tokenizer)
        self._tools, self._system, self._options = list(tools), system_prompt, options
        after = self._after_turn([], add_generation_prompt=False)
        ids = self._encoder.encode(after)
        if not self._encoder.control_ids(ids[:1]):
            raise ConfigError(
                "the chat template does not end an assistant turn with a token of its own",
                got=repr(after),
                allowed="a template whose assistant turns are followed by one special token, such as <|im_end|>",
                fix="use an instruct model's chat template",
            )
        self.end_of_turn_id: Final[int] = ids[0]
        self._end_of_turn: Final = self._decode([ids[0]])
        self._check_shown()
        self._after = {role: self._after_turn([self._message(role, _SENTINEL)]) for role in ("tool", "user")}
        self._kept = lru_cache(maxsize=_NUM_CACHED)(self._continue)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Sampling a turn ends after any of these: the end-of-turn token, and every eos of tokenizer and generation config."""
        eos = self._tokenizer.eos_token_id
        return tuple(dict.fromkeys((self.end_of_turn_id, *(() if eos is None else (eos,)), *self._options.eos_ids)))

    def prompt_ids(self, opening: str, system: str | None = None) -> list[int]:
        """Give the tokens up to the start of the first assistant turn.

        Args:
            opening: What the user says first; somebody's words.
            system: A system prompt in place of the environment's own, such as a row's; somebody's words.

        Raises:
            ContentError: These words cannot be encoded without control tokens.
        """
        own = self._system if system is None else system
        text = self._render(self._opening(own, opening))
        words = [_words(self._render(self._opening(own, _SENTINEL)), text)]
        if system is not None:
            words = sorted([_words(self._render(self._opening(_SENTINEL, opening)), text), *words])
        bare = self._render(self._opening(own if system is None else _SENTINEL, _SENTINEL))
        control = self._encoder.control_ids(self._encoder.encode(bare))
        return self._encoder.encode_around(text, words, control_ids=control, anchor=self._end_of_turn, is_start=True)

    def continuation_ids(self, role: Role, content: str) -> list[int]:
        """Give the tokens between a sampled end-of-turn token and the start of the next assistant turn.

        Raises:
            ContentError: The content cannot be encoded without control tokens.
        """
        return list((self._kept if len(content) <= _LARGEST_CACHED else self._continue)(role, content))

    def decode(self, ids: Sequence[int]) -> str:
        """Give the text of a sampled turn, its stop token left out."""
        kept = ids[:-1] if ids and ids[-1] in self.stop_ids else ids
        return self._decode(kept)

    def turn_ids(self, text: str) -> list[int]:
        """Give the tokens of an assistant turn that a demonstrator wrote, the end-of-turn token included."""
        return [*self._encoder.encode(text), self.end_of_turn_id]

    def _continue(self, role: Role, content: str) -> tuple[int, ...]:
        bare, text = self._after[role], self._after_turn([self._message(role, content)])
        control = self._encoder.control_ids(self._encoder.encode_after(self._end_of_turn, bare))
        return tuple(
            self._encoder.encode_around(
                text, [_words(bare, text)], control_ids=control, anchor=self._end_of_turn, is_start=False
            )
        )

    def _opening(self, system: str, opening: str) -> list[Message]:
        """The messages before the first assistant turn, the tools among them where the template does not write them."""
        told = "\n\n".join(filter(None, [system, self._told_tools()]))
        if self._options.tools_in == "user":
            return [{"role": "user", "content": "\n\n".join(filter(None, [told, opening]))}]
        return [*([{"role": "system", "content": told}] if told else []), {"role": "user", "content": opening}]

    def _told_tools(self) -> str:
        """The tools in words; empty where there are none or the template writes them."""
        if self._options.tools_in == "template" or not self._tools:
            return ""
        lines = [json.dumps(tool["function"], ensure_ascii=False) for tool in self._tools]
        return "\n".join(["These tools can be called:", *lines])

    def _message(self, role: Role, content: str) -> Message:
        if role == "tool" and self._options.tools_in != "template":
            return {"role": "user", "content": f"Result of the call:\n{content}"}
        return {"role": role, "content": content}

    def _after_turn(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """What the template writes after the content of an assistant turn that `messages` follow; the end of turn left out."""
        dummy = [*self._opening("", "hi"), {"role": "assistant", "content": _SENTINEL}]
        text = self._render([*dummy, *messages], add_generation_prompt=add_generation_prompt)
        _, found, after = text.partition(_SENTINEL)
        if not found:
            raise _drops("the content of assistant turns", text)
        after = after.lstrip(" ")
        return after.removeprefix(self._end_of_turn) if messages else after

    def _check_shown(self) -> None:
        """Refuse a template that leaves out what the model must read."""
        text = self._render(
            self._opening(f"{_SENTINEL}system" if self._system else "", f"{_SENTINEL}user"), tools=_SENTINEL_TOOL
        )
        wanted = {"user messages": f"{_SENTINEL}user"}
        if self._system:
            wanted["the system message"] = f"{_SENTINEL}system"
        if self._tools and self._options.tools_in == "template":
            shown = ("name",) if NAMES_ONLY in str(self._tokenizer.chat_template) else ("name", "description", "parameter")
            wanted |= {f"the {part} of a tool": f"{_SENTINEL}{part}" for part in shown}
        for what, sentinel in wanted.items():
            if sentinel not in text:
                raise _drops(what, text)
        for role in ("tool", "user") if self._tools else ("user",):
            if _SENTINEL not in (after := self._after_turn([self._message(role, _SENTINEL)])):
                raise _drops("results of tools" if role == "tool" else "user messages", after)

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True, tools: object = None) -> str:
        of_template = [tools] if tools else self._tools
        try:
            return self._tokenizer.apply_chat_template(
                messages,
                tools=of_template if self._tools and self._options.tools_in == "template" else None,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **self._options.template_kwargs,
            )
        except (TemplateError, TypeError, KeyError) as error:
            raise ConfigError(
                "the chat template refuses a conversation with " + ", ".join(dict.fromkeys(m["role"] for m in messages)),
                got=f"{type(error).__name__}: {error}",
                allowed="a template for system, user, assistant and tool messages",
                fix=_HOW_TO_FIX,
            ) from error

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _words(bare: str, text: str) -> Span:
    """Where `text` differs from what the template writes around the sentinel."""
    head, _, tail = bare.partition(_SENTINEL)
    if text.startswith(head) and text.endswith(tail) and len(head) + len(tail) <= len(text):
        return len(head), len(text) - len(tail)
    start = _num_shared(bare, text)
    return start, len(text) - min(_num_shared(bare[::-1], text[::-1]), len(text) - start)


def _num_shared(a: str, b: str) -> int:
    """Characters with which both begin."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _drops(what: str, text: str) -> ConfigError:
    return ConfigError(
        f"the chat template drops {what}",
        got=repr(text[:400]),
        allowed="a template that writes all that the model must read",
        fix=_HOW_TO_FIX,
    )
