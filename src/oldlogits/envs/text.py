"""Text that goes between a model and the world: JSON that can be trusted to be plain, and text that can be encoded."""

from __future__ import annotations

import json
import re
from typing import Final, cast

from oldlogits.core.environment import JsonValue

MAX_DEPTH: Final = 64
"""Arrays and objects inside of each other that a value may have."""

_END: Final = "</think>"
_LONE_SURROGATE: Final = re.compile("[\ud800-\udfff]")


def read_json(text: str) -> JsonValue:
    """Read a JSON value that everything behind this door can work with.

    Raises:
        ValueError: It is no JSON; it is nested more than `MAX_DEPTH` deep; it has a number that no float holds, such as NaN or
            1e999; or a text that is no Unicode, such as half of a surrogate pair.
    """
    try:
        value = json.loads(text)
        if _depth(value) > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except RecursionError:
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep") from None
    except UnicodeEncodeError:
        raise ValueError("a text in it is no Unicode") from None
    return cast(JsonValue, value)


def write_json(value: object) -> str:
    """Write a value as the JSON that a model reads: characters as they are, not as escapes."""
    return json.dumps(value, ensure_ascii=False)


def spoken(text: str) -> str:
    """Return what an assistant turn says aloud: all but its thoughts, ``<think>...</think>``.

    Where only one of the marks is there, the other one was in the prompt or was not written any more.

    Example:
        >>> spoken("<think>perhaps</think>yes"), spoken("perhaps</think>yes"), spoken("yes<think>perhaps")
        ('yes', 'yes', 'yes')
    """
    first, *others = text.split("<think>")
    return first.rpartition(_END)[2] + "".join(part.rpartition(_END)[2] for part in others if _END in part)


def readable(text: str) -> str:
    """Return the text with U+FFFD in place of what no encoding can write: halves of surrogate pairs."""
    return _LONE_SURROGATE.sub("\ufffd", text)


def _depth(value: object) -> int:
    """How many arrays and objects are inside of each other; without recursion."""
    depth, level = 0, [value]
    while level := [v for v in level if isinstance(v, dict | list)]:
        depth += 1
        level = [inner for v in level for inner in (v.values() if isinstance(v, dict) else v)]
    return depth
