"""Where somebody's words stand in what a chat template has written of a whole conversation.

bare   <user>SENTINEL7Q0Q<end> <assistant><call>{"SENTINEL7Q1Q": ""}</call><end> ...     the same messages, with stand-ins
text   <user>book it<end>      <assistant><call>{"seat": "4a"}</call><end> ...           between the same pieces: the words
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import count
from typing import Final, cast

from oldlogits.core.errors import ConfigError
from oldlogits.models.chat.content import Span
from oldlogits.models.chat.template import SENTINEL, Message

_STAND_IN: Final = re.compile(rf'\{{\s*"{SENTINEL}\d+Q":\s*""\s*\}}|{SENTINEL}\d+Q')
"""A text, or the arguments of a call as JSON."""


def stand_ins(messages: Sequence[Message]) -> tuple[list[Message], list[str]]:
    """Return the messages with a word of ours in place of every text and of all arguments of every call, and these texts.

    Of arguments the text is left empty: how it is written is the template's.
    """
    number = count()
    found: list[Message] = []
    words: list[str] = []
    for message in messages:
        content = str(message.get("content") or "")
        words += [content] if content else []
        bare: dict[str, object] = {**message, "content": f"{SENTINEL}{next(number)}Q" if content else ""}
        if calls := cast("Sequence[Mapping[str, Mapping[str, object]]]", message.get("tool_calls", ())):
            arguments: Sequence[object] = [{f"{SENTINEL}{next(number)}Q": ""} for _ in calls]
            pairs = zip(calls, arguments, strict=True)
            bare["tool_calls"] = [{**call, "function": {**call["function"], "arguments": words}} for call, words in pairs]
            words += [""] * len(calls)
        found.append(bare)
    return found, words


def words_between(bare: str, text: str, words: Sequence[str]) -> list[Span]:
    """Find the places of `text` where `bare`, which is the same otherwise, has a stand-in.

    Arguments that look like the piece behind them end early: what is left of them is then encoded as the template's own, and
    refused where it holds a control token.

    Raises:
        ConfigError: They differ elsewhere too: the template writes its own text otherwise for these words.
    """
    first, *pieces = _STAND_IN.split(bare)
    at, found = len(first), []
    if not text.startswith(first) or len(pieces) != len(words):
        raise _rewritten(first, text)
    for word, piece in zip(words, pieces, strict=True):
        as_they_are = (at + len(w) for w in (word, word.strip()) if w and text.startswith(w + piece, at))
        end = next(as_they_are, text.find(piece, at) if piece else len(text))
        if end < at:
            raise _rewritten(piece, text[at:])
        found.append((at, end))
        at = end + len(piece)
    if at != len(text):
        raise _rewritten(bare[-200:], text[at:])
    return found


def _rewritten(piece: str, text: str) -> ConfigError:
    return ConfigError(
        "the chat template writes its own text otherwise for some words",
        got=f"{text[:200]!r} where it writes {piece[:200]!r} for others",
        allowed="a template that writes words as they are",
        fix="set model.chat_tools = 'system' or 'user', or send messages without thoughts",
    )
