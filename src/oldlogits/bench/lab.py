"""One chain of versions, and what keeping it costs: bytes, encoding, switches and checkouts, beside a memcpy.

    a round:  chain.step() -> memcpy, cast, encode, switches, checkout -> bytes

All times of a round are taken within a second or two, to be divided by that round's memcpy of all weights.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Final, Protocol, TypeVar

import torch
from torch import Tensor

from oldlogits.versions import FlatWeights, Patch, PatchStore, apply, encode

T = TypeVar("T")

WINDOW: Final = 10
"""How many versions the window holds whose bytes are shown."""
BF16: Final = torch.bfloat16


def time_busy(work: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """Run a piece of work; return its result, and the seconds of CPU time of this thread, or of the accelerator's time."""
    if device.type == "cpu":
        started = time.thread_time()
        return work(), time.thread_time() - started
    begin, end = torch.Event("cuda", enable_timing=True), torch.Event("cuda", enable_timing=True)
    torch.accelerator.synchronize()
    begin.record()
    result = work()
    end.record()
    torch.accelerator.synchronize()
    return result, begin.elapsed_time(end) / 1000


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
        times: Seconds of every round, by name; of work that a round does several times, the median.
    """

    def __init__(self, chain: Chain) -> None:
        self.chain = chain
        self.resident = FlatWeights.of(chain.masters, dtype=BF16)
        self.old, self.scratch = (FlatWeights.empty(self.resident.layout, device=self.resident.device) for _ in range(2))
        self.store = PatchStore(dtype=BF16)
        self.store.publish(0, chain.masters)
        self.values: dict[str, list[float]] = defaultdict(list)
        self.times: dict[str, list[float]] = defaultdict(list)
        self.samples: dict[str, list[float]] = defaultdict(list)

    def round(self) -> None:
        """Make one version more, and measure it."""
        self.chain.step()
        self.samples.clear()
        self.measure()
        for name, seconds in self.samples.items():
            self.times[name].append(statistics.median(seconds))

    def timed(self, name: str, work: Callable[[], T]) -> T:
        """Run a piece of work, and keep its time among the round's under a name."""
        result, seconds = time_busy(work, self.resident.device)
        self.samples[name].append(seconds)
        return result

    def measure(self) -> Patch:
        """Keep the new version in every way; a subclass may measure more. Returns the patch that leads to it."""
        self.old.buffers[BF16].copy_(self.resident.buffers[BF16])
        self.memcpy()
        patch = self._encode()
        self.memcpy()
        packed = self.timed("pack", lambda: patch.to_bytes("cold"))
        self.timed("switch", lambda: apply(self.resident, [patch], -1))
        self.timed("switch", lambda: apply(self.resident, [patch], 1))
        self.timed("switch.cold", lambda: apply(self.resident, [Patch.from_bytes(packed)], -1))
        self.timed("switch.cold", lambda: apply(self.resident, [Patch.from_bytes(packed)], 1))
        self.memcpy()
        self._checkout()
        self.memcpy()
        full, cold = self.resident.layout.num_bytes, self.values["bytes.cold"]
        cold.append(len(packed) / full)
        self.values["share.changed"].append(patch.share_changed)
        self.values["bytes.memory"].append(patch.num_bytes / full)
        if len(cold) >= WINDOW:
            self.values["window.copy"].append(sum(cold[-WINDOW:]))
        return patch

    def memcpy(self) -> None:
        """Copy all weights."""
        self.timed("memcpy", lambda: self.scratch.buffers[BF16].copy_(self.resident.buffers[BF16]))

    def _encode(self) -> Patch:
        """Encode the next patch twice, and bring the resident copy to the new version."""
        masters = self.chain.masters
        for is_last in (False, True):
            self.timed("cast", lambda: _cast(masters, self.scratch.weights))
            patch = self.timed("encode", lambda: encode(self.resident, masters))
            if not is_last:
                apply(self.resident, [patch], -1)
        return patch

    def _checkout(self) -> None:
        """Publish to the store, then check the version before out and come back."""
        newest = self.store.versions[-1]
        self.timed("publish", lambda: self.store.publish(newest + 1, self.chain.masters))

        def checkout() -> None:
            for version in (newest, newest + 1):
                with self.store.checkout(version):
                    pass

        for _ in range(2):
            self.timed("checkout", checkout)


def _cast(masters: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
    for name, master in masters.items():
        into[name].copy_(master)
