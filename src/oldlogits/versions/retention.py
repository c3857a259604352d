"""Which versions a store takes and gives: the errors for one that is gone, out of order, or there with other bits."""

from __future__ import annotations

from collections.abc import Sequence

from oldlogits.core.errors import StoreUseError, VersionEvictedError
from oldlogits.core.weights import PolicyVersion


def check_held(version: PolicyVersion, versions: Sequence[PolicyVersion]) -> None:
    """Refuse a version that is not among those that a store has, ascending; the error names these, and the remedy."""
    if version not in versions:
        raise VersionEvictedError(
            f"version {version} is not in the store",
            got=f"version {version}",
            allowed=_spans(versions) or "nothing was published yet",
            fix="keep what tokens in flight need: call retain(oldest version in flight)",
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
