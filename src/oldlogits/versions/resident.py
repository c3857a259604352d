"""The resident copy of a store: which version its bits are, and how it gets to another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from torch import Tensor

from oldlogits.core.errors import ExactnessError
from oldlogits.core.weights import PolicyVersion
from oldlogits.versions.chain import Chain, Link
from oldlogits.versions.defer_sigint import defer_sigint
from oldlogits.versions.disk.records import Step
from oldlogits.versions.patches.codec import apply, encode
from oldlogits.versions.patches.flat import FlatWeights
from oldlogits.versions.patches.patch import Patch

_RUN_BYTES: Final = 1 << 20
"""Patches of a far jump are decoded and applied together up to so many bytes, or a quarter of the weights'."""


class Resident:
    """Flat weights that go along a chain of patches.

    Args:
        flat: The bits of `version`, with their digest.
        version: Which.
        chain: The patches to other versions.
    """

    def __init__(self, flat: FlatWeights, version: PolicyVersion, chain: Chain) -> None:
        self.flat, self.at, self._chain = flat, version, chain

    def absorb(self, version: PolicyVersion, weights: Mapping[str, Tensor]) -> Link:
        """Take new bits, which become `version`, and add the patch that leads to them to the end of the chain.

        Raises:
            LayoutError: The weights do not fit; nothing has changed.
        """
        with defer_sigint():
            return self._arrived(version, encode(self.flat, weights))

    def follow(self, version: PolicyVersion, patch: Patch) -> Link:
        """Apply a patch that leads to `version`, and add it to the end of the chain.

        Raises:
            LayoutError: The patch is of other tensors.
            ExactnessError: It does not begin where the copy is, or other bits come out. Nothing has changed.
        """
        with defer_sigint():
            apply(self.flat, [patch], 1)
            return self._arrived(version, patch)

    def _arrived(self, version: PolicyVersion, patch: Patch) -> Link:
        step = Step(base=self.at, base_digest=patch.base, target_digest=patch.target)
        link = Link(step=step, target=version, raw=patch)
        self._chain.links.append(link)
        self.at = version
        return link

    def agrees(self, weights: Mapping[str, Tensor]) -> bool:
        """Whether these weights have the bits that the copy has.

        Raises:
            LayoutError: The weights do not fit.
        """
        with defer_sigint():
            patch = encode(self.flat, weights)
            apply(self.flat, [patch], -1)
        return not patch.num_changed

    def give_up(self, base: PolicyVersion) -> None:
        """Go back to `base` and drop the links beyond it."""
        with defer_sigint():
            self.move_to(base)
            self._chain.keep_below(base)

    def move_to(self, version: PolicyVersion) -> int:
        """Apply the patches on the way to `version`; memory is gone over once.

        Returns:
            How many there were.

        Raises:
            ExactnessError: The bits that they lead to are not those that were published.
        """
        forwards, way = version > self.at, self._chain.between(self.at, version)
        for links, patches in self._chain.runs(way if forwards else way[::-1], max(_RUN_BYTES, self.flat.num_bytes // 4)):
            reached = links[-1].target if forwards else links[-1].base
            with defer_sigint():
                try:
                    apply(self.flat, patches if forwards else patches[::-1], 1 if forwards else -1)
                except ExactnessError as error:
                    raise _not_published(reached, error.got, error.allowed) from error
                self.at = reached
        return len(way)

    def check(self, digest: int) -> None:
        """Compare the running digest with that of the version where the copy is.

        Raises:
            ExactnessError: It is another one.
        """
        if self.flat.digest != digest:
            raise _not_published(self.at, _hexadecimal(self.flat.digest), _hexadecimal(digest))

    def check_bits(self, digest: int) -> None:
        """Compare all bits with a digest, in a pass over them.

        Raises:
            ExactnessError: They have another one.
        """
        found = self.flat.full_digest()
        if found != digest:
            raise _not_published(self.at, _hexadecimal(found), _hexadecimal(digest))


def _hexadecimal(digest: int | None) -> str:
    return "no digest: a change that broke off" if digest is None else f"digest {digest:016x}"


def _not_published(version: PolicyVersion, got: str, allowed: str) -> ExactnessError:
    return ExactnessError(
        f"the store's bits of version {version} are not those that were published",
        got=got,
        allowed=allowed,
        fix="its memory was written to or is faulty: open the store again from its folder, or resume from a checkpoint",
    )
