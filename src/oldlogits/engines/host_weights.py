"""The weights that a run gives to the engines of this host: one copy in shared memory, taken over by all of them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Protocol

from torch import Tensor

from oldlogits.core.errors import ReceiverBehindError
from oldlogits.core.weights import FullWeights, PatchWeights, PolicyVersion, WeightUpdate
from oldlogits.engines.http.messages import Json
from oldlogits.engines.shared_memory import shared_file
from oldlogits.versions import HostCopy


class HostWeights:
    """The newest version in a `HostCopy`: patches are applied to it, full weights replace it; `close` it when done."""

    def __init__(self) -> None:
        self._copy: HostCopy | None = None

    def take(self, update: WeightUpdate, version: PolicyVersion) -> Path:
        """Bring the copy to a version, once all engines have read the one before.

        Returns:
            The file, which engines open as `HostCopy` and read at `version`; the same one while names and shapes are.

        Raises:
            ReceiverBehindError: Patches do not lead on from what is held: give full weights.
        """
        if isinstance(update, PatchWeights):
            if self._copy is None:
                raise ReceiverBehindError(
                    "the receiver has no weights yet",
                    got=f"patches from version {update.base}",
                    allowed="full weights first",
                    fix="send the full weights of the version once",
                )
            self._copy.take(update.patches, update.base, version)
        elif not self._loaded(update, version):
            self.close()
            self._copy = HostCopy.create(shared_file(update.num_bytes), update.tensors, version)
        assert self._copy is not None
        return self._copy.path

    def _loaded(self, update: FullWeights, version: PolicyVersion) -> bool:
        """Whether full weights are in the copy that is there; a reader that hangs in it keeps its own, unlinked file."""
        if self._copy is None or not self._copy.fits(update.tensors):
            return False
        try:
            self._copy.load(update.tensors, version)
        except ReceiverBehindError:
            return False
        return True

    @contextmanager
    def read(self) -> Iterator[Mapping[str, Tensor]]:
        """The weights that are held, by name."""
        assert self._copy is not None, "weights were taken before"
        with self._copy.read(self._copy.version) as weights:
            yield weights

    def close(self) -> None:
        """Delete the file; who has it open keeps it."""
        if self._copy is not None:
            self._copy.path.unlink(missing_ok=True)
            self._copy = None


class WeightTransport(Protocol):
    """Brings weights to where servers read them."""

    @property
    def num_copies(self) -> int:
        """That it keeps."""
        ...

    async def take(self, update: WeightUpdate, version: PolicyVersion) -> Json:
        """Make a version ready; returns what servers are told of it.

        Raises:
            ReceiverBehindError: Patches do not lead on from what is there: give full weights.
        """
        ...

    def close(self) -> None:
        """Leave no file."""
        ...


class OnThisHost:
    """A `WeightTransport` for servers of this machine."""

    num_copies: Final = 1

    def __init__(self) -> None:
        self._weights = HostWeights()

    async def take(self, update: WeightUpdate, version: PolicyVersion) -> Json:
        """Bring this host's copy to a version."""
        path = await asyncio.to_thread(self._weights.take, update, version)
        return {"path": str(path), "version": version}

    def close(self) -> None:
        """Delete the copy."""
        self._weights.close()
