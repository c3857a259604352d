"""Versions of the weights, and how they travel to an engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


PolicyVersion = int
"""A version of the forward weights: an int64 that counts from 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FullWeights:
    """All forward weights under their Hugging Face parameter names."""

    tensors: Mapping[str, Tensor]

    @property
    def num_bytes(self) -> int:
        """Bytes of all of them."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchWeights:
    """Serialised patches, oldest first, that lead a receiver that holds the version `base` to a later one."""

    base: PolicyVersion
    patches: tuple[bytes | memoryview, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of all of them."""
        return sum(len(patch) for patch in self.patches)


WeightUpdate = FullWeights | PatchWeights


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreReceipt:
    """What a store did with a version.

    Args:
        stored_bytes: The memory that the version takes, which is the price of keeping it: its patch, or its copy.
        full_bytes: The bytes of a full copy of the version.
        share_changed: The share of its values with other bits than in the version before; NaN where they were not compared.
    """

    version: PolicyVersion
    stored_bytes: int
    full_bytes: int
    share_changed: float
