"""Prompts that grow turn by turn: whoever sends one again keeps what it sent, and checks and writes what is new of it only."""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Sequence
from typing import Final, Generic, TypeVar

from oldlogits.core.errors import ConfigError
from oldlogits.core.trajectory import Ints

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

MOST_TOKENS: Final = 1 << 23
"""Tokens of all prompts that are kept, 4 bytes each: 128 conversations of 64,000."""


class Prompts(Generic[K, V]):
    """Prompts and what was made of them, by key; within `MOST_TOKENS` tokens, those used last."""

    def __init__(self) -> None:
        self._kept: dict[K, tuple[array[int], V]] = {}
        self._num_tokens = 0

    def keep(self, key: K, tokens: array[int], made: V) -> None:
        """Keep a prompt, which does not change any more; it takes the place of the one before it."""
        self.take(key)
        self._kept[key] = tokens, made
        self._num_tokens += len(tokens)
        while self._num_tokens > MOST_TOKENS:
            self.take(next(iter(self._kept)))

    def take(self, key: K) -> tuple[array[int], V] | None:
        """Return a prompt that is kept, and keep it no longer."""
        found = self._kept.pop(key, None)
        self._num_tokens -= 0 if found is None else len(found[0])
        return found

    def begun(self, key: K, tokens: array[int]) -> tuple[int, V] | None:
        """The length of the prompt that is kept, and what was made of it, where `tokens` begin with it."""
        kept = self._kept.get(key)
        return (len(kept[0]), kept[1]) if kept is not None and tokens[: len(kept[0])] == kept[0] else None


def flat(token_ids: Sequence[int]) -> array[int]:
    """Return token ids that nobody changes, 4 bytes each.

    Raises:
        ConfigError: One is none that a model can have.
    """
    if isinstance(token_ids, Ints):
        return token_ids.numbers
    try:
        return array("i", token_ids)
    except OverflowError as error:
        raise ConfigError(
            "a prompt has a number that is no token id",
            got=f"{max(token_ids, key=abs)}"[:80],
            allowed="0 to 2^31 - 1",
            fix="use the tokenizer that belongs to the model",
        ) from error
