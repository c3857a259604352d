"""What a version must cost at least, if neither place nor size of a change can be foreseen."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

WORDS: Final = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The signed integers of each number of bytes."""
_CHUNK: Final = 1 << 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """How one state differs from another.

    Args:
        num_values: Values of a state.
        num_changed: Values whose bits differ.
        value_bits: Entropy of the wrapping difference of the changed values, in bits per changed value.
        num_bytes: Bytes of a state.
    """

    num_values: int
    num_changed: int
    value_bits: float
    num_bytes: int

    @property
    def share(self) -> float:
        """Share of the values that changed."""
        return self.num_changed / self.num_values

    @property
    def entropy_share(self) -> float:
        """The bound on the bytes of a version, as a share of a copy.

        ``(n H(p) + changed H(difference)) / 8`` bytes: places drawn independently with probability p, differences from
        their own distribution. A code that uses what it knows of the weights' sizes could be shorter.

        Example:
            n = 4 bf16 values, 1 changed: H(1/4) = .811 bits; (4 * .811 + 0) / 8 = .406 of 8 bytes: .0507.
        """
        return (self.num_values * binary_entropy(self.share) + self.num_changed * self.value_bits) / 8 / self.num_bytes


def binary_entropy(p: float) -> float:
    """``-p log2 p - (1 - p) log2 (1 - p)``, in bits; 0 at 0 and 1."""
    return 0.0 if p in (0.0, 1.0) else -p * math.log2(p) - (1 - p) * math.log2(1 - p)


def change(old: Tensor, new: Tensor) -> Change:
    """Compare the bits of two contiguous tensors of the same shape and dtype, a chunk at a time."""
    words = WORDS[old.element_size()]
    found: Counter[int] = Counter()
    for before, after in zip(torch.split(old.view(words), _CHUNK), torch.split(new.view(words), _CHUNK), strict=True):
        changed = before != after
        differences, counts = torch.unique(after[changed] - before[changed], return_counts=True)
        found.update(dict(zip(differences.tolist(), counts.tolist(), strict=True)))
    num_changed = found.total()
    information = sum(count * math.log2(num_changed / count) for count in found.values())
    return Change(
        num_values=old.numel(),
        num_changed=num_changed,
        value_bits=information / max(1, num_changed),
        num_bytes=old.nbytes,
    )
