"""Exact versions of the forward weights: one resident copy, and the other versions a chain of patches away.

    publish    encode(resident, new) -> patch      the resident copy takes the new bits in the same pass
    take       apply(resident, patch)              of a store in another process, which this one follows
    checkout   resident --patches--> version       and there it stays until the next call takes it on

What is on disk can be opened again, rewound and verified, so that a run can go on from its own versions. One lock: a checkout
holds it for its block, so a publish or a checkout from another thread waits for the block's end.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from oldlogits.core.errors import ExactnessError, LayoutError, PatchError, StoreUseError
from oldlogits.core.weights import PatchWeights, PolicyVersion, StoreReceipt
from oldlogits.versions.chain import Chain
from oldlogits.versions.defer_sigint import defer_sigint
from oldlogits.versions.disk import Disk, StoredFile
from oldlogits.versions.patches.flat import FlatWeights, check_fingerprints
from oldlogits.versions.patches.layout import Shard
from oldlogits.versions.patches.patch import Patch, receiver_behind
from oldlogits.versions.retention import check_ascends, check_held, published_twice


class PatchStore:
    """Exact versions as patches, in memory or, with a folder, on disk as well.

    Args:
        folder: Every publication is on this disk before `publish` returns; must hold no versions yet, see `open`.
        frozen: Names that do not change during training: held by reference, never looked at.
        dtype: The dtype that floating-point values are kept in, such as bfloat16 for float32 masters; None: each in its own.
        shards: The part of each parameter that is published here, by name; others are whole.
        hot: How many of the newest patches stay in the memory tier; older ones are compressed.
        budget_bytes: The most that all patches are to take in memory. Over it everything is compressed; then, with a folder,
            the oldest are left on disk only. Without one, `retain` alone bounds what is left. None: no bound.

    Attributes:
        cut: What `open` found damaged, and gave up with all that it led to; None: nothing was.

    Raises:
        StoreBusyError: The folder has an owner.
        StoreWriteError: The folder holds versions, or cannot be written.
    """

    cut: str | None = None

    def __init__(
        self,
        folder: Path | None = None,
        *,
        frozen: Iterable[str] = (),
        dtype: torch.dtype | None = None,
        shards: Mapping[str, Shard] | None = None,
        hot: int = 4,
        budget_bytes: int | None = None,
    ) -> None:
        self._disk = None if folder is None else Disk.create(folder)
        self._frozen, self._dtype, self._shards = frozenset(frozen), dtype, shards
        self._hot, self._budget_bytes = hot, budget_bytes
        self._chain: Chain | None = None
        self._oldest_needed: PolicyVersion = 0
        self._pinned: PolicyVersion | None = None
        self._lock = threading.RLock()
        self._depth = 0  # checkouts of the thread that has the lock

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        frozen: Mapping[str, Tensor] | None = None,
        device: torch.device | str | None = None,
        hot: int = 4,
        budget_bytes: int | None = None,
        cut_damage: bool = False,
    ) -> Self:
        """Go on from what a folder holds, after a clean end or a kill at any moment.

        Args:
            folder: The folder of a store.
            frozen: The tensors under the names that the store was made with as frozen.
            device: The device of the resident copy; None: the CPU.
            hot: See the class.
            budget_bytes: See the class.
            cut_damage: Give up a damaged patch and all that lead on from it, instead of an error.

        Raises:
            StoreBusyError: The folder has an owner.
            StoreDamagedError: It holds no versions, or a file is not what was written.
            ExactnessError: The versions that its files lead to are not those that were published.
        """
        store = cls(hot=hot, budget_bytes=budget_bytes)
        store._disk = disk = Disk.open(folder, cut_damage=cut_damage)
        store.cut = disk.cut
        try:
            store._chain = chain = Chain(disk.read_copy(frozen or {}, device), disk.held.copy.target, disk)
            chain.move_to(chain.versions[-1])
            chain.check(chain.flat.full_digest())
            chain.drop_below(disk.held.oldest)
        except BaseException:
            disk.close()
            raise
        return store

    @property
    def versions(self) -> tuple[PolicyVersion, ...]:
        """The versions that are there, ascending."""
        return self._chain.versions if self._chain is not None else ()

    @property
    def num_bytes(self) -> int:
        """Bytes of memory: the resident copy and all patches."""
        return self.patch_bytes + (self._chain.flat.num_bytes if self._chain is not None else 0)

    @property
    def patch_bytes(self) -> int:
        """Bytes of memory beside the resident copy; on disk too, they are within the budget while no publication goes on."""
        return self._chain.num_bytes if self._chain is not None else 0

    @contextmanager
    def checkout(self, version: PolicyVersion) -> Iterator[Mapping[str, Tensor]]:
        """Give the weights of `version`: views of the resident copy, for reading inside the block only.

        The copy stays there until the next call takes it on: versions in their order cost one way along the chain in all.

        Raises:
            VersionEvictedError: The version is not in the store.
            StoreUseError: Another version is checked out in this thread.
            ExactnessError: The bits are not those that were published.
        """
        with self._lock:
            check_held(version, self.versions)
            chain = self._held()
            if self._depth and version != chain.at:
                raise StoreUseError(
                    f"version {version} cannot be checked out while version {chain.at} is",
                    got="a checkout inside the block of another",
                    allowed="one version at a time: the store has one copy",
                    fix="leave the first block before; or clone what is needed of the first",
                )
            self._depth += 1
            try:
                chain.move_to(version)
                yield chain.flat.weights
            finally:
                self._depth -= 1
                self._drop()

    def publish(self, version: PolicyVersion, weights: Mapping[str, Tensor]) -> StoreReceipt:
        """Store the bits of `weights` as `version`; the newest version may be published again.

        Args:
            version: Above the newest; versions need not be consecutive.
            weights: The same names and shapes as before; floating-point values are cast to the store's dtype.

        Raises:
            StoreUseError: The version is below the newest, or is the newest and has other bits, or the caller is in a checkout.
            LayoutError: The weights do not fit those before.
            StoreWriteError: The disk does not take it. The store is as it was before.
        """
        with self._lock:
            self._check_outside("published to")
            check_ascends(version, self.versions)
            if self._chain is None:
                return self._publish_first(version, weights)
            chain = self._chain
            chain.move_to(chain.versions[-1])
            if version == chain.at:
                if not chain.agrees(weights):
                    raise published_twice(version)
                return self._receipt(version, 0, 0.0)
            return self._extend(version, lambda: chain.absorb(version, weights))

    def take(self, version: PolicyVersion, update: PatchWeights) -> StoreReceipt:
        """Store as `version` what a patch makes of the newest one: this store follows one in another process.

        Raises:
            ReceiverBehindError: The patch does not begin at the newest version, or is damaged, or what comes out has another
                digest. The store is as it was before, as after the errors that `publish` has.
        """
        with self._lock:
            self._check_outside("published to")
            chain, base = self._chain, update.base
            if chain is None or chain.versions[-1] != base or version <= base or len(update.patches) != 1:
                raise receiver_behind(
                    f"the versions {', '.join(map(str, self.versions)) or 'none'}",
                    f"one patch from the newest one, not {len(update.patches)} from version {base} to {version}",
                )
            chain.move_to(base)
            try:
                patch = Patch.from_bytes(update.patches[0], layout=chain.flat.layout)
                return self._extend(version, lambda: chain.follow(version, patch))
            except (PatchError, LayoutError, ExactnessError) as error:
                raise receiver_behind(str(error), f"a patch from version {base} to {version}, as it was written") from error

    def retain(self, oldest_needed: PolicyVersion, pinned: PolicyVersion | None = None) -> list[PolicyVersion]:
        """Drop the versions below `oldest_needed`, but for the newest, and return the dropped; in a checkout, at its end.

        A `pinned` version stays though it is older. In memory one patch leads on from it, which grows up to a full copy of what
        differs; with a folder all versions from it on stay too.
        """
        with self._lock:
            self._oldest_needed, self._pinned = oldest_needed, pinned
            return self._drop()

    def patch_between(self, base: PolicyVersion, target: PolicyVersion) -> list[Patch] | None:
        """The patches that lead a receiver from one version to a later one, oldest first; None: not both are there."""
        with self._lock:
            if base not in self.versions or target not in self.versions or base > target:
                return None
            return [self._held().patch(link) for link in self._held().between(base, target)]

    def older(self) -> dict[tuple[PolicyVersion, PolicyVersion], bytes]:
        """Give the patch from each version to the next, as bytes: with the newest version they give all; see `take_over`."""
        with self._lock:
            links = self._chain.links if self._chain is not None else []
            return {(link.base, link.target): self._held().written(link) for link in links}

    def take_over(self, older: Mapping[tuple[PolicyVersion, PolicyVersion], bytes]) -> None:
        """Hold the versions that patches of `older` lead from, to the one that was published first.

        Raises:
            PatchError: They do not lead to its bits, one after the other. The store is as it was before.
        """
        with self._lock:
            chain = self._held()
            read = {ends: Patch.from_bytes(content, layout=chain.flat.layout) for ends, content in sorted(older.items())}
            chain.precede(read)

    def rewind(self, version: PolicyVersion) -> None:
        """Forget all versions above one, which becomes the newest: a run goes on from an older checkpoint.

        Raises:
            VersionEvictedError: The version is not in the store.
            StoreWriteError: The disk refused; the store is as it was before.
        """
        with self._lock:
            self._check_outside("rewound")
            check_held(version, self.versions)
            chain = self._held()
            chain.move_to(version)
            with defer_sigint():
                if self._disk is not None:
                    self._disk.rewind(version, chain.flat)
                chain.drop_above(version)

    def verify(self, version: PolicyVersion | None = None) -> None:
        """Compare all bits of a version, or of every one, with its digest: a pass over all weights for each.

        Raises:
            ExactnessError: They are not those that were published.
            LayoutError: A frozen tensor is not the one of the first version; found only with a folder.
        """
        with self._lock:
            for each in reversed(self.versions) if version is None else [version]:
                with self.checkout(each):
                    self._held().check(self._held().flat.full_digest())
            if self._disk is not None and self._chain is not None:
                check_fingerprints(self._disk.held.frozen, self._chain.flat.frozen)

    def close(self) -> None:
        """Give the folder up; what was published stays there. A second call does nothing."""
        with self._lock:
            if self._disk is not None:
                self._disk.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _publish_first(self, version: PolicyVersion, weights: Mapping[str, Tensor]) -> StoreReceipt:
        flat = FlatWeights.of(weights, frozen=self._frozen, dtype=self._dtype, shards=self._shards, device=None)
        with defer_sigint():
            if self._disk is not None:
                self._disk.begin(version, flat)
            self._chain = Chain(flat, version, self._disk)
        return self._receipt(version, flat.layout.num_bytes, 1.0)

    def _extend(self, version: PolicyVersion, step: Callable[[], Patch]) -> StoreReceipt:
        """Bring the copy from the newest version to a new one, and keep the patch; on an error all is as it was."""
        chain, newest, is_kept = self._held(), self.versions[-1], False
        try:
            patch = step()
            with defer_sigint():
                if self._disk is not None:
                    link, file = chain.links[-1], StoredFile(newest, patch.base, version, patch.target, 0, 0)
                    link.file = self._disk.append(file, chain.serialised(link))
                is_kept = True
        except BaseException:
            if not is_kept:
                chain.move_to(newest)
                chain.drop_above(newest)
            raise
        self._drop()
        chain.save_memory(self._hot, self._budget_bytes)
        return self._receipt(version, patch.num_bytes, patch.share_changed)

    def _receipt(self, version: PolicyVersion, stored_bytes: int, share_changed: float) -> StoreReceipt:
        full_bytes = self._held().flat.layout.num_bytes
        return StoreReceipt(version=version, stored_bytes=stored_bytes, full_bytes=full_bytes, share_changed=share_changed)

    def _drop(self) -> list[PolicyVersion]:
        """Drop what is not needed, outside of checkouts, and return it; the copy leaves a version that goes."""
        if self._chain is None or self._depth:
            return []
        chain = self._chain
        oldest = next((version for version in chain.versions if version >= self._oldest_needed), chain.versions[-1])
        kept = self._pinned if self._pinned in chain.versions and self._pinned < oldest else oldest
        if self._disk is not None:
            oldest = kept
        dropped = [version for version in chain.versions if version < oldest and version != kept]
        if dropped:
            chain.move_to(chain.at if chain.at == kept else max(chain.at, oldest))
            chain.bridge(kept, oldest)
            chain.drop_below(kept)
            if self._disk is not None:
                self._disk.drop(oldest, chain.at, chain.flat)
        return dropped

    def _held(self) -> Chain:
        assert self._chain is not None, "there is a copy once a version was published"
        return self._chain

    def _check_outside(self, what: str) -> None:
        if self._depth:
            raise StoreUseError(
                f"a store cannot be {what} inside a checkout",
                got=f"version {self._held().at} checked out in this thread",
                allowed="outside of checkouts",
                fix="leave the block before",
            )
