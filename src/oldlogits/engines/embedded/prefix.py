"""Which slot holds which tokens' keys and values.

`PrefixIndex`: entries of the current version, for every request. An index over blocks of tokens: a block's key is the hash
of its tokens chained with the key of the block before it, so one look-up finds a slot that holds the whole prefix. Tokens
are compared as well: a hash never decides alone.

`OwnSlots`: entries of older versions, each only for the next request of the trajectory that left them.

`FreeSlots`: which slot a request takes that goes on in none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

from oldlogits.core.trajectory import KV

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
    """The first `length` tokens are held by `slot`; length 0: no slot holds any. "mixed": not all by the current version."""

    slot: int
    length: int
    kv: KV = "fresh"


NO_MATCH = Match(slot=-1, length=0)


class PrefixIndex:
    """Tokens whose keys and values are valid, by slot, and the slots that hold a block, by its key."""

    def __init__(self, max_num_seqs: int) -> None:
        self._tokens: list[Sequence[int]] = [()] * max_num_seqs
        self._keys: list[Sequence[int]] = [()] * max_num_seqs
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
        start = num_blocks * BLOCK
        head, tail = tokens[:start], tokens[start : start + BLOCK]
        best = NO_MATCH
        for slot in sorted(self._holders[keys[num_blocks - 1]]):
            held = self._tokens[slot]
            longer = best.length - start + 1
            if longer > 0 and held[start : start + longer] != tail[:longer]:
                continue
            if held[:start] != head:  # two blocks with one hash
                continue
            best = Match(slot=slot, length=start + _common_prefix(tail, held[start : start + BLOCK]))
            if best.length == len(tokens):
                break
        return best


def _common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """The number of tokens that both begin with."""
    return next(
        (i for i, (one, other) in enumerate(zip(left, right, strict=False)) if one != other), min(len(left), len(right))
    )


class FreeSlots:
    """The slots that nobody decodes in. One that was freed less than `warm_steps` steps ago is taken last."""

    def __init__(self, num_slots: int, warm_steps: int) -> None:
        self._cool, self._warm_steps = set(range(num_slots)), warm_steps
        self._freed_at: dict[int, int] = {}  # of the warm ones, in the order in which they were freed

    def __contains__(self, slot: int) -> bool:
        return slot in self._cool or slot in self._freed_at

    def __len__(self) -> int:
        return len(self._cool) + len(self._freed_at)

    def free(self, slot: int, step: int) -> None:
        """The step frees a slot."""
        self._freed_at[slot] = step

    def take(self, slot: int) -> None:
        """A slot is in use."""
        self._cool.discard(slot)
        self._freed_at.pop(slot, None)

    def next(self, step: int) -> int:
        """The lowest slot that has cooled down; where there is none, the one that was freed first, of several the lowest."""
        while self._freed_at and step - next(iter(self._freed_at.values())) >= self._warm_steps:
            slot = next(iter(self._freed_at))
            del self._freed_at[slot]
            self._cool.add(slot)
        if self._cool:
            return min(self._cool)
        first = next(iter(self._freed_at.values()))
        return min(slot for slot, _ in takewhile(lambda freed: freed[1] == first, self._freed_at.items()))


class OwnSlots:
    """What trajectories have left in slots that nobody has taken since."""

    def __init__(self) -> None:
        self._left: dict[str, tuple[Match, Sequence[int]]] = {}  # by trajectory: where, and the tokens
        self._owners: dict[int, str] = {}  # by slot

    def leave(self, slot: int, trajectory: str, tokens: Sequence[int], kv: KV) -> None:
        """A trajectory's request has ended and left these tokens; "fresh": of the current version."""
        if trajectory in self._left:
            del self._owners[self._left[trajectory][0].slot]
        self._left[trajectory] = Match(slot=slot, length=len(tokens), kv=kv), tokens
        self._owners[slot] = trajectory

    def take(self, slot: int) -> None:
        """From now on the slot holds something else."""
        owner = self._owners.pop(slot, None)
        if owner is not None:
            del self._left[owner]

    def age(self) -> None:
        """The weights have changed."""
        self._left = {owner: (replace(match, kv="mixed"), tokens) for owner, (match, tokens) in self._left.items()}

    def clear(self) -> None:
        """Forget everything: no slot holds anything any more."""
        self._left.clear()
        self._owners.clear()

    def match(self, trajectory: str, tokens: Sequence[int]) -> Match:
        """What the trajectory left, if that begins `tokens` and is not all of the current version."""
        match, left = self._left.get(trajectory, (NO_MATCH, ()))
        return match if match.kv == "mixed" and tokens[: match.length] == left else NO_MATCH
