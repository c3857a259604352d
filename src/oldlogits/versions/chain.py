"""The resident copy of a store, and the patches that it goes along: each raw, compressed, or on disk only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from torch import Tensor

from oldlogits.core.errors import ExactnessError, PatchError
from oldlogits.core.weights import PolicyVersion
from oldlogits.versions.defer_sigint import defer_sigint
from oldlogits.versions.disk import Disk, StoredFile
from oldlogits.versions.patches.codec import apply, encode
from oldlogits.versions.patches.compose import compose
from oldlogits.versions.patches.flat import FlatWeights
from oldlogits.versions.patches.patch import Patch

_RUN_BYTES: Final = 1 << 20
"""Patches of a far jump are decoded and applied together up to so many bytes, or a quarter of the weights'."""
_REMEDY: Final = "its memory was written to or is faulty: open the store again from its folder, or resume from a checkpoint"


@dataclass(slots=True, kw_only=True)
class Link:
    """The patch between two consecutive versions; at least one of `raw`, `cold` and `file` is there.

    Args:
        base: The version that it leads from.
        target: The version that it leads to.
        raw: The memory tier: fast to apply.
        cold: The compressed tier.
        file: The patch on disk.
        is_incompressible: The compressed tier would take more than the memory tier; such a patch stays as it is.
    """

    base: PolicyVersion
    target: PolicyVersion
    raw: Patch | None = None
    cold: bytes | None = None
    file: StoredFile | None = None
    is_incompressible: bool = False

    @property
    def num_bytes(self) -> int:
        """Bytes of memory."""
        return (self.raw.num_bytes if self.raw is not None else 0) + (len(self.cold) if self.cold is not None else 0)


