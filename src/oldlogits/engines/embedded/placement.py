"""Which slot a request gets, and how much of it the cache holds already."""

from __future__ import annotations

from typing import Final

from torch import Tensor

from oldlogits.core.engine import trajectory_of
from oldlogits.engines.embedded.prefix import BLOCK, NO_MATCH, FreeSlots, Match, OwnSlots, PrefixIndex
from oldlogits.engines.embedded.slots import Request, RoutingCache

WARM_STEPS: Final = 64
"""A slot freed less than so many steps ago is taken last: its agent's next turn is expected to find it warm."""


class Placement:
    """The slots of one cache."""

    def __init__(self, cache: Tensor, routing: RoutingCache) -> None:
        self._cache, self._routing = cache, routing
        self.reset()

    def reset(self) -> None:
        """Forget all: nobody has a slot, and none holds anything."""
        num_slots = self._cache.shape[2]
        self._index, self._own, self._free = PrefixIndex(num_slots), OwnSlots(), FreeSlots(num_slots, WARM_STEPS)

    def can_place(self, request: Request) -> bool:
        """Whether a request has a slot, or there is one for it."""
        return request.slot >= 0 or len(self._free) > 0

    def find(self, request: Request) -> Match:
        """What the cache holds of a request: its trajectory's own older entries, else what requests share."""
        if request.sampling.prompt_logprobs:
            return NO_MATCH
        known = request.tokens[:-1]
        own = self._own.match(trajectory_of(request.id), known)
        return own if own.length else self._index.match(known, request.keys)

    def first_missing(self, request: Request, match: Match) -> list[int]:
        """The key of the first block of a request that no slot holds; empty if there is none, or entries of its own precede."""
        block = match.length // BLOCK
        return request.keys[block : block + 1] if match.kv == "fresh" else []

    def place(self, request: Request, match: Match, step: int) -> None:
        """Choose the request's slot, if it has none, and copy what was found to it."""
        if request.slot < 0:
            request.slot = self._choose(match, step)
            self._free.take(request.slot)
        slot, length = request.slot, match.length
        if length and slot != match.slot:
            self._cache[:, :, slot, :, :length] = self._cache[:, :, match.slot, :, :length]
            self._routing.copy(match.slot, slot, length)
        self._own.take(slot)
        self._index.hold(slot, request.tokens[:length] if match.kv == "fresh" else [], request.keys)

    def _choose(self, match: Match, step: int) -> int:
        """The slot of the match if it is free and holds nothing else; else the lowest slot that has cooled down."""
        if match.kv == "mixed" or (match.slot in self._free and self._index.length(match.slot) == match.length):
            return match.slot
        return self._free.next(step)

    def share(self, request: Request) -> None:
        """The slot of a request holds all of its tokens but the newest, of the current version: others may begin with them."""
        self._index.hold(request.slot, request.tokens[:-1], request.keys)

    def leave(self, request: Request, step: int, *, is_computed: bool) -> None:
        """A request frees its slot, which stays warm; `is_computed`: with the entries of all of its tokens but the newest."""
        if is_computed:
            if request.kv == "fresh":
                request.extend_keys()
                self.share(request)
            if trajectory := trajectory_of(request.id):
                self._own.leave(request.slot, trajectory, request.tokens[:-1], request.kv)
        self._free.free(request.slot, step)

    def age(self) -> None:
        """The weights have changed and all entries stay: each for the trajectory that left it."""
        self._index.clear()
        self._own.age()

    def clear(self) -> None:
        """No slot holds anything any more; requests keep theirs, and no old entry, finite or not, reaches a new sequence."""
        self._index.clear()
        self._own.clear()
        self._cache.zero_()
