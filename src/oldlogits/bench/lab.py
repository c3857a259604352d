"""One chain of versions, and what keeping it costs: bytes, encoding, switches and checkouts, in units of a memcpy.

    a round:  chain.step() -> memcpy, cast, encode, switches, checkout -> bytes

All times of a round are taken within a second or two and divided by that round's memcpy of all weights.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor

from oldlogits.versions import FlatWeights, Patch, PatchStore, apply, encode

WINDOW: Final = 10
"""How many versions the window holds whose bytes are shown."""
BF16: Final = torch.bfloat16


@dataclass(frozen=True, slots=True, kw_only=True)
class Seconds:
    """How long a piece of work took. `busy_s`: CPU time of the calling thread, or an accelerator's time between two events."""

    busy_s: float
    wall_s: float

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(busy_s=self.busy_s + other.busy_s, wall_s=self.wall_s + other.wall_s)

    def __sub__(self, other: Seconds) -> Seconds:
        return Seconds(busy_s=self.busy_s - other.busy_s, wall_s=self.wall_s - other.wall_s)

    def __mul__(self, factor: float) -> Seconds:
        return Seconds(busy_s=self.busy_s * factor, wall_s=self.wall_s * factor)


Clock = Callable[[Callable[[], object]], Seconds]
"""Runs a piece of work and says how long it took."""
Timed = Callable[[str, Callable[[], object]], None]
"""Runs a piece of work and keeps its time under a name."""


def clock_of(device: str) -> Clock:
    """Return the clock of a device."""
    return _thread_clock if torch.device(device).type == "cpu" else _event_clock


def _thread_clock(work: Callable[[], object]) -> Seconds:
    wall, busy = time.perf_counter(), time.thread_time()
    work()
    return Seconds(busy_s=time.thread_time() - busy, wall_s=time.perf_counter() - wall)


def _event_clock(work: Callable[[], object]) -> Seconds:
    begin, end = torch.Event("cuda", enable_timing=True), torch.Event("cuda", enable_timing=True)
    torch.accelerator.synchronize()
    wall = time.perf_counter()
    begin.record()
    work()
    end.record()
    torch.accelerator.synchronize()
    return Seconds(busy_s=begin.elapsed_time(end) / 1000, wall_s=time.perf_counter() - wall)


class Chain(Protocol):
    """A model that trains, so that every step makes a version."""

    @property
    def masters(self) -> Mapping[str, Tensor]:
        """Return the float32 weights by name; `step` changes them."""

    def step(self) -> None:
        """Take one optimizer step."""


class Lab:
    """Measures a chain of versions, round after round.

    Args:
        chain: The model whose steps make the versions.

    Attributes:
        resident: The copy in bf16 that patches are encoded from and applied to; the newest version between rounds.
        values: The shares of every round, by name.
        times: The times of every round, by name; of work that a round does several times, the median.
    """

    def __init__(self, chain: Chain) -> None:
        self.chain = chain
        self.resident = FlatWeights.of(chain.masters, dtype=BF16)
        self.old, self.scratch = (FlatWeights.empty(self.resident.layout, device=self.resident.device) for _ in range(2))
        self.store = PatchStore(dtype=BF16)
        self.store.publish(0, chain.masters)
        self.values: dict[str, list[float]] = defaultdict(list)
        self.times: dict[str, list[Seconds]] = defaultdict(list)
        self._clock = clock_of(str(self.resident.device))
        self._cold_bytes: list[int] = []

    def round(self) -> None:
        """Make one version more, and measure it."""
        self.chain.step()
        times: dict[str, list[Seconds]] = defaultdict(list)

        def timed(name: str, work: Callable[[], object]) -> None:
            times[name].append(self._clock(work))

        def memcpy() -> None:
            timed("memcpy", lambda: self.scratch.buffers[BF16].copy_(self.resident.buffers[BF16]))

        self.old.buffers[BF16].copy_(self.resident.buffers[BF16])
        memcpy()
        patch = self._encode(timed)
        memcpy()
        cold = self._switch(timed, patch)
        memcpy()
        self._checkout(timed)
        memcpy()
        self.also(timed, patch)
        for name, works in times.items():
            self.times[name].append(_middle(works))
        self._count(patch, len(cold))

    def also(self, timed: Timed, patch: Patch) -> None:
        """Measure more in the same round; a subclass may."""

    def _encode(self, timed: Timed) -> Patch:
        """Encode the next patch twice, and bring the resident copy to the new version."""
        masters, found = self.chain.masters, []
        for _ in range(2):
            timed("cast", lambda: _cast(masters, self.scratch.weights))
            timed("encode", lambda: found.append(encode(self.resident, masters)))
            if len(found) == 1:
                apply(self.resident, found, -1)
        return found[-1]

    def _switch(self, timed: Timed, patch: Patch) -> bytes:
        """Go there and back over one patch, from memory and from the cold tier."""
        packed: list[bytes] = []
        timed("pack", lambda: packed.append(patch.to_bytes("cold")))
        timed("switch", lambda: apply(self.resident, [patch], -1))
        timed("switch", lambda: apply(self.resident, [patch], 1))
        timed("switch.cold", lambda: apply(self.resident, [Patch.from_bytes(packed[0])], -1))
        timed("switch.cold", lambda: apply(self.resident, [Patch.from_bytes(packed[0])], 1))
        return packed[0]

    def _checkout(self, timed: Timed) -> None:
        """Publish to the store, then check the version before out and come back."""
        newest = self.store.versions[-1]
        timed("publish", lambda: self.store.publish(newest + 1, self.chain.masters))

        def checkout() -> None:
            for version in (newest, newest + 1):
                with self.store.checkout(version):
                    pass

        for _ in range(2):
            timed("checkout", checkout)

    def _count(self, patch: Patch, cold_bytes: int) -> None:
        full = self.resident.layout.num_bytes
        self._cold_bytes.append(cold_bytes)
        self.values["share.changed"].append(patch.share_changed)
        self.values["bytes.cold"].append(cold_bytes / full)
        self.values["bytes.memory"].append(patch.num_bytes / full)
        if len(self._cold_bytes) >= WINDOW:
            self.values["window.copy"].append(sum(self._cold_bytes[-WINDOW:]) / full)

    def net_encode(self) -> list[Seconds]:
        """Return the times of encoding without the cast to bf16, which every way of keeping versions has to make."""
        return [encode - cast for encode, cast in zip(self.times["encode"], self.times["cast"], strict=True)]


def ratios(works: Sequence[Seconds], per: Sequence[Seconds]) -> list[float]:
    """Divide the busy times of two works of the same rounds."""
    return [work.busy_s / unit.busy_s for work, unit in zip(works, per, strict=True)]


def _cast(masters: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
    for name, master in masters.items():
        into[name].copy_(master)


def _middle(works: list[Seconds]) -> Seconds:
    """Return the median of each clock."""
    return Seconds(busy_s=statistics.median(w.busy_s for w in works), wall_s=statistics.median(w.wall_s for w in works))
