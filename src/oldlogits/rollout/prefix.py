"""Which slot holds which tokens' keys and values: an index over blocks of tokens.

A block's key is the hash of its tokens chained with the key of the block before it, so one look-up finds a slot
that holds the whole prefix. Tokens are compared as well: a hash never decides alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

BLOCK = 16
"""Tokens per block."""


def chain_keys(tokens: Sequence[int], known: Sequence[int] = ()) -> list[int]:
    """The chained keys of the full blocks of `tokens`; `known` are the keys of its first blocks."""
    keys = list(known)
    key = keys[-1] if keys else 0
    for start in range(len(keys) * BLOCK, len(tokens) - BLOCK + 1, BLOCK):
        key = hash((key, *tokens[start : start + BLOCK]))
        keys.append(key)
    return keys


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """The first `length` tokens are held by `slot`; length 0: no slot holds any."""

    slot: int
    length: int


NO_MATCH = Match(slot=-1, length=0)


class PrefixIndex:
    """Tokens whose keys and values are valid, by slot, and the slots that hold a block, by its key."""

    def __init__(self, num_slots: int) -> None:
        self._tokens: list[Sequence[int]] = [()] * num_slots
        self._keys: list[Sequence[int]] = [()] * num_slots
        self._holders: dict[int, set[int]] = {}

    def length(self, slot: int) -> int:
        """The number of tokens that the slot is known to hold."""
        return len(self._tokens[slot])

    def hold(self, slot: int, tokens: Sequence[int], keys: Sequence[int]) -> None:
        """From now on the slot holds exactly these tokens; `keys` starts with the keys of their full blocks."""
        for key in self._keys[slot]:
            holders = self._holders[key]
            holders.discard(slot)
            if not holders:
                del self._holders[key]
        self._tokens[slot], self._keys[slot] = tokens, keys[: len(tokens) // BLOCK]
        for key in self._keys[slot]:
            self._holders.setdefault(key, set()).add(slot)

    def clear(self) -> None:
        """Forget everything: the weights have changed."""
        self._tokens = [()] * len(self._tokens)
        self._keys = [()] * len(self._keys)
        self._holders.clear()

    def match(self, tokens: Sequence[int], keys: Sequence[int]) -> Match:
        """The longest prefix of `tokens`, of at least one full block, that a slot holds.

        Among the slots that hold as many full blocks, the one with the longest common prefix, then the lowest.
        """
        num_blocks = len(keys)
        while num_blocks and keys[num_blocks - 1] not in self._holders:
            num_blocks -= 1
        if not num_blocks:
            return NO_MATCH
        best = NO_MATCH
        for slot in sorted(self._holders[keys[num_blocks - 1]]):
            length = _common_prefix(tokens, self._tokens[slot], num_blocks * BLOCK)
            if length > best.length:
                best = Match(slot=slot, length=length)
            if length == len(tokens):
                break
        return best


def _common_prefix(left: Sequence[int], right: Sequence[int], expected: int) -> int:
    """The length of the common prefix, 0 if it is below `expected` (two blocks with one hash)."""
    if left[:expected] != right[:expected]:
        return 0
    end = min(len(left), len(right))
    return next((i for i in range(expected, end) if left[i] != right[i]), end)
