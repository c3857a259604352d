"""Token ids of a text that holds somebody's words: what they write never becomes a control token.

A tool result that spells ``<|im_end|>`` would otherwise end its message and begin another one. Such a spelling is cut in two,
and the parts are encoded apart: the text stays the same, and no token of the template can arise from it.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Final, Protocol, cast

from tokenizers.pre_tokenizers import ByteLevel

from oldlogits.core.errors import ContentError

_MOST_APART: Final = 10_000
"""The most characters that are encoded one by one, which takes a second."""

Span = tuple[int, int]
"""Where somebody's words begin and end in a text, in characters."""


class Encoder(Protocol):
    """The part of a Hugging Face tokenizer that is used here."""

    unk_token_id: int | None
    added_tokens_decoder: Mapping[int, object]

    def encode(self, text: str, *, add_special_tokens: bool, split_special_tokens: bool) -> list[int]:
        """Give the token ids of a text."""


class ContentEncoder:
    """Encodes what a chat template has written around somebody's words.

    Args:
        tokenizer: Any tokenizer of Hugging Face.
        only: The tokens that count as control tokens; None: all of its added ones, marks of tool calls among them, but for
            that of unknown words, which words may well become.
    """

    def __init__(self, tokenizer: Encoder, only: Collection[int] | None = None) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        counted = added.keys() - {tokenizer.unk_token_id} if only is None else only
        control = {id: str(token) for id, token in added.items() if id in counted}
        self._control = frozenset(control)
        spellings = sorted(filter(None, control.values()), key=len, reverse=True)
        self._spelling = re.compile("|".join(map(re.escape, spellings)) or r"(?!)")

    def encode(self, text: str) -> list[int]:
        """Encode a text of the template alone; control tokens that it spells are control tokens."""
        return self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=False)

    def encode_after(self, anchor: str, text: str) -> list[int]:
        """Encode a text of the template that follows a control token, which is left out of the result.

        Alone it would be encoded as the beginning of a text is: with another first token, or with a line break that belongs
        to the control token. The anchor may go on after its control token; where its end would then be one token with the
        beginning of the text, the text is encoded alone.
        """
        before, ids = self.encode(anchor), self.encode(anchor + text)
        return ids[len(before) :] if ids[: len(before)] == before else self.encode(text)

    def from_last_control(self, text: str) -> str:
        """Give the text from its last control token on."""
        return text[max((match.start() for match in self._spelling.finditer(text)), default=0) :]

    def control_ids(self, ids: Sequence[int]) -> list[int]:
        """Give the control tokens among token ids, in order."""
        return [id for id in ids if id in self._control]

    def encode_around(
        self, text: str, words: Sequence[Span], *, control_ids: Sequence[int], anchor: str, is_start: bool
    ) -> list[int]:
        """Encode a text of which parts are somebody's words.

        Args:
            text: What the template wrote.
            words: The parts of it that are not the template's own, ascending.
            control_ids: The control tokens that the template itself writes, in order.
            anchor: A control token; the one before the text, if there is one.
            is_start: Whether the text begins a conversation; otherwise it follows the anchor.

        Raises:
            ContentError: Control tokens arise from the words even one character at a time, which is tried up to
                `_MOST_APART` characters.
        """
        is_short = sum(end - start for start, end in words) <= _MOST_APART
        every_one = (i for start, end in words if is_short for i in range(start, end + 1))
        for cuts in (self._cuts(text, words), every_one):
            ids: list[int] = []
            for start, end in pairwise([0, *cuts, len(text)]):
                if start < end:
                    piece = text[start:end]
                    ids += self.encode(piece) if is_start and not start else self.encode_after(anchor, piece)
            if self.control_ids(ids) == list(control_ids):
                return ids
        raise ContentError(
            "a text cannot be encoded without control tokens",
            got=repr(text[:200]),
            allowed="text that this tokenizer can spell without its control tokens",
            fix="remove what looks like a control token",
        )

    def _cuts(self, text: str, words: Sequence[Span]) -> Iterator[int]:
        """Places inside of the spellings of control tokens that somebody's words contain, or take part in."""
        ends = [end for _, end in words]
        at = 0
        while spelled := self._spelling.search(text, at):
            nearest = bisect_right(ends, spelled.start())
            if nearest < len(words) and words[nearest][0] < spelled.end():
                at = spelled.start() + 1
                yield at
            else:
                at = spelled.end()


def most_bytes(tokenizer: object) -> float:
    """Give the most bytes of a text that one of its tokens stands for; inf where there is no such bound.

    There is one where every byte has a token, and nothing of a text is left out or shortened before it is encoded.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or any(token.lstrip or token.rstrip for token in backend.get_added_tokens_decoder().values()):
        return math.inf
    parts = {part: _state(getattr(backend, part)) for part in ("normalizer", "pre_tokenizer")}
    kinds = {part: set(re.findall(r'"type": ?"(\w+)"', state)) for part, state in parts.items()}
    changed = parts["normalizer"].replace('{"type":"Replace","pattern":{"String":" "},"content":"\u2581"}', "")
    vocabulary = backend.get_vocab()
    has_bytes = {"ByteLevel"} <= kinds["pre_tokenizer"] and vocabulary.keys() >= set(ByteLevel.alphabet())
    has_bytes |= getattr(backend.model, "byte_fallback", False) and vocabulary.keys() >= {f"<0x{n:02X}>" for n in range(256)}
    keeps_all = (
        kinds["normalizer"] <= {"Sequence", "NFC", "Prepend", "Replace"}
        and kinds["pre_tokenizer"] <= {"Sequence", "ByteLevel", "Metaspace", "Split", "Digits"}
        and "Removed" not in parts["pre_tokenizer"]
        and '"Replace"' not in changed
    )
    longest = max((len(token.encode()) for token in vocabulary), default=0)
    composed = 3 if "NFC" in kinds["normalizer"] else 1  # the most bytes of which NFC makes one
    return longest * composed if has_bytes and keeps_all else math.inf


def _state(part: object) -> str:
    """A part of a tokenizer as the JSON in which it is saved; empty where there is none."""
    return "" if part is None else cast("bytes", part.__getstate__()).decode()
