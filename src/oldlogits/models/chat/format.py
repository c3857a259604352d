"""From messages to token ids, through the tokenizer's own chat template; what was sampled is never re-tokenised.

template(messages with SENTINEL in place of somebody's words) -> what the template writes: its control tokens
template(messages)                                            -> the text; where it differs, there are the words
-> content.py encodes the text, the words without control tokens; both have the same ones, or it is an error
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, lru_cache, partial
from typing import Final

from oldlogits.core.environment import AS_IT_IS, ChatOptions
from oldlogits.core.errors import ConfigError
from oldlogits.core.trajectory import Ints
from oldlogits.models.chat.content import ContentEncoder, Span, most_bytes
from oldlogits.models.chat.once import Once
from oldlogits.models.chat.stand_ins import stand_ins, words_between
from oldlogits.models.chat.template import SENTINEL, ChatTokenizer, Message, Role, Said, Template

_NUM_CACHED: Final = 4096
"""Continuations that are kept: tool results repeat, and rendering a template costs more than an environment step."""
_NUM_TOOLSETS: Final = 256
"""Formats of other tools that are kept, where episodes have their own."""
_NUM_PROMPTS: Final = 64
"""Prompts that are kept: the members of a group begin alike, and beside those of other groups."""
_LARGEST_CACHED: Final = 256
"""Characters of the longest words whose continuation is kept: all that are kept are a million, and 50 MB of tokens at most."""


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
        ConfigError: The template does not write an assistant turn as its content followed by an end-of-turn token, drops
            something that the model must read, or changes what the model has read.
    """

    def __init__(
        self,
        tokenizer: ChatTokenizer,
        tools: Sequence[Mapping[str, object]] = (),
        system_prompt: str = "",
        options: ChatOptions = AS_IT_IS,
    ) -> None:
        self.tokenizer, self._encoder, self._system = tokenizer, ContentEncoder(tokenizer), system_prompt
        self._options, self._others = options, {json.dumps(list(tools)): self}  # formats of other tools, by these
        unknown = tokenizer.unk_token_id
        self.unknown_id: Final = -1 if unknown is None else unknown
        """The token of words that the tokenizer does not know; -1: it has none."""
        self.most_bytes: Final = most_bytes(tokenizer)
        self._template = Template(tokenizer, tools, options)
        lead, after = self._template.around_turn()
        self._around: Final = (" " if lead == " " else "", after[: len(after) - len(after.lstrip(" "))])
        """Spaces that the template writes before and after the content of an assistant turn."""
        ids = self._encoder.encode(after.lstrip(" "))
        if not self._encoder.control_ids(ids[:1]):
            raise ConfigError(
                "the chat template does not end an assistant turn with a token of its own",
                got=repr(after),
                allowed="a template whose assistant turns are followed by one special token, such as <|im_end|>",
                fix="use an instruct model's chat template",
            )
        self.end_of_turn_id: Final[int] = ids[0]
        eos = tokenizer.eos_token_id
        every_end = (ids[0], *(() if eos is None else (eos,)), *options.eos_ids)
        self.stop_ids: Final[tuple[int, ...]] = tuple(dict.fromkeys(every_end))
        """Sampling a turn ends after any of these: the end-of-turn token, and every eos of tokenizer and generation config."""
        self._end_of_turn: Final = self._decode([ids[0]])
        self._template.check(bool(system_prompt))
        self._check_system = cache(partial(self._template.check, True))
        self._between = cache(self._bare)
        self._kept = lru_cache(maxsize=_NUM_CACHED)(self._continue)
        self._prompts = Once(self._prompt, most=_NUM_PROMPTS)
        bare, control = self._between("user")
        self._head: Final = self._encoder.from_last_control(self._end_of_turn + bare)
        self._turns: Final = ContentEncoder(tokenizer, {*self.stop_ids, *control})

    def for_tools(self, tools: Sequence[Mapping[str, object]]) -> ChatFormat:
        """Give the same format for an environment with other tools; raises as when it was made."""
        key = json.dumps(list(tools))
        if (made := self._others.get(key)) is None:
            made = ChatFormat(self.tokenizer, tools, self._system, self._options)
            if len(self._others) >= _NUM_TOOLSETS:
                self._others.clear()
            self._others[key] = made
        return made

    def prompt_ids(self, opening: str | Sequence[Said], system: str | None = None) -> list[int]:
        """Give the tokens up to the start of the first sampled turn.

        Args:
            opening: What the user says first, or a conversation that begins and ends with a user; somebody's words.
            system: A system prompt in place of the environment's own, such as a row's; somebody's words. Empty: there is none.

        Raises:
            ContentError: These words cannot be encoded without control tokens.
            ConfigError: The template refuses them.
        """
        said: tuple[Said, ...] = (("user", opening),) if isinstance(opening, str) else tuple(opening)
        return list(self._prompts.get((said, system)))

    def _prompt(self, asked: tuple[tuple[Said, ...], str | None]) -> Ints:
        said, system = asked
        write, own = self._template.opening, self._system if system is None else system
        text = write(own, said)
        words = [_words(write(own, one), text) for one in _each_without(said)]
        bare = write(SENTINEL if system else own, [(role, SENTINEL) for role, _ in said])
        if system:
            self._check_system()
            words.append(_words(write(SENTINEL, said), text))
        words.sort()
        control = self._encoder.control_ids(self._encoder.encode(bare))
        anchor = self._end_of_turn
        return Ints(self._encoder.encode_around(text, words, control_ids=control, anchor=anchor, is_start=True))

    def conversation_ids(self, messages: Sequence[Message]) -> list[int]:
        """Give the tokens of a conversation that others have written, up to the start of the next assistant turn.

        Args:
            messages: All of them are somebody's words: contents, and arguments of calls.

        Raises:
            ContentError: The words cannot be encoded without control tokens.
            ConfigError: The template refuses the conversation, or drops a part of it.
        """
        if messages and messages[0]["role"] == "system":
            self._check_system()
        substitutes, words = stand_ins(messages)
        text, bare = self._template.conversation(messages), self._template.conversation(substitutes)
        control, spans = self._encoder.control_ids(self._encoder.encode(bare)), words_between(bare, text, words)
        return self._encoder.encode_around(text, spans, control_ids=control, anchor=self._end_of_turn, is_start=True)

    @property
    def writes_calls(self) -> bool:
        """Whether the template writes the calls of an assistant turn, with their arguments."""
        return SENTINEL in self.call_text("tool", {"argument": SENTINEL})

    def continuation_ids(self, said: Sequence[Said]) -> list[int]:
        """Give the tokens between a sampled end-of-turn token and the start of the next assistant turn.

        Args:
            said: What the environment says to the turn: the results of its calls in their order, or what a user says. Where
                the template cannot write two results after one another, they are one message.

        Raises:
            ContentError: The words cannot be encoded without control tokens.
            ConfigError: The template refuses them.
        """
        size = sum(len(content) for _, content in said)
        return list((self._kept if size <= _LARGEST_CACHED else self._continue)(tuple(said)))

    def decode(self, ids: Sequence[int]) -> str:
        """Give the text of a sampled turn, its stop token left out."""
        kept = ids[:-1] if ids and ids[-1] in self.stop_ids else ids
        return self._decode(kept)

    def turn_ids(self, text: str) -> list[int]:
        """Give the tokens of an assistant turn that a demonstrator wrote, the end-of-turn token included.

        It may hold control tokens of its own, such as the marks of a call, but none with which a turn begins or ends.
        """
        lead, gap = self._around
        words, said = [(len(lead), len(lead) + len(text))], f"{lead}{text}{gap}"
        return [
            *self._turns.encode_around(said, words, control_ids=(), anchor=self._head, is_start=False),
            self.end_of_turn_id,
        ]

    def call_text(self, name: str, arguments: Mapping[str, object]) -> str:
        """Give the assistant turn that the template writes for a call; empty where it writes none."""
        return self._template.call_text(name, arguments).partition(self._end_of_turn)[0]

    def _continue(self, said: tuple[Said, ...]) -> tuple[int, ...]:
        text, (bare, control) = self._after(said), self._between(*(role for role, _ in said))
        if len(said) == 1:
            words = [_words(bare, text)]
        else:
            words = sorted(_words(self._after(one), text) for one in _each_without(said))
        anchor = self._end_of_turn
        return tuple(self._encoder.encode_around(text, words, control_ids=control, anchor=anchor, is_start=False))

    def _bare(self, *roles: Role) -> tuple[str, list[int]]:
        """What the template writes between two turns around sentinels, and its control tokens."""
        bare = self._after([(role, SENTINEL) for role in roles])
        return bare, self._encoder.control_ids(self._encoder.encode_after(self._end_of_turn, bare))

    def _after(self, said: Sequence[Said]) -> str:
        """What the template writes after an end-of-turn token when this follows."""
        after = self._template.after_turn(said)
        return after.lstrip(" ").removeprefix(self._end_of_turn)

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _each_without(said: tuple[Said, ...]) -> Iterator[tuple[Said, ...]]:
    """The same messages, each time with the sentinel in place of one's words."""
    for i, (role, _) in enumerate(said):
        yield (*said[:i], (role, SENTINEL), *said[i + 1 :])


def _words(bare: str, text: str) -> Span:
    """Where `text` differs from what the template writes around the sentinel."""
    head, _, tail = bare.partition(SENTINEL)
    if text.startswith(head) and text.endswith(tail) and len(head) + len(tail) <= len(text):
        return len(head), len(text) - len(tail)
    start = _num_shared(bare, text)
    return start, len(text) - min(_num_shared(bare[::-1], text[::-1]), len(text) - start)


def _num_shared(a: str, b: str) -> int:
    """Characters with which both begin."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
