"""What an environment answers, read as what it should be: a text, or a reward."""

from __future__ import annotations

from numbers import Real
from typing import Final, cast

from oldlogits.envs.text import readable
from oldlogits.rollout.environment_errors import EnvironmentFailed

MAX_REWARD: Final = 1e15
"""The largest reward: advantages and their gradients stay within float32, and rewards that differ by 1 stay different."""


def size_of(text: object) -> int:
    """The bytes of a text; 0 of anything else."""
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


def reward_of(value: object, giver: str = "get_reward") -> float:
    """What `get_reward` returned, if it is a number that training can work with; a scalar of numpy or torch is one."""
    number = value
    try:
        if not isinstance(value, Real) and callable(item := getattr(value, "item", None)):
            number = item()
        if isinstance(number, Real) and -MAX_REWARD <= cast(float, number) <= MAX_REWARD:
            return float(number)
    except (ValueError, TypeError, RuntimeError):  # an array of several numbers, in numpy's and torch's words
        pass
    raise EnvironmentFailed(
        f"{giver} returned {type(value).__name__} {_shortened(value)}, not a number within +-{MAX_REWARD:g}"
    )


def _shortened(value: object) -> str:
    """A value as it is printed, cut off; numbers of thousands of digits are not."""
    if isinstance(value, int) and abs(value) > MAX_REWARD:
        return f"of {value.bit_length()} bits"
    return " ".join(f"{value!r:.200}".split())
