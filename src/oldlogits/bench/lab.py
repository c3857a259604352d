"""One chain of versions, and every way of keeping them, measured side by side.

    a round:  source.step() -> memcpy, cast, encode, switches, walks, checkout, load_state_dict -> bytes

All times of a round are taken within a second or two and divided by that round's memcpy.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Final, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from oldlogits.bench.clock import Seconds, clock_of
from oldlogits.bench.entropy import change
from oldlogits.bench.rows import Row, Subject
from oldlogits.versions import FlatWeights, Patch, PatchStore, apply, encode
from oldlogits.versions.patches.cold import pack

WINDOW: Final = 10
"""Versions of the window whose bytes are shown."""
WALK: Final = 4
"""Versions of a walk."""
BF16: Final = torch.bfloat16

Timed = Callable[[str, Callable[[], object]], None]
"""Does a piece of work and keeps its time under a name."""


class Source(Protocol):
    """Something that trains."""

    @property
    def masters(self) -> Mapping[str, Tensor]:
        """float32 by name; `step` changes them."""

    def step(self) -> None:
        """One optimizer step."""


class Lab:
    """Measures a chain of versions, round after round.

    Args:
        source: Makes the versions.
        subject: What the rows are about.
        compare_every: The slow yardsticks, entropy and XOR + zstd-1, are computed in one round of so many.

    Attributes:
        resident: The copy in bf16 that patches are encoded from and applied to; the newest version between rounds.
    """

    def __init__(self, source: Source, subject: Subject, *, compare_every: int) -> None:
        self._source, self._subject, self._compare_every = source, subject, compare_every
        self.resident = FlatWeights.of(source.masters, dtype=BF16)
        self._old, self._scratch = (FlatWeights.empty(self.resident.layout, device=self.resident.device) for _ in range(2))
        self._module = module_of(self.resident.weights)
        self._store = PatchStore(dtype=BF16)
        self._store.publish(0, source.masters)
        self._clock = clock_of(str(self.resident.device))
        self._patches: list[Patch] = []
        self._cold_bytes: list[int] = []
        self._times: dict[str, list[Seconds]] = defaultdict(list)
        self._values: dict[str, list[float]] = defaultdict(list)

    @property
    def shares(self) -> tuple[float, ...]:
        """Of every version, the share of its values that changed."""
        return tuple(self._values["share.changed"])

    @property
    def cold_shares(self) -> tuple[float, ...]:
        """Of every version, the bytes of its cold tier / bytes of a copy."""
        return tuple(self._values["bytes.cold"])

    def round(self) -> None:
        """One version more."""
        self._source.step()
        times: dict[str, list[Seconds]] = defaultdict(list)

        def timed(name: str, work: Callable[[], object]) -> None:
            times[name].append(self._clock(work))

        def memcpy() -> None:
            timed("memcpy", lambda: self._scratch.buffers[BF16].copy_(self.resident.buffers[BF16]))

        self._old.buffers[BF16].copy_(self.resident.buffers[BF16])
        memcpy()
        patch = self._encode(timed)
        memcpy()
        cold = self._switch(timed, patch)
        memcpy()
        self._walk(timed)
        memcpy()
        self._checkout(timed)
        memcpy()
        for name, works in times.items():
            self._times[name].append(_middle(works))
        self._count(patch, len(cold))

    def _encode(self, timed: Timed) -> Patch:
        """The next patch, encoded twice; the resident copy is brought to the new version."""
        masters, found = self._source.masters, []
        for _ in range(2):
            timed("cast", lambda: _cast(masters, self._scratch.weights))
            timed("encode", lambda: found.append(encode(self.resident, masters)))
            if len(found) == 1:
                apply(self.resident, found, -1)
        self._patches = [*self._patches, found[-1]][-WALK:]
        return found[-1]

    def _switch(self, timed: Timed, patch: Patch) -> bytes:
        """There and back over one patch, from memory and from the cold tier."""
        packed: list[bytes] = []
        timed("pack", lambda: packed.append(patch.to_bytes("cold")))
        timed("switch", lambda: apply(self.resident, [patch], -1))
        timed("switch", lambda: apply(self.resident, [patch], 1))
        timed("switch.cold", lambda: apply(self.resident, [Patch.from_bytes(packed[0])], -1))
        timed("switch.cold", lambda: apply(self.resident, [Patch.from_bytes(packed[0])], 1))
        return packed[0]

    def _walk(self, timed: Timed) -> None:
        """There and back over several patches: in one pass, and with a stop at each on the way there."""
        patches = self._patches
        if len(patches) < WALK:
            return

        def stops() -> None:
            for patch in reversed(patches):
                apply(self.resident, [patch], -1)
            apply(self.resident, patches, 1)

        timed("pass", lambda: apply(self.resident, patches, -1))
        timed("pass", lambda: apply(self.resident, patches, 1))
        timed("stops", stops)

    def _checkout(self, timed: Timed) -> None:
        """The store's way there and back, and that of full copies."""
        newest = self._store.versions[-1]
        timed("publish", lambda: self._store.publish(newest + 1, self._source.masters))

        def checkout() -> None:
            with self._store.checkout(newest):
                pass

        self._scratch.buffers[BF16].copy_(self.resident.buffers[BF16])
        for _ in range(2):
            timed("checkout", checkout)
            timed("load_state_dict", lambda: self._module.load_state_dict(self._old.weights))
            timed("load_state_dict", lambda: self._module.load_state_dict(self._scratch.weights))

    def _count(self, patch: Patch, cold_bytes: int) -> None:
        full = self.resident.layout.num_bytes
        self._cold_bytes.append(cold_bytes)
        found = {
            "share.changed": patch.share_changed,
            "share.dense": patch.dense_share,
            "bytes.cold": cold_bytes / full,
            "bytes.memory": patch.num_bytes / full,
        }
        if len(self._cold_bytes) % self._compare_every == 0:
            old, new = self._old.buffers[BF16], self.resident.buffers[BF16]
            xor_bytes = len(zstd_xor(old, new))
            found["bytes.entropy"] = change(old, new).entropy_share
            found["bytes.xor"] = xor_bytes / full
            found["bytes.of_xor"] = cold_bytes / xor_bytes
        if len(self._cold_bytes) >= WINDOW:
            window = sum(self._cold_bytes[-WINDOW:])
            found["window.copy"] = window / full
            found["window.ewma"] = window / (4 * self.resident.layout.num_values)
        for name, value in found.items():
            self._values[name].append(value)

    def rows(self) -> list[Row]:
        """All figures; call it after at least `WALK` rounds."""
        times, subject = self._times, self._subject
        memcpy, cast = times["memcpy"], times["cast"]
        net = [encode - cast for encode, cast in zip(times["encode"], cast, strict=True)]
        cold = [encode + pack for encode, pack in zip(net, times["pack"], strict=True)]
        walked = memcpy[WALK - 1 :]
        double = [work * 2 for work in times["load_state_dict"]]
        per_version = {name: [work * (1 / WALK) for work in times[name]] for name in ("pass", "stops")}
        return [
            *(subject.row(name, values) for name, values in self._values.items()),
            subject.ratios("switch.memory", times["switch"], memcpy),
            subject.ratios("switch.cold", times["switch.cold"], memcpy),
            subject.ratios("walk.pass", per_version["pass"], walked),
            subject.ratios("walk.stops", per_version["stops"], walked),
            subject.ratios("checkout", times["checkout"], double),
            subject.ratios("load_state_dict", times["load_state_dict"], memcpy),
            subject.ratios("encode.memory", net, memcpy),
            subject.ratios("encode.cold", cold, memcpy),
            subject.ratios("cast", cast, memcpy),
            subject.ratios("publish", times["publish"], memcpy),
            subject.milliseconds("memcpy", memcpy),
            subject.milliseconds("ms.switch", times["switch"]),
            subject.milliseconds("ms.encode", times["encode"]),
        ]


def module_of(weights: Mapping[str, Tensor]) -> nn.Module:
    """A module that holds copies of the weights under their names."""
    root = nn.Module()
    for name, weight in weights.items():
        *path, leaf = name.split(".")
        owner = root
        for part in path:
            if part not in dict(owner.named_children()):
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        owner.register_parameter(leaf, nn.Parameter(weight.clone(), requires_grad=False))
    return root


def zstd_xor(old: Tensor, new: Tensor) -> bytes:
    """What others send for a new version: the bits of both states XORed, then zstd at level 1."""
    flipped = old.view(torch.int16) ^ new.view(torch.int16)
    return pack("xor", flipped.cpu().numpy().view(np.uint8), "cold")[1]


def _cast(masters: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
    for name, master in masters.items():
        into[name].copy_(master)


def _middle(works: list[Seconds]) -> Seconds:
    """The median of each clock."""
    return Seconds(
        busy_s=statistics.median(work.busy_s for work in works), wall_s=statistics.median(work.wall_s for work in works)
    )
