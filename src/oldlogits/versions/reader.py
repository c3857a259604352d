"""The reading side of a store of patches: checkouts of its versions, and how long they are kept.

checkout  resident  --patches backwards-->  version  --patches forwards-->  newest, at the end of the block
walk      the way back is left to the end of the walk: down once, back once
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from oldlogits.core.errors import StoreUseError
from oldlogits.core.weights import PolicyVersion
from oldlogits.versions.chain import Chain, Resident
from oldlogits.versions.disk.files import Disk
from oldlogits.versions.patches.patch import Patch
from oldlogits.versions.retention import Retention, check_held


class VersionReader:
    """Reads the versions of a resident copy and its patches; a `PatchStore` adds versions to it.

    Args:
        disk: The versions on disk; None: they are in memory only.
    """

    def __init__(self, disk: Disk | None) -> None:
        self._lock = threading.RLock()
        self._room = threading.Condition(self._lock)
        self._retention = Retention()
        self._digests: dict[PolicyVersion, int] = {}  # of the versions that are there, ascending
        self._depth, self._walks = 0, 0  # checkouts of the thread that has the lock; walks of all threads
        self._resident: Resident | None = None
        self._disk = disk
        self._chain = Chain(disk.log if disk is not None else None)

    @property
    def versions(self) -> tuple[PolicyVersion, ...]:
        """The versions that are there, ascending."""
        return tuple(self._digests)

    @property
    def num_bytes(self) -> int:
        """Bytes of memory: the resident copy and all patches."""
        return self.patch_bytes + (self._resident.flat.num_bytes if self._resident is not None else 0)

    @property
    def patch_bytes(self) -> int:
        """Bytes of memory beside the resident copy: within the budget whenever no publication is going on."""
        return self._chain.num_bytes

    @contextmanager
    def checkout(self, version: PolicyVersion) -> Iterator[Mapping[str, Tensor]]:
        """Give the weights of `version`: views of the resident copy, for reading inside the block only.

        Raises:
            VersionEvictedError: The version is not in the store.
            StoreUseError: Another version is checked out in this thread.
            ExactnessError: The bits are not those that were published.
        """
        with self._lock:
            check_held(version, self.versions)
            resident = self._copy()
            if self._depth and version != resident.at:
                raise StoreUseError(
                    f"version {version} cannot be checked out while version {resident.at} is",
                    got="a checkout inside the block of another",
                    allowed="one version at a time: the store has one copy",
                    fix="leave the first block before, and read both in a walk; or clone what is needed of the first",
                )
            self._depth += 1
            try:
                self._go(version)
                yield resident.flat.weights
            finally:
                self._depth -= 1
                self._settle()

    @contextmanager
    def walk(self) -> Iterator[None]:
        """Let the end of a checkout leave the copy where it is: versions in their order cost one way down and back."""
        with self._lock:
            self._walks += 1
        try:
            yield
        finally:
            with self._lock:
                self._walks -= 1
                self._settle()

    def retain(self, oldest_needed: PolicyVersion) -> list[PolicyVersion]:
        """Drop the versions below `oldest_needed`, but for the newest, those held, and all above these; return the dropped.

        A version that is checked out goes when its block ends.
        """
        with self._lock:
            self._retention.oldest_needed = oldest_needed
            return self._drop()

    def hold(self, version: PolicyVersion) -> None:
        """Keep a version until `release`, whatever `retain` says; a `VersionEvictedError` if it is gone."""
        with self._lock:
            check_held(version, self.versions)
            self._retention.hold(version)

    def release(self, version: PolicyVersion) -> list[PolicyVersion]:
        """Take one `hold` back and return the versions dropped; a `StoreUseError` if the version is not held."""
        with self._lock:
            self._retention.release(version)
            return self._drop()

    def patch_between(self, base: PolicyVersion, target: PolicyVersion) -> list[Patch] | None:
        """The patches that lead a receiver from one version to a later one, oldest first; None: not both are there."""
        with self._lock:
            if base not in self._digests or target not in self._digests or base > target:
                return None
            return [self._chain.patch(link) for link in self._chain.between(base, target)]

    def _copy(self) -> Resident:
        assert self._resident is not None, "there is a copy once a version was published"
        return self._resident

    def _go(self, version: PolicyVersion) -> PolicyVersion:
        """Bring the copy to a version, and compare its digest; returns the version."""
        self._copy().move_to(version)
        self._copy().check(self._digests[version], self._copy().flat.digest)
        return version

    def _settle(self) -> None:
        """At the end of checkouts and walks: go back to the newest version, and drop what had to wait for that."""
        if not self._depth and not self._walks and self._resident is not None:
            self._go(self.versions[-1])
            self._drop()

    def _drop(self) -> list[PolicyVersion]:
        """Drop what is not needed; returns the versions dropped."""
        if self._resident is None:
            return []
        oldest = min(self._retention.needed(self.versions)[0], self._resident.at)
        dropped = [version for version in self._digests if version < oldest]
        if dropped:
            self._digests = {version: digest for version, digest in self._digests.items() if version >= oldest}
            self._chain.keep_above(oldest)
            if self._disk is not None:
                self._disk.drop(oldest, self._resident.at, self._resident.flat, self._chain)
        self._room.notify_all()
        return dropped
