"""Weights beside the calls that carry them: as arrays of bytes, which a file or an object store shares without copying."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum

import numpy as np
import torch
from numpy.typing import NDArray

from oldlogits.core.weights import FullWeights, PatchWeights, PolicyVersion, WeightUpdate
from oldlogits.train.reports import PublishedVersion

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """An update as arrays of bytes.

    Args:
        base: The version that patches begin at; None: all weights.
        parts: uint8; patches, or weights: each tensor that has memory of its own once.
        tensors: The part, the dtype and the shape of each weight, by name; empty for patches.
    """

    base: PolicyVersion | None
    parts: tuple[Bytes, ...]
    tensors: Mapping[str, tuple[int, torch.dtype, tuple[int, ...]]]


def pack(update: WeightUpdate) -> Packed:
    """Return views of an update."""
    if isinstance(update, PatchWeights):
        return Packed(base=update.base, parts=tuple(np.frombuffer(patch, np.uint8) for patch in update.patches), tensors={})
    parts: list[Bytes] = []
    places: dict[tuple[object, ...], int] = {}
    tensors = {}
    for name, tensor in update.tensors.items():
        shape = tuple(tensor.shape)
        key = (tensor.data_ptr(), tensor.dtype, shape, tensor.stride())
        if key not in places:
            places[key] = len(parts)
            parts.append(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        tensors[name] = (places[key], tensor.dtype, shape)
    return Packed(base=None, parts=tuple(parts), tensors=tensors)


def unpack(packed: Packed) -> WeightUpdate:
    """Return the update, over the same memory; it is for reading only."""
    if packed.base is not None:
        return PatchWeights(base=packed.base, patches=tuple(memoryview(part.data) for part in packed.parts))
    with warnings.catch_warnings(action="ignore"):  # the memory is not writable, and nobody writes
        parts = [torch.from_numpy(part) for part in packed.parts]
    return FullWeights(tensors={name: parts[i].view(dtype).view(shape) for name, (i, dtype, shape) in packed.tensors.items()})


class Aside(Enum):
    """What stands in a call or a reply where weights are, which travel beside it."""

    WEIGHTS = "weights"


def set_aside(value: object) -> tuple[object, WeightUpdate | None]:
    """Part an argument or a returned value from its weights, if it has some; `put_back` joins them again."""
    if isinstance(value, PublishedVersion):
        return replace(value, update=FullWeights(tensors={})), value.update
    return (Aside.WEIGHTS, value) if isinstance(value, FullWeights | PatchWeights) else (value, None)


def put_back(value: object, update: WeightUpdate) -> object:
    """Return the value that `set_aside` has parted from this update."""
    return replace(value, update=update) if isinstance(value, PublishedVersion) else update
