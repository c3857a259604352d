"""The patches between the versions of a store, each in one of three tiers: raw, compressed, or on disk only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from oldlogits.core.errors import PatchError
from oldlogits.core.weights import PolicyVersion
from oldlogits.versions.disk.log import Record, VersionLog
from oldlogits.versions.disk.records import Step, read_step
from oldlogits.versions.patches.patch import Patch


@dataclass(slots=True, kw_only=True)
class Link:
    """The patch between two consecutive versions; at least one of `raw`, `cold` and `record` is there.

    Args:
        step: From which version and bits to which bits.
        target: To which version.
        raw: The memory tier: fast to apply.
        cold: The compressed tier.
        record: Where it lies in the log.
        is_incompressible: The compressed tier would take more than the memory tier; such a patch stays as it is.
    """

    step: Step
    target: PolicyVersion
    raw: Patch | None = None
    cold: bytes | None = None
    record: Record | None = None
    is_incompressible: bool = False

    @property
    def base(self) -> PolicyVersion:
        """From which version."""
        return self.step.base

    @property
    def num_bytes(self) -> int:
        """What it takes in memory."""
        return (self.raw.num_bytes if self.raw is not None else 0) + (len(self.cold) if self.cold is not None else 0)


class Chain:
    """Links in the order of their versions.

    Args:
        log: Where links that are on disk are read from.
        links: Those that are there already.
    """

    def __init__(self, log: VersionLog | None = None, links: Sequence[Link] = ()) -> None:
        self._log, self.links = log, list(links)

    @property
    def num_bytes(self) -> int:
        """What all links take in memory."""
        return sum(link.num_bytes for link in self.links)

    def bytes_above(self, oldest: PolicyVersion) -> int:
        """What the links between `oldest` and the newest version take in memory."""
        return sum(link.num_bytes for link in self.links if link.target > oldest)

    def between(self, a: PolicyVersion, b: PolicyVersion) -> list[Link]:
        """The links between two versions, oldest first."""
        low, high = min(a, b), max(a, b)
        return [link for link in self.links if low < link.target <= high]

    def keep_above(self, oldest: PolicyVersion) -> None:
        """Drop the links that lead to `oldest` and to what is older."""
        self.links = [link for link in self.links if link.target > oldest]

    def keep_below(self, newest: PolicyVersion) -> None:
        """Drop the links that lead to what is newer than `newest`."""
        self.links = [link for link in self.links if link.target <= newest]

    def patch(self, link: Link) -> Patch:
        """A link's patch, from the fastest tier that has it; the link stays as it is.

        Raises:
            PatchError: Its bytes are not those that were written.
            LogDamagedError: The same, on disk.
        """
        if link.raw is not None:
            return link.raw
        try:
            return Patch.from_bytes(self.serialised(link))
        except PatchError as error:
            raise PatchError(
                f"the patch from version {link.base} to {link.target}: {error.what}",
                got=error.got,
                allowed=error.allowed,
                fix="its memory was written to or is faulty: open the store again from its folder, or resume from a checkpoint",
            ) from error

    def serialised(self, link: Link) -> bytes | memoryview:
        """A link's patch as bytes of the cold tier."""
        if link.cold is not None:
            return link.cold
        if link.record is not None and self._log is not None:
            return read_step(self._log.read(link.record))[1]
        assert link.raw is not None, "a link is in one tier at least"
        return link.raw.to_bytes("cold")

    def runs(self, way: Sequence[Link], most_bytes: int) -> Iterator[tuple[list[Link], list[Patch]]]:
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

    def cool(self, num_hot: int) -> int:
        """Compress all but the newest `num_hot` links; returns how many were."""
        count = 0
        for link in self.links[: max(0, len(self.links) - num_hot)]:
            if link.raw is not None and not link.is_incompressible:
                cold = bytes(self.serialised(link))
                link.is_incompressible = len(cold) >= link.raw.num_bytes
                if not link.is_incompressible:
                    link.cold, link.raw, count = cold, None, count + 1
        return count

    def spill(self, budget_bytes: int) -> tuple[int, int]:
        """Leave the oldest links on disk only, until the others fit; returns how many were spilled, and their bytes."""
        count, freed, excess = 0, 0, self.num_bytes - budget_bytes
        for link in self.links:
            if freed >= excess:
                break
            if link.record is not None and link.num_bytes:
                count, freed = count + 1, freed + link.num_bytes
                link.raw = link.cold = None
        return count, freed