class Chain:
    """A resident copy, which holds the version `at`, and the links that it goes along, in the order of their versions.

    Args:
        flat: The copy.
        at: Its version.
        disk: The versions on disk, whose patches are the first links; None: there are none.
    """

    def __init__(self, flat: FlatWeights, at: PolicyVersion, disk: Disk | None = None) -> None:
        assert flat.digest is not None, "the copy holds a version"
        self.flat, self.at, self._disk = flat, at, disk
        files = disk.held.patches if disk is not None else ()
        self.links = [Link(base=file.base, target=file.target, file=file) for file in files]
        ends = {file.base: file.base_digest for file in files} | {file.target: file.target_digest for file in files}
        self.digests = dict(sorted(({at: flat.digest} | ends).items()))
        """The digests of all versions, ascending."""

    @property
    def versions(self) -> tuple[PolicyVersion, ...]:
        """The versions that can be reached, ascending."""
        return tuple(self.digests)

    @property
    def num_bytes(self) -> int:
        """Bytes of memory that all links take."""
        return sum(link.num_bytes for link in self.links)

    def absorb(self, version: PolicyVersion, weights: Mapping[str, Tensor]) -> Patch:
        """Take new bits, which become `version`, and add the patch that leads to them to the end of the chain."""
        with defer_sigint():
            return self._add(version, encode(self.flat, weights))

    def follow(self, version: PolicyVersion, patch: Patch) -> Patch:
        """Apply a patch that leads to `version`, and add it to the end of the chain; an error leaves all as it was."""
        with defer_sigint():
            apply(self.flat, [patch], 1)
            return self._add(version, patch)

    def agrees(self, weights: Mapping[str, Tensor]) -> bool:
        """Tell whether these weights have the bits that the copy has."""
        with defer_sigint():
            patch = encode(self.flat, weights)
            apply(self.flat, [patch], -1)
        return not patch.num_changed

    def precede(self, patches: Mapping[tuple[PolicyVersion, PolicyVersion], Patch]) -> None:
        """Put patches that lead to the first version before all links; a `PatchError` if they lead to other bits."""
        first = self.versions[0]
        reached, digest = first, self.digests[first]
        links = [Link(base=base, target=target, raw=patch) for (base, target), patch in patches.items()]
        for link in reversed(links):
            assert link.raw is not None, "it was just read"
            if link.target != reached or link.raw.target != digest:
                raise PatchError(
                    f"the patch from version {link.base} to {link.target} does not lead to version {reached}",
                    got=f"digest {link.raw.target:016x}",
                    allowed=f"digest {digest:016x}",
                    fix="resume from another checkpoint",
                )
            reached, digest = link.base, link.raw.base
        before = {link.base: link.raw.base for link in links if link.raw is not None}
        self.links, self.digests = links + self.links, before | self.digests

    def written(self, link: Link) -> bytes:
        """A link's patch as bytes of the tier that it is in."""
        return bytes(link.raw.to_bytes("memory") if link.raw is not None else self.serialised(link))

    def drop_below(self, oldest: PolicyVersion) -> None:
        """Drop the versions below `oldest`, and the links from them."""
        self.links = [link for link in self.links if link.target > oldest]
        self.digests = {version: digest for version, digest in self.digests.items() if version >= oldest}

    def bridge(self, base: PolicyVersion, target: PolicyVersion) -> None:
        """Drop the versions between two others, at none of which the copy is; one patch leads from the one to the other."""
        links = self.between(base, target)
        if len(links) > 1:
            at = self.links.index(links[0])
            joined = Link(base=base, target=target, raw=compose([self.patch(link) for link in links]))
            self.links[at : at + len(links)] = [joined]
        self.digests = {version: digest for version, digest in self.digests.items() if not base < version < target}

    def drop_above(self, newest: PolicyVersion) -> None:
        """Drop the versions above `newest`, and the links to them."""
        self.links = [link for link in self.links if link.target <= newest]
        self.digests = {version: digest for version, digest in self.digests.items() if version <= newest}

    def between(self, a: PolicyVersion, b: PolicyVersion) -> list[Link]:
        """The links between two versions, oldest first."""
        low, high = min(a, b), max(a, b)
        return [link for link in self.links if low < link.target <= high]

    def move_to(self, version: PolicyVersion) -> None:
        """Apply the patches on the way to `version`; an `ExactnessError` if they lead to other bits than were published."""
        forwards, way = version > self.at, self.between(self.at, version)
        for links, patches in self._runs(way if forwards else way[::-1], max(_RUN_BYTES, self.flat.num_bytes // 4)):
            reached = links[-1].target if forwards else links[-1].base
            with defer_sigint():
                try:
                    apply(self.flat, patches if forwards else patches[::-1], 1 if forwards else -1)
                except ExactnessError as error:
                    raise _not_published(reached, error.got, error.allowed) from error
                self.at = reached
        self.check(self.flat.digest)

    def check(self, found: int | None) -> None:
        """Refuse a digest of the copy's bits that is not the one they were published with (None: a change broke off)."""
        published = self.digests[self.at]
        if found != published:
            got = "no digest: a change that broke off" if found is None else f"digest {found:016x}"
            raise _not_published(self.at, got, f"digest {published:016x}")

    def patch(self, link: Link) -> Patch:
        """A link's patch, from the fastest tier that has it; an error if its bytes are not those that were written."""
        if link.raw is not None:
            return link.raw
        try:
            return Patch.from_bytes(self.serialised(link))
        except PatchError as error:
            what = f"the patch from version {link.base} to {link.target}: {error.what}"
            raise PatchError(what, got=error.got, allowed=error.allowed, fix=_REMEDY) from error

    def serialised(self, link: Link) -> bytes | memoryview:
        """A link's patch as bytes of the cold tier."""
        if link.cold is not None:
            return link.cold
        if link.file is not None and self._disk is not None:
            return self._disk.read(link.file)
        assert link.raw is not None, "a link is in one tier at least"
        return link.raw.to_bytes("cold")

    def save_memory(self, num_hot: int, budget_bytes: int | None) -> None:
        """Compress all but the newest links; over the budget compress all, then leave the oldest on disk only, if there."""
        self._compress(num_hot)
        if budget_bytes is None or self.num_bytes <= budget_bytes:
            return
        self._compress(0)
        excess = self.num_bytes - budget_bytes
        for link in self.links:
            if excess <= 0:
                break
            if link.file is not None:
                excess -= link.num_bytes
                link.raw = link.cold = None

    def _add(self, version: PolicyVersion, patch: Patch) -> Patch:
        self.links.append(Link(base=self.at, target=version, raw=patch))
        self.digests[version] = patch.target
        self.at = version
        return patch

    def _runs(self, way: Sequence[Link], most_bytes: int) -> Iterator[tuple[list[Link], list[Patch]]]:
        """The links of a way and their patches: as many at a time as take `most_bytes`, but at least one."""
        links, patches = list[Link](), list[Patch]()
        for link in way:
            patch = self.patch(link)
            if patches and sum(p.num_bytes for p in patches) + patch.num_bytes > most_bytes:
                yield links, patches
                links, patches = [], []
            links.append(link)
            patches.append(patch)
        if patches:
            yield links, patches

    def _compress(self, num_hot: int) -> None:
        for link in self.links[: max(0, len(self.links) - num_hot)]:
            if link.raw is not None and not link.is_incompressible:
                cold = bytes(self.serialised(link))
                link.is_incompressible = len(cold) >= link.raw.num_bytes
                if not link.is_incompressible:
                    link.cold, link.raw = cold, None


def _not_published(version: PolicyVersion, got: str, allowed: str) -> ExactnessError:
    what = f"the store's bits of version {version} are not those that were published"
    return ExactnessError(what, got=got, allowed=allowed, fix=_REMEDY)
