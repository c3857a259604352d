"""What an environment answers, read as what it should be: a text, or a reward."""

from __future__ import annotations

from numbers import Real
from typing import Final, cast

from oldlogits.envs.text import readable
from oldlogits.models.chat.template import Said
from oldlogits.rollout.environment_errors import EnvironmentFailed

MAX_REWARD: Final = 1e15
"""The largest reward: advantages and their gradients stay within float32, and rewards that differ by 1 stay different."""


def size_of(text: object) -> int:
    """The bytes of a text, or of all texts of messages; 0 of anything else."""
    if isinstance(text, list | tuple):
        return sum(map(size_of, text))
    if isinstance(text, dict):
        return sum(map(size_of, text.values()))
    if not isinstance(text, str):
        return 0
    return len(text) if text.isascii() else len(text.encode(errors="replace"))


def text_of(method: str, value: object) -> str | None:
    """What a method of the environment returned, if it is a text or None."""
    if value is None:
        return None
    if isinstance(value, str):
        return readable(value)
    raise EnvironmentFailed(f"{method} returned {type(value).__name__}, not text or None")


def words_of(method: str, value: object) -> str:
    """The same, where None is an empty text."""
    return text_of(method, value) or ""


def opening_of(value: object) -> tuple[str | None, list[Said]]:
    """What `reset` returned: the system message that it names, and what is said before the first turn.

    A text is what the user says; a list is the messages of a conversation that begins and ends with a user.
    """
    if not isinstance(value, list | tuple):
        return None, [("user", words_of("reset", value))]
    said = [_message_of(one) for one in value]
    system = said.pop(0)[1] if said and said[0][0] == "system" else None
    roles = [role for role, _ in said]
    if "system" in roles or not roles or (roles[0], roles[-1]) != ("user", "user"):
        raise EnvironmentFailed(
            f"reset returned messages of {' '.join(roles) or 'nobody'}, not from one user's to another user's"
        )
    return system, cast("list[Said]", said)


def _message_of(value: object) -> tuple[str, str]:
    """A message that `reset` returned; content may be a list of texts, as of ``{"type": "text", "text": ...}``."""
    match value:
        case {"role": "system" | "user" | "assistant" as role, "content": str(content)}:
            return role, readable(content)
        case {"role": "system" | "user" | "assistant" as role, "content": [*parts]}:
            texts = [part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str)]
            if len(texts) == len(parts):
                return role, readable("".join(texts))
    raise EnvironmentFailed(f"reset returned {_shortened(value)}, not a message of system, user or assistant with a text")


def reward_of(value: object, method: str = "get_reward") -> float:
    """What a method returned as a reward, if it is a number that training can work with; a scalar of numpy or torch is one."""
    number = value
    try:
        if not isinstance(value, Real) and callable(item := getattr(value, "item", None)):
            number = item()
        if isinstance(number, Real) and -MAX_REWARD <= cast(float, number) <= MAX_REWARD:
            return float(number)
    except (ValueError, TypeError, RuntimeError):  # an array of several numbers, in numpy's and torch's words
        pass
    raise EnvironmentFailed(
        f"{method} returned {type(value).__name__} {_shortened(value)}, not a number within +-{MAX_REWARD:g}"
    )


def rewards_of_group(value: object, num: int) -> list[float]:
    """What a function of a group returned, if it is one reward for each of its episodes."""
    found = value.tolist() if callable(getattr(value, "tolist", None)) else value  # type: ignore[attr-defined]
    if not isinstance(found, list | tuple) or len(found) != num:
        raise EnvironmentFailed(f"the group reward returned {_shortened(value)}, not {num} numbers")
    return [reward_of(one, "the group reward") for one in found]


def _shortened(value: object) -> str:
    """A value as it is printed, cut off; numbers of thousands of digits are not."""
    if isinstance(value, int) and abs(value) > MAX_REWARD:
        return f"of {value.bit_length()} bits"
    return " ".join(f"{value!r:.200}".split())
