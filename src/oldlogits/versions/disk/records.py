"""What the store writes into its log: full copies, and patches with the versions and digests that they lead between."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from oldlogits.core.errors import LayoutError
from oldlogits.core.weights import PolicyVersion
from oldlogits.versions.disk.log_format import Payload
from oldlogits.versions.patches.digest import MASK, key_of, signed
from oldlogits.versions.patches.flat import FlatWeights
from oldlogits.versions.patches.kernel_choice import kernels_for
from oldlogits.versions.patches.layout import Layout, words_of

_LENGTH: Final = struct.Struct("<I")
_STEP: Final = struct.Struct("<qQQ")


class Step(NamedTuple):
    """The head of a patch's record: the version that it leads from, and the digests of its bits and of the record's version."""

    base: PolicyVersion
    base_digest: int
    target_digest: int


def patch_payload(step: Step, patch: bytes | memoryview) -> Payload:
    """The payload of a patch's record."""
    return _STEP.pack(*step), patch


def read_step(payload: bytearray) -> tuple[Step, memoryview]:
    """What `patch_payload` wrote: the head, and the patch."""
    return Step(*_STEP.unpack_from(payload)), memoryview(payload)[_STEP.size :]


def copy_payload(weights: FlatWeights, frozen: Mapping[str, str]) -> Payload:
    """The payload of a full copy's record; of the tensors held by reference, `frozen`, the fingerprints alone are written."""
    assert weights.digest is not None
    head = {"digest": f"{weights.digest:016x}", "layout": weights.layout.to_json(), "frozen": dict(frozen)}
    text = json.dumps(head).encode()
    buffers = (weights.words(dtype).cpu().numpy().view(np.uint8) for dtype in weights.layout.dtypes)
    return [_LENGTH.pack(len(text)), text, *(buffer.data for buffer in buffers if buffer.size)]


def read_copy(
    payload: bytearray, frozen: Mapping[str, Tensor], device: torch.device | str | None
) -> tuple[FlatWeights, Mapping[str, str]]:
    """Read what `copy_payload` wrote: the copy, on a device, and the fingerprints, which the frozen tensors must have."""
    view = memoryview(payload)
    (length,) = _LENGTH.unpack_from(view)
    start = _LENGTH.size + length
    head = json.loads(bytes(view[_LENGTH.size : start]))
    layout = Layout.from_json(head["layout"])
    check_fingerprints(head["frozen"], frozen)
    weights = FlatWeights.empty(layout, device=device or "cpu", frozen=frozen)
    for dtype in layout.dtypes:
        words = weights.words(dtype)
        if words.numel():
            words.copy_(torch.frombuffer(view[start : start + words.nbytes], dtype=words.dtype))
        start += words.nbytes
    weights.digest = int(head["digest"], 16)
    return weights, head["frozen"]


def fingerprint(name: str, tensor: Tensor) -> str:
    """Dtype, shape and digest of a tensor, in one word."""
    whole = tensor.detach().contiguous()
    zero, numel, key = (np.array([n], dtype=np.int64) for n in (0, whole.numel(), signed(key_of(name))))
    digest = kernels_for(whole).digest(words_of(whole), zero, zero, numel, key) & MASK
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}-{digest:016x}"


def check_fingerprints(expected: Mapping[str, str], given: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are not those with these fingerprints; a `LayoutError` names one that is missing or differs."""
    for name, print_then in expected.items():
        found = fingerprint(name, given[name]) if name in given else "no such tensor"
        if found != print_then:
            raise LayoutError(
                f"{name}: not the frozen tensor that the versions on disk were published with",
                got=found,
                allowed=print_then,
                fix="open the store with frozen= the tensors of the model that it began with",
            )
