"""From messages to token ids, through the tokenizer's own chat template; what was sampled is never re-tokenised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Final, Literal, Protocol

from jinja2 import TemplateError

from oldlogits.core.errors import ConfigError

Message = Mapping[str, str]
"""``{"role": ..., "content": ...}``."""

_SENTINEL: Final = "SENTINEL7Q"
_NUM_CACHED: Final = 4096
"""Continuations that are kept: tool results repeat, and rendering a template costs more than an environment step."""


class ChatTokenizer(Protocol):
    """The part of a Hugging Face tokenizer that is used here."""

    eos_token_id: int | None
    added_tokens_decoder: Mapping[int, object]

    def apply_chat_template(
        self, conversation: Sequence[Message], *, tools: object, add_generation_prompt: bool, tokenize: Literal[False]
    ) -> str:
        """The conversation as text."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        """The text of token ids."""


class ChatFormat:
    """How one tokenizer writes a conversation.

    ``prompt_ids + sampled turn + continuation_ids + sampled turn + ...`` are the tokens of the whole conversation, where
    every sampled turn ends with its end-of-turn token.

    Args:
        tokenizer: A tokenizer with a chat template.

    Raises:
        ConfigError: The template does not write an assistant turn as its content followed by an end-of-turn token.
    """

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self._tokenizer = tokenizer
        after = self._after_turn([], add_generation_prompt=False)
        ids = self._encode(after)
        if not ids or ids[0] not in tokenizer.added_tokens_decoder:
            raise ConfigError(
                "the chat template does not end an assistant turn with a token of its own",
                got=repr(after),
                allowed="a template whose assistant turns are followed by one special token, such as <|im_end|>",
                fix="use an instruct model's chat template",
            )
        self.end_of_turn_id: Final[int] = ids[0]
        self._end_of_turn: Final = self._decode([ids[0]])
        for role in ("tool", "user"):
            self._after_turn([{"role": role, "content": "ok"}], add_generation_prompt=True)
        self._continuation = lru_cache(maxsize=_NUM_CACHED)(self._render_continuation)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Sampling a turn ends after any of these: the end-of-turn token, and the tokenizer's eos where it is another."""
        eos = self._tokenizer.eos_token_id
        return (self.end_of_turn_id,) if eos is None or eos == self.end_of_turn_id else (self.end_of_turn_id, eos)

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[object] = ()) -> list[int]:
        """The tokens up to the start of the next assistant turn."""
        return self._encode(self._render(messages, tools=list(tools) or None, add_generation_prompt=True))

    def continuation_ids(self, role: Literal["tool", "user"], content: str) -> list[int]:
        """The tokens between a sampled end-of-turn token and the start of the next assistant turn."""
        return list(self._continuation(role, content))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a sampled turn, its stop token left out."""
        kept = ids[:-1] if ids and ids[-1] in self.stop_ids else ids
        return self._decode(kept)

    def turn_ids(self, text: str) -> list[int]:
        """The tokens of an assistant turn that a demonstrator wrote, the end-of-turn token included."""
        return [*self._encode(text), self.end_of_turn_id]

    def _render_continuation(self, role: str, content: str) -> tuple[int, ...]:
        after = self._after_turn([{"role": role, "content": content}], add_generation_prompt=True)
        return tuple(self._encode(after.removeprefix(self._end_of_turn)))

    def _after_turn(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """What the template writes after the content of an assistant turn that `messages` follow."""
        dummy: list[Message] = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": _SENTINEL}]
        text = self._render([*dummy, *messages], tools=None, add_generation_prompt=add_generation_prompt)
        _, found, after = text.partition(_SENTINEL)
        if not found:
            raise ConfigError(
                "the chat template drops the content of assistant turns",
                got=repr(text),
                allowed="a template that writes the content of every message",
                fix="use another chat template",
            )
        return after.lstrip(" ")

    def _render(self, messages: Sequence[Message], *, tools: object, add_generation_prompt: bool) -> str:
        try:
            return self._tokenizer.apply_chat_template(
                messages, tools=tools, add_generation_prompt=add_generation_prompt, tokenize=False
            )
        except TemplateError as error:
            raise ConfigError(
                "the chat template refuses a conversation with tools",
                got=f"{type(error).__name__}: {error}",
                allowed="a template for system, user, assistant and tool messages",
                fix="use the chat template of a model that calls tools",
            ) from error

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
