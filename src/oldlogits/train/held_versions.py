"""The versions that the trainer holds, and what brings a receiver of weights from one to the next."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path

from torch import Tensor

from oldlogits.config import VersionsConfig
from oldlogits.core.protocols import FullWeights, PatchWeights, PolicyVersion, Publication, WeightUpdate
from oldlogits.versions import PatchStore

PATCH_SHARE = 0.5
"""Patches above this share of a full copy are not worth it: the full weights are sent."""


class HeldVersions:
    """A store of patches whose resident copy the scoring module reads.

    It is one walk from beginning to end: a checkout leaves the copy where it is, the next publication or checkout takes it on
    from there, so that a batch scored version by version goes over the chain once.

    Args:
        config: Tiers and budget of the store.
        sends_patches: Whether receivers in other processes can take patches.
    """

    def __init__(self, config: VersionsConfig, *, sends_patches: bool) -> None:
        folder = Path(config.folder) if config.budget_bytes else None
        budget = config.budget_bytes or None
        self.store = PatchStore(folder, hot=config.hot, budget_bytes=budget, wait_s=0.0, sync=False, settles=False)
        self._sends_patches = sends_patches
        self._sent: PolicyVersion | None = None

    def publish(self, version: PolicyVersion, weights: Mapping[str, Tensor]) -> tuple[Publication, WeightUpdate]:
        """Store the weights, and say what a receiver of the version before is to be given.

        Raises:
            StoreFullError: The versions that are needed take more than the budget, in memory and on disk.
        """
        publication, before = self.store.publish(version, weights), self._sent
        self._sent = version
        if self._sends_patches and before is not None and before != version:
            found = self.store.patch_between(before, version)
            if found is not None and sum(patch.num_bytes for patch in found) <= PATCH_SHARE * publication.full_bytes:
                patches = tuple(patch.to_bytes("memory") for patch in found)
                return publication, PatchWeights(base=before, patches=patches)
        return publication, FullWeights(tensors=weights)

    def checkout(self, version: PolicyVersion) -> AbstractContextManager[Mapping[str, Tensor]]:
        """The weights of a version, inside the context."""
        return self.store.checkout(version)
