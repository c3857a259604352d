"""Retention: which versions are still needed, and the error for one that is gone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from oldlogits.core.errors import StoreUseError, VersionEvictedError
from oldlogits.core.weights import PolicyVersion


class Retention:
    """A version is needed while it is the newest, at or above the oldest that was asked for last, or held.

    Example:
        >>> retention = Retention()
        >>> retention.hold(2)
        >>> retention.oldest_needed = 4
        >>> retention.needed([1, 2, 3, 4, 5])
        [2, 4, 5]
    """

    def __init__(self) -> None:
        self.oldest_needed: PolicyVersion | None = None
        """The version that `retain` was last called with; None: all versions are needed."""
        self._holds: Counter[PolicyVersion] = Counter()

    def hold(self, version: PolicyVersion) -> None:
        """Count one more reference to a version."""
        self._holds[version] += 1

    def release(self, version: PolicyVersion) -> None:
        """Count one reference less to a version; a `StoreUseError` if it has none."""
        if not self._holds[version]:
            del self._holds[version]
            raise StoreUseError(
                f"version {version} was released more often than it was held",
                got="a release without a hold",
                allowed=f"held: {sorted(self._holds) or 'nothing'}",
                fix="call release(version) once for each hold(version)",
            )
        self._holds[version] -= 1
        if not self._holds[version]:
            del self._holds[version]

    def needed(self, versions: Iterable[PolicyVersion]) -> list[PolicyVersion]:
        """The versions that are needed, among those given in ascending order."""
        all_versions = list(versions)
        oldest, newest = self.oldest_needed, all_versions[-1:]
        return [v for v in all_versions if oldest is None or v >= oldest or v in self._holds or v in newest]


def check_held(version: PolicyVersion, versions: Sequence[PolicyVersion]) -> None:
    """Refuse a version that is not among those that a store has, ascending; the error names these, and the remedy."""
    if version not in versions:
        raise VersionEvictedError(
            f"version {version} is not in the store",
            got=f"version {version}",
            allowed=_spans(versions) or "nothing was published yet",
            fix="keep what tokens in flight need: call retain(oldest version in flight), or hold(version)",
        )


def check_ascends(version: PolicyVersion, versions: Sequence[PolicyVersion]) -> None:
    """Refuse to publish a version below the newest."""
    if versions and version < versions[-1]:
        raise StoreUseError(
            f"version {version} cannot follow version {versions[-1]}",
            got=f"version {version}",
            allowed=f"a version above {versions[-1]}",
            fix="publish versions in ascending order; after resuming from an older checkpoint, rewind(its version) first",
        )


def published_twice(version: PolicyVersion) -> StoreUseError:
    """The error for a newest version that is published again with other bits."""
    return StoreUseError(
        f"version {version} was published already, with other bits",
        got=f"a second version {version}",
        allowed=f"the same bits, or a version above {version}",
        fix="give every state of the weights a version of its own",
    )


def _spans(versions: Sequence[PolicyVersion]) -> str:
    """Write ascending versions in few words: ``4..6, 9``."""
    spans: list[tuple[int, int]] = []
    for version in versions:
        if spans and spans[-1][1] == version - 1:
            spans[-1] = (spans[-1][0], version)
        else:
            spans.append((version, version))
    return ", ".join(f"{first}..{last}" if last > first else str(first) for first, last in spans)
