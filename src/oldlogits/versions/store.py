"""Exact versions of the forward weights: the newest resident, older ones a chain of patches away.

    publish   encode(resident, new) -> patch      the resident copy takes the new bits in the same pass
    take      apply(resident, patch)              of a store in another process, which this one follows

What is on disk can be opened again, rewound and verified, so that a run can go on from its own versions. One lock: a checkout
holds it for its block, so a publish or a checkout from another thread waits for the block's end.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from oldlogits.core.errors import ExactnessError, LayoutError, PatchError, StoreFullError, StoreUseError
from oldlogits.core.weights import PatchWeights, PolicyVersion, StoreReceipt
from oldlogits.versions.chain import Chain, Link, Resident
from oldlogits.versions.defer_sigint import defer_sigint
from oldlogits.versions.disk.files import Disk
from oldlogits.versions.disk.log import VersionLog
from oldlogits.versions.disk.log_format import Cut
from oldlogits.versions.disk.records import check_fingerprints
from oldlogits.versions.patches.flat import FlatWeights
from oldlogits.versions.patches.layout import Shard
from oldlogits.versions.patches.patch import Patch, receiver_behind
from oldlogits.versions.reader import VersionReader
from oldlogits.versions.retention import check_ascends, check_held, published_twice


class PatchStore(VersionReader):
    """Exact versions as patches, in memory or, with a folder, on disk as well.

    Args:
        folder: Every publication is written here before `publish` returns; must hold no versions yet, see `open`.
        frozen: Names that do not change during training: held by reference, never looked at.
        dtype: The dtype that floating-point values are kept in, such as bfloat16 for float32 masters; None: each in its own.
        shards: The part of each parameter that is published here, by name; others are whole.
        hot: How many of the newest patches stay in the memory tier; older ones are compressed.
        budget_bytes: The most that all patches take in memory. Over it everything is compressed; then, with a folder, the
            oldest are left on disk only; then, without one, `publish` waits for `retain` or `release`. None: no bound.
        wait_s: How many seconds `publish` waits before it raises.
        sync: Whether a version is on the disk itself when `publish` returns, and survives a loss of power.

    Raises:
        LogBusyError: The folder has an owner.
        LogWriteError: The folder holds versions, or cannot be written.
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        frozen: Iterable[str] = (),
        dtype: torch.dtype | None = None,
        shards: Mapping[str, Shard] | None = None,
        hot: int = 4,
        budget_bytes: int | None = None,
        wait_s: float = 60.0,
        sync: bool = True,
    ) -> None:
        super().__init__(Disk(VersionLog.create(folder, sync=sync), folder) if folder is not None else None)
        self._frozen, self._dtype, self._shards = frozenset(frozen), dtype, shards
        self._hot, self._budget_bytes, self._wait_s = hot, budget_bytes, wait_s
        self._publishing = threading.Lock()

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        frozen: Mapping[str, Tensor] | None = None,
        device: torch.device | str | None = None,
        hot: int = 4,
        budget_bytes: int | None = None,
        sync: bool = True,
        cut_damage: bool = False,
    ) -> Self:
        """Go on from what a folder holds, after a clean end or a kill at any moment.

        Args:
            folder: The folder of a store.
            frozen: The tensors under the names that the store was made with as frozen.
            device: The device of the resident copy; None: the CPU.
            hot: See the class.
            budget_bytes: See the class.
            sync: See the class.
            cut_damage: Give up the first damaged record and all that follow, instead of an error.

        Raises:
            LogBusyError: The folder has an owner.
            LogDamagedError: It holds no versions, or a record is not what was written.
            ExactnessError: The versions that its records lead to are not those that were published.
        """
        store = cls(hot=hot, budget_bytes=budget_bytes)
        store._disk = disk = Disk(VersionLog.open(folder, sync=sync, cut_damage=cut_damage), folder)
        try:
            store._read(disk, frozen or {}, device)
        except BaseException:
            disk.log.close()
            raise
        return store

    @property
    def cut(self) -> Cut | None:
        """What was cut off the end of the log when it was opened, such as a record that a kill had torn."""
        return self._disk.log.cut if self._disk is not None else None

    def publish(self, version: PolicyVersion, weights: Mapping[str, Tensor]) -> StoreReceipt:
        """Store the bits of `weights` as `version`; the newest version may be published again.

        Args:
            version: Above the newest; versions need not be consecutive.
            weights: The same names and shapes as before; floating-point values are cast to the store's dtype.

        Raises:
            StoreUseError: The version is below the newest, or is the newest and has other bits, or the caller is in a checkout.
            LayoutError: The weights do not fit those before.
            StoreFullError: There is no room, also after waiting. The store is as it was before.
            LogWriteError: The disk does not take it. The store is as it was before.
        """
        with self._publishing, self._lock:
            self._check_outside("published to")
            check_ascends(version, self.versions)
            if self._resident is None:
                return self._publish_first(version, weights)
            newest = self._go(self.versions[-1])
            if version == newest:
                return self._publish_again(version, weights)
            return self._extend(newest, version, lambda resident: resident.absorb(version, weights))

    def take(self, version: PolicyVersion, update: PatchWeights) -> StoreReceipt:
        """Store as `version` what a patch makes of the newest one: this store follows one in another process.

        Raises:
            ReceiverBehindError: The patch does not begin at the newest version, or is damaged, or what comes out has another
                digest. The store is as it was before, as after the errors that `publish` has.
        """
        with self._publishing, self._lock:
            self._check_outside("published to")
            if self._resident is None or self.versions[-1] != update.base or version <= update.base or len(update.patches) != 1:
                raise receiver_behind(
                    f"the versions {', '.join(map(str, self.versions)) or 'none'}",
                    f"one patch from the newest one, not {len(update.patches)} from version {update.base} to {version}",
                )
            newest = self._go(update.base)
            try:
                patch = Patch.from_bytes(update.patches[0], layout=self._resident.flat.layout)
                return self._extend(newest, version, lambda resident: resident.follow(version, patch))
            except (PatchError, LayoutError, ExactnessError) as error:
                raise receiver_behind(str(error), f"a patch from version {newest} to {version}, as it was written") from error

    def rewind(self, version: PolicyVersion) -> None:
        """Forget all versions above one, which becomes the newest: a run goes on from an older checkpoint.

        Raises:
            VersionEvictedError: The version is not in the store.
            LogWriteError: The disk refused; the store is as it was before.
        """
        with self._publishing, self._lock:
            self._check_outside("rewound")
            check_held(version, self.versions)
            self._go(version)
            before = self._chain.links
            with defer_sigint():
                self._chain.keep_below(version)
                try:
                    if self._disk is not None:
                        self._disk.rewrite(version, self._copy().flat, self._chain)
                except BaseException:
                    self._chain.links = before
                    raise
                self._digests = {v: digest for v, digest in self._digests.items() if v <= version}

    def verify(self, version: PolicyVersion | None = None) -> None:
        """Compare all bits of a version, or of every one, with its digest: a pass over all weights for each.

        Raises:
            ExactnessError: They are not those that were published.
            LayoutError: A frozen tensor is not the one of the first version; found only with a folder.
        """
        with self._lock, self.walk():
            for each in reversed(self.versions) if version is None else [version]:
                with self.checkout(each):
                    self._copy().check(self._digests[each], self._copy().flat.full_digest())
            if self._disk is not None and self._resident is not None:
                check_fingerprints(self._disk.fingerprints, self._resident.flat.frozen)

    def close(self) -> None:
        """Give the folder up; what was published stays there. A second call does nothing."""
        with self._lock:
            if self._disk is not None:
                self._disk.log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _publish_first(self, version: PolicyVersion, weights: Mapping[str, Tensor]) -> StoreReceipt:
        started = time.perf_counter()
        flat = FlatWeights.of(weights, frozen=self._frozen, dtype=self._dtype, shards=self._shards, device=None)
        assert flat.digest is not None
        encode_s = time.perf_counter() - started
        with defer_sigint():
            log_bytes = self._disk.begin(version, flat) if self._disk is not None else 0
            self._resident, self._digests = Resident(flat, version, self._chain), {version: flat.digest}
        full_bytes = flat.layout.num_bytes
        return StoreReceipt(
            version=version,
            stored_bytes=full_bytes,
            full_bytes=full_bytes,
            share_changed=1.0,
            encode_s=encode_s,
            log_bytes=log_bytes,
        )

    def _extend(self, newest: PolicyVersion, version: PolicyVersion, step: Callable[[Resident], Link]) -> StoreReceipt:
        """Bring the copy from the newest version to a new one, and keep the patch; on an error all is as it was."""
        resident, started = self._copy(), time.perf_counter()
        try:
            link = step(resident)
            encode_s, patch = time.perf_counter() - started, self._chain.patch(link)
            waited_s = self._wait_for_room(version) if self._disk is None else 0.0
            with defer_sigint():
                log_bytes = self._disk.append(link, self._chain) if self._disk is not None else 0
                self._digests[version] = link.step.target_digest
        except BaseException:
            if version not in self._digests:
                resident.give_up(newest)
            raise
        self._drop()
        self._chain.save_memory(self._hot, self._budget_bytes)
        return StoreReceipt(
            version=version,
            stored_bytes=patch.num_bytes,
            full_bytes=resident.flat.layout.num_bytes,
            share_changed=patch.share_changed,
            encode_s=encode_s,
            log_bytes=log_bytes,
            waited_s=waited_s,
        )

    def _publish_again(self, version: PolicyVersion, weights: Mapping[str, Tensor]) -> StoreReceipt:
        started, resident = time.perf_counter(), self._copy()
        if not resident.agrees(weights):
            raise published_twice(version)
        return StoreReceipt(
            version=version,
            stored_bytes=0,
            full_bytes=resident.flat.layout.num_bytes,
            share_changed=0.0,
            encode_s=time.perf_counter() - started,
        )

    def _wait_for_room(self, version: PolicyVersion) -> float:
        """Wait until what is needed once `version` is the newest fits the budget; returns the seconds."""
        budget_bytes = self._budget_bytes

        def needed() -> int:
            self._chain.save_memory(self._hot, budget_bytes)
            oldest = self._retention.needed([*self.versions, version])[0]
            return sum(link.num_bytes for link in self._chain.between(oldest, version))

        if budget_bytes is None or needed() <= budget_bytes:
            return 0.0
        started = time.monotonic()
        if not self._room.wait_for(lambda: needed() <= budget_bytes, self._wait_s):
            raise StoreFullError(
                "the versions that are needed do not fit the byte budget of the store",
                got=f"{needed():,} bytes of patches, compressed, after {self._wait_s:g} s",
                allowed=f"budget_bytes = {budget_bytes:,}",
                fix="call retain(oldest version in flight) earlier, raise budget_bytes, or give the store a folder",
            )
        return time.monotonic() - started

    def _read(self, disk: Disk, frozen: Mapping[str, Tensor], device: torch.device | str | None) -> None:
        """Take over what a folder holds, and bring the copy to the newest version."""
        version, flat, links, oldest = disk.read(frozen, device)
        self._chain = Chain(disk.log, links)
        self._resident = Resident(flat, version, self._chain)
        digests = {version: flat.digest or 0}
        for link in links:
            digests |= {link.step.base: link.step.base_digest, link.target: link.step.target_digest}
        newest = max(digests)
        self._resident.move_to(newest)
        self._resident.check(digests[newest], flat.full_digest())
        self._chain.keep_above(oldest)
        self._digests = {v: digests[v] for v in sorted(digests) if v >= oldest}

    def _check_outside(self, what: str) -> None:
        if self._depth:
            raise StoreUseError(
                f"a store cannot be {what} inside a checkout",
                got=f"version {self._copy().at} checked out in this thread",
                allowed="outside of checkouts",
                fix="leave the block before",
            )


class LazyPatchStore(PatchStore):
    """A `PatchStore` in memory or on disk whose copy stays where the last checkout left it.

    All is one walk without an end: the next checkout or publication takes the copy on from where it is.
    """

    def _settle(self) -> None:
        """Leave the copy where it is."""
