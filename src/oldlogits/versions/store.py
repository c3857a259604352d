"""Exact versions of the forward weights.

`FullCopyStore` keeps one full copy of every version that is still needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from oldlogits.core.errors import VersionEvictedError
from oldlogits.core.protocols import PolicyVersion


class FullCopyStore:
    """A `VersionStore` of full copies."""

    def __init__(self) -> None:
        self._copies: dict[PolicyVersion, Mapping[str, Tensor]] = {}

    @property
    def versions(self) -> tuple[PolicyVersion, ...]:
        """The versions that are held, ascending."""
        return tuple(sorted(self._copies))

    @property
    def num_bytes(self) -> int:
        """Bytes of all copies."""
        return sum(t.nbytes for copy in self._copies.values() for t in copy.values())

    def publish(self, version: PolicyVersion, weights: Mapping[str, Tensor]) -> None:
        """Store a copy of `weights` as `version`."""
        self._copies[version] = {name: tensor.detach().clone() for name, tensor in weights.items()}

    @contextmanager
    def checkout(self, version: PolicyVersion) -> Iterator[Mapping[str, Tensor]]:
        """The weights of `version`, for reading.

        Raises:
            VersionEvictedError: The version is not held.
        """
        if version not in self._copies:
            held = self.versions
            raise VersionEvictedError(
                f"version {version} is not in the store",
                got=f"version {version}",
                allowed=f"{held[0]}..{held[-1]}" if held else "nothing was published yet",
                fix="retain versions as long as tokens of theirs are in flight: call retain(oldest version in flight)",
            )
        yield self._copies[version]

    def retain(self, oldest_needed: PolicyVersion) -> list[PolicyVersion]:
        """Drop the versions below `oldest_needed`, but never the newest; returns those dropped."""
        dropped = [v for v in self.versions[:-1] if v < oldest_needed]
        for version in dropped:
            del self._copies[version]
        return dropped
