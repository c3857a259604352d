"""Exact versions of the forward weights."""

from oldlogits.versions.store import FullCopyStore

__all__ = ["FullCopyStore"]
