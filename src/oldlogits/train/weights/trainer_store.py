"""The versions that the trainer holds, and what brings a receiver of weights from one to the next.

Each rank keeps the versions of its own slices, and encodes, checks and switches them; the first one joins the patches of all
slices, which are those of the whole without a gather of weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from oldlogits.config.systems import VersionsConfig
from oldlogits.core.weights import PatchWeights, PolicyVersion, StoreReceipt
from oldlogits.models.load import version_parameters
from oldlogits.models.ranks import Ranks
from oldlogits.versions import Patch, PatchStore, Shard, concatenate, warm_up

PATCH_SHARE = 0.5
"""Patches above this share of a full copy are not worth it: the full weights are sent."""


class TrainerVersionStore:
    """A store of patches whose resident copy the scoring module reads.

    A checkout leaves the copy where it is, so that a batch scored version by version goes over the chain once.

    Args:
        config: The tiers and the budget of the store.
        dtype: The type of the forward weights; masters are cast to it while they are compared.
        shards: The part of each parameter that this rank holds.
        ranks: The ranks that hold the model.
        sends_patches: Whether receivers in other processes can take patches.
    """

    def __init__(
        self, config: VersionsConfig, dtype: torch.dtype, shards: Mapping[str, Shard], ranks: Ranks, *, sends_patches: bool
    ) -> None:
        folder = Path(config.folder) / ("" if ranks.num_ranks == 1 else f"rank{ranks.rank}") if config.budget_bytes else None
        hot, budget = config.uncompressed, config.budget_bytes or None
        self.store = PatchStore(folder, dtype=dtype, shards=shards, hot=hot, budget_bytes=budget)
        self._ranks, self._sends_patches, self._dtype = ranks, sends_patches, dtype
        self._sent: PolicyVersion | None = None

    def publish(self, version: PolicyVersion, weights: Mapping[str, Tensor]) -> tuple[StoreReceipt, PatchWeights | None]:
        """Store the weights, and give what leads a receiver on from the version before; None: it is to be given all weights.

        All ranks make this call together, each with its slices. It returns what they have stored together, on each of them, and
        the patches of all on the first.
        """
        if not self.store.versions:
            warm_up(weights, self._dtype)
        with self._ranks.agreeing():
            own = self.store.publish(version, weights)
        publication, before = _together(self._ranks.gather(own)), self._sent
        self._sent = version
        if self._sends_patches and before is not None and before != version:
            found = self.store.patch_between(before, version)
            num_bytes = self._ranks.gather(sum(patch.num_bytes for patch in found) if found is not None else math.inf)
            if found is not None and sum(num_bytes) <= PATCH_SHARE * publication.full_bytes:
                return publication, PatchWeights(base=before, patches=self._joined(found))
        return publication, None

    def take_over(self, older: Mapping[tuple[PolicyVersion, PolicyVersion], bytes]) -> None:
        """Hold older versions, which a checkpoint of the version just published was written with; all ranks call it.

        A `PatchError` says that they are not of that version.
        """
        with self._ranks.agreeing():
            self.store.take_over(older)

    def _joined(self, patches: Sequence[Patch]) -> tuple[bytes, ...]:
        """Join the patches of the whole weights, serialised; nothing but on the first rank."""
        own = tuple(patch.to_bytes("memory") for patch in patches)
        if self._ranks.num_ranks == 1:
            return own
        steps = zip(*self._ranks.gather_to_first(own), strict=True)
        return tuple(concatenate([Patch.from_bytes(part) for part in parts]).to_bytes("memory") for parts in steps)


def shards_of(model: nn.Module, ranks: Ranks) -> dict[str, Shard]:
    """Tell which elements of each parameter of a version this rank holds: rows, as many on each as on the first, or fewer.

    Example:
        9 rows of 2 values over 4 ranks, 3 rows each: elements [0, 6), [6, 12), [12, 18), and none.
    """
    found = {}
    for name, parameter in version_parameters(model).items():
        shape = tuple(parameter.shape)
        rows, width = (shape or (1,))[0], math.prod(shape[1:])
        most = -(-rows // ranks.num_ranks)
        start, stop = (min(edge * most, rows) * width for edge in (ranks.rank, ranks.rank + 1))
        found[name] = Shard(shape=shape, start=start, stop=stop)
    return found


def _together(parts: Sequence[StoreReceipt]) -> StoreReceipt:
    """Make one publication of the whole from those of its slices."""
    if len(parts) == 1:
        return parts[0]
    full_bytes = sum(part.full_bytes for part in parts)
    return StoreReceipt(
        version=parts[0].version,
        stored_bytes=sum(part.stored_bytes for part in parts),
        full_bytes=full_bytes,
        share_changed=sum(part.share_changed * part.full_bytes for part in parts) / full_bytes,
    )
