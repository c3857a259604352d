"""The product's lab with the yardsticks beside it: walks over several versions, load_state_dict, entropy, XOR + zstd."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Final, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.versions.entropy import change
from benchmarks.versions.rows import Row, Seconds, Subject
from oldlogits.bench.lab import BF16, Chain, Lab
from oldlogits.versions import Patch, apply
from oldlogits.versions.patches.patch import pack

T = TypeVar("T")

WALK: Final = 4
"""How many versions a walk passes."""


class ComparedLab(Lab):
    """Measures a chain of versions and, beside it, what else could be done.

    Args:
        chain: The model whose steps make the versions.
        subject: What the rows are about.
        compare_every: The slow yardsticks, entropy and XOR + zstd-1, are computed in one round of so many.
    """

    def __init__(self, chain: Chain, subject: Subject, *, compare_every: int) -> None:
        super().__init__(chain)
        self._subject, self._compare_every = subject, compare_every
        self._module = module_of(self.resident.weights)
        self._patches: list[Patch] = []
        self._num_rounds = 0

    def timed(self, name: str, work: Callable[[], T]) -> T:
        """Keep the wall time of a piece of work as well."""
        started = time.perf_counter()
        result = super().timed(name, work)
        self.samples[f"{name} (wall)"].append(time.perf_counter() - started)
        return result

    def measure(self) -> Patch:
        """Walk over the last versions, load whole states, and compare the bytes with other codes, in the same round."""
        patch = super().measure()
        self._num_rounds += 1
        self._patches = [*self._patches, patch][-WALK:]
        self._walk()
        self.memcpy()
        for _ in range(2):
            self.timed("load_state_dict", lambda: self._module.load_state_dict(self.old.weights))
            self.timed("load_state_dict", lambda: self._module.load_state_dict(self.scratch.weights))
        if self._num_rounds % self._compare_every == 0:
            full = self.resident.layout.num_bytes
            old, new = self.old.buffers[BF16], self.resident.buffers[BF16]
            xor_bytes = len(zstd_xor(old, new))
            self.values["bytes.entropy"].append(change(old, new).entropy_share)
            self.values["bytes.xor"].append(xor_bytes / full)
            self.values["bytes.of_xor"].append(len(patch.to_bytes("cold")) / xor_bytes)
        return patch

    def _walk(self) -> None:
        """Go there and back over several patches: in one pass, and with a stop at each on the way there."""
        patches = self._patches
        if len(patches) < WALK:
            return

        def stops() -> None:
            for patch in reversed(patches):
                apply(self.resident, [patch], -1)
            apply(self.resident, patches, 1)

        self.timed("pass", lambda: apply(self.resident, patches, -1))
        self.timed("pass", lambda: apply(self.resident, patches, 1))
        self.timed("stops", stops)

    def rows(self) -> list[Row]:
        """Return all figures; call it after at least `WALK` rounds."""
        names, subject = [name for name in self.times if not name.endswith(" (wall)")], self._subject
        times = {name: self._seconds(name) for name in names}
        memcpy, cast = times["memcpy"], times["cast"]
        net = [encode - cast for encode, cast in zip(times["encode"], cast, strict=True)]
        cold = [encode + pack for encode, pack in zip(net, times["pack"], strict=True)]
        walked = memcpy[WALK - 1 :]
        double = [work * 2 for work in times["load_state_dict"]]
        per_version = {name: [work * (1 / WALK) for work in times[name]] for name in ("pass", "stops")}
        # ten versions beside one fp32 average: its values take twice the bytes of bf16
        averages = [share / 2 for share in self.values["window.copy"]]
        values = {**self.values, **({"window.ewma": averages} if averages else {})}
        return [
            *(subject.row(name, samples) for name, samples in values.items() if samples),
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

    def _seconds(self, name: str) -> list[Seconds]:
        """The times of every round on both clocks."""
        pairs = zip(self.times[name], self.times[f"{name} (wall)"], strict=True)
        return [Seconds(busy_s=busy_s, wall_s=wall_s) for busy_s, wall_s in pairs]


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
    return pack(flipped.cpu().numpy().view(np.uint8), "cold")
