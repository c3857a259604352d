"""How much memory the patches of a store may take, and what is done about it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from oldlogits.core.errors import StoreFullError
from oldlogits.versions.chain import Chain


@dataclass(slots=True, kw_only=True)
class StoreCounts:
    """What a store has done since it was made or opened.

    Args:
        num_switches: How often the resident copy was brought to another version.
        num_patches: Patches applied for that.
        num_cooled: Patches compressed after their time in the memory tier.
        num_spilled: Patches left on disk only.
        spilled_bytes: What they took in memory.
        num_waits: Publications that were held back until there was room.
        waited_s: Seconds in all.
        num_compactions: How often the log was written anew without what is no longer needed.
        num_failed_writes: How often the disk refused that, or a mark of what is needed; no version depends on these.
    """

    num_switches: int = 0
    num_patches: int = 0
    num_cooled: int = 0
    num_spilled: int = 0
    spilled_bytes: int = 0
    num_waits: int = 0
    waited_s: float = 0.0
    num_compactions: int = 0
    num_failed_writes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """The tiers of a store: newest patches raw, older ones compressed, the oldest on disk only where the budget asks for it.

    Args:
        hot: How many of the newest patches stay raw while there is room.
        budget_bytes: For all patches in memory; None: no bound.
        wait_s: How long a publication is held back where there is no disk.
    """

    hot: int
    budget_bytes: int | None
    wait_s: float

    def save(self, chain: Chain, counts: StoreCounts) -> None:
        """Compress what is no longer hot; over the budget compress all, then leave the oldest that lie on disk there only."""
        counts.num_cooled += chain.cool(self.hot)
        if self.budget_bytes is not None and chain.num_bytes > self.budget_bytes:
            counts.num_cooled += chain.cool(0)
            num_spilled, spilled_bytes = chain.spill(self.budget_bytes)
            counts.num_spilled += num_spilled
            counts.spilled_bytes += spilled_bytes

    def wait_for_room(self, room: threading.Condition, needed: Callable[[], int], counts: StoreCounts) -> float:
        """Wait until what is needed fits.

        Args:
            room: Notified whenever something was dropped; the caller has its lock, which is free while waiting.
            needed: Bytes of memory that are needed, compressed as far as can be.
            counts: Where a wait is noted.

        Returns:
            Seconds.

        Raises:
            StoreFullError: It does not fit within `wait_s`.
        """
        if self.budget_bytes is None or needed() <= self.budget_bytes:
            return 0.0
        started = time.monotonic()
        counts.num_waits += 1
        try:
            fits = room.wait_for(lambda: needed() <= (self.budget_bytes or 0), self.wait_s)
        finally:
            counts.waited_s += time.monotonic() - started
        if not fits:
            raise StoreFullError(
                "the versions that are needed do not fit the byte budget of the store",
                got=f"{needed():,} bytes of patches, compressed, after {self.wait_s:g} s",
                allowed=f"budget_bytes = {self.budget_bytes:,}",
                fix="call retain(oldest version in flight) earlier, raise budget_bytes, or give the store a folder",
            )
        return time.monotonic() - started
