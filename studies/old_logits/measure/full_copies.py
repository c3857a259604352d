"""Every version as a full copy: for adapters and other small sets of tensors, most of whose values change."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from oldlogits.core.weights import PolicyVersion, StoreReceipt
from oldlogits.versions.patches.flat import same_bits
from oldlogits.versions.retention import check_ascends, check_held, published_twice


class FullCopyStore:
    """The methods of a `PatchStore` over full copies. Any number of versions may be checked out at once, from any thread.

    Tensors that change wholly are as large in a `PatchStore`, which has the disk and the digests that this one lacks.
    """

    def __init__(self) -> None:
        self._copies: dict[PolicyVersion, Mapping[str, Tensor]] = {}
        self._oldest_needed: PolicyVersion = 0
        self._lock = threading.RLock()

    @property
    def versions(self) -> tuple[PolicyVersion, ...]:
        """The versions that are there, ascending."""
        return tuple(self._copies)

    @property
    def num_bytes(self) -> int:
        """Bytes of all copies."""
        with self._lock:
            return sum(t.nbytes for copy in self._copies.values() for t in copy.values())

    def publish(self, version: PolicyVersion, weights: Mapping[str, Tensor]) -> StoreReceipt:
        """Store a copy of `weights` as `version`; the newest version may be published again.

        Raises:
            StoreUseError: It is below the newest version, or is the newest and has other bits.
        """
        with self._lock:
            check_ascends(version, self.versions)
            copy = {name: tensor.detach().clone() for name, tensor in weights.items()}
            num_bytes = sum(tensor.nbytes for tensor in copy.values())
            if version in self._copies and not _same(copy, self._copies[version]):
                raise published_twice(version)
            self._copies[version] = copy
            self._drop()
            return StoreReceipt(
                version=version,
                stored_bytes=num_bytes,
                full_bytes=num_bytes,
                share_changed=math.nan,
            )

    @contextmanager
    def checkout(self, version: PolicyVersion) -> Iterator[Mapping[str, Tensor]]:
        """The weights of `version`, for reading; valid as long as a reference to them is.

        Raises:
            VersionEvictedError: The version is not in the store.
        """
        with self._lock:
            check_held(version, self.versions)
            copy = self._copies[version]
        yield copy

    def retain(self, oldest_needed: PolicyVersion) -> list[PolicyVersion]:
        """Versions below `oldest_needed` are no longer needed, but for the newest; returns those dropped."""
        with self._lock:
            self._oldest_needed = oldest_needed
            return self._drop()

    def rewind(self, version: PolicyVersion) -> None:
        """Forget all versions above one, which becomes the newest.

        Raises:
            VersionEvictedError: The version is not in the store.
        """
        with self._lock:
            check_held(version, self.versions)
            self._copies = {v: copy for v, copy in self._copies.items() if v <= version}

    def close(self) -> None:
        """Nothing to give up."""

    def _drop(self) -> list[PolicyVersion]:
        oldest = min(self._oldest_needed, max(self._copies, default=0))
        dropped = [version for version in self._copies if version < oldest]
        self._copies = {version: copy for version, copy in self._copies.items() if version >= oldest}
        return dropped


def _same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    forms = ({name: (tensor.shape, tensor.dtype) for name, tensor in copy.items()} for copy in (a, b))
    return next(forms) == next(forms) and all(same_bits(a[name], b[name]) for name in a)
