"""A 64-bit digest of a version's bits that is a sum over its elements.

    digest = sum over elements of mix(key(name) + index * G + word * W)   mod 2^64

`index` counts in the whole, flattened parameter, `word` is the value's bits as an unsigned number, `mix` is the finaliser of
splitmix64, `key` a hash of the name. Since it is a sum, digests of shards add up to that of the whole, and a patch moves it by
the terms of the elements that it changes, computed from the words that were read and those that were written: one wrong word
among them is seen with certainty, several but for a chance of about 2^-64. It guards against damage, not against an attacker.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

G, W = 0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93
M1, M2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
MASK = (1 << 64) - 1


def key_of(name: str) -> int:
    """A stable unsigned 64-bit hash of a parameter's name."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def signed(value: int) -> int:
    """The same 64 bits as a signed number."""
    return ((value & MASK) ^ (1 << 63)) - (1 << 63)


def terms(keys: Tensor | int, indices: Tensor, words: Tensor) -> Tensor:
    """The digest's term of each element: int64 [n], wrapping.

    Args:
        keys: int64 [n], or one for all: `key_of` the name, as signed.
        indices: int64 [n], in the whole parameter.
        words: Signed integers [n], the values' bits.
    """
    unsigned = words.to(torch.int64)
    if words.itemsize < 8:
        unsigned = unsigned & ((1 << 8 * words.itemsize) - 1)
    z = indices * signed(G) + unsigned * signed(W) + keys
    z = (z ^ _shifted(z, 30)) * signed(M1)
    z = (z ^ _shifted(z, 27)) * signed(M2)
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, bits: int) -> Tensor:
    """The logical shift to the right, which torch lacks for int64."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
