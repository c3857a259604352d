"""The newest weights by their Hugging Face names, once a host, in shared memory: what engines load from.

    trainer --patch or full weights--> HostCopy (one writer a host) <--map-- engine, engine, ...

Engines fuse and pad tensors, so a patch cannot be applied to theirs: it is applied here, its digest compared, and they load
what has changed from here. The file::

    prefix    magic, format version, length of the layout
    layout    JSON
    state     version, digest, whether it is whole      at a multiple of 64 bytes, as are
    buffers   one a dtype, in the layout's order
"""

from __future__ import annotations

import mmap
import os
import struct
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Self

import torch
from torch import Tensor

from oldlogits.core.errors import ExactnessError, LayoutError, PatchError, reading
from oldlogits.core.weights import PolicyVersion
from oldlogits.versions.patches.codec import apply
from oldlogits.versions.patches.flat import FlatWeights
from oldlogits.versions.patches.layout import ALIGNMENT, Layout
from oldlogits.versions.patches.patch import Patch, receiver_behind

LOCK_S: Final = 10.0
"""How long to wait for the other side: a process that was stopped within a read or a write must not stop the rest."""
_MAGIC: Final = b"oldhost\0"
_FORMAT: Final = 1
_PREFIX: Final = struct.Struct("<8sII")
_STATE: Final = struct.Struct("<qQ?7x")


class HostCopy:
    """One canonical copy of the weights in a file that processes of one host map; the one that did `create` it writes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        allowed, fix = "a whole file of HostCopy.create, with at least one tensor", "share the weights again"
        with reading(LayoutError, "a file is no copy of weights", got=str(path), allowed=allowed, fix=fix):
            self._open()

    def _open(self) -> None:
        self._file = os.open(self.path, os.O_RDWR)
        weakref.finalize(self, os.close, self._file)
        self._map = mmap.mmap(self._file, 0)
        if len(self._map) < _PREFIX.size or self._map[: len(_MAGIC)] != _MAGIC:
            raise ValueError("it begins otherwise")
        _, version, length = _PREFIX.unpack_from(self._map)
        if version != _FORMAT:
            what, fix = "a copy of weights of another format", "let the release that reads it write it"
            raise LayoutError(what, got=f"format {version}", allowed=f"format {_FORMAT}", fix=fix)
        layout = Layout.from_json(self._map[_PREFIX.size : _PREFIX.size + length])
        self._state_at, places, size = _places(layout, length)
        if len(self._map) != size or not layout.num_values:
            raise ValueError(f"{len(self._map)} bytes, of {layout.num_values} values that take {size}")
        buffers = {
            dtype: torch.frombuffer(self._map, dtype=dtype, count=layout.numel(dtype), offset=at)
            for dtype, at in places.items()
            if layout.numel(dtype)
        }
        self._flat = FlatWeights(layout, {d: buffers.get(d, torch.empty(0, dtype=d)) for d in layout.dtypes})

    @classmethod
    def create(cls, path: Path, weights: Mapping[str, Tensor], version: PolicyVersion) -> Self:
        """Make a file, best in shared memory, that holds `weights` as `version`; tied ones are kept once."""
        layout = Layout.of(weights)
        text = layout.to_json().encode()
        _, _, size = _places(layout, len(text))
        with path.open("wb") as file:
            file.write(_PREFIX.pack(_MAGIC, _FORMAT, len(text)) + text)
            file.truncate(size)
        copy = cls(path)
        copy.load(weights, version)
        return copy

    @property
    def version(self) -> PolicyVersion:
        """The version that is held."""
        return self._state()[0]

    def fits(self, weights: Mapping[str, Tensor]) -> bool:
        """Whether these have the names, shapes, dtypes and ties of what is held."""
        return Layout.of(weights) == self._flat.layout

    @contextmanager
    def read(self, version: PolicyVersion) -> Iterator[Mapping[str, Tensor]]:
        """Give the weights of `version` by name, for reading inside the block; the writer waits for its end.

        Raises:
            ReceiverBehindError: The copy holds another version, or its writer died while it wrote.
        """
        with self._locked(is_shared=True):
            self._check_holds(version)
            yield self._flat.weights

    def load(self, weights: Mapping[str, Tensor], version: PolicyVersion) -> None:
        """Take all weights anew: one copy. Nothing is written if they do not fit, or if a reader does not end."""
        with self._locked(is_shared=False), self._writing(version):
            self._flat.load(weights)

    def take(self, patches: Sequence[bytes | memoryview], base: PolicyVersion, version: PolicyVersion) -> int:
        """Apply patches, and compare the digest of what comes out with that of the version that was sent.

        Args:
            patches: Serialised patches, oldest first.
            base: The version that the first begins at.
            version: The version that the last leads to.

        Returns:
            The digest.

        Raises:
            ReceiverBehindError: This copy does not hold `base`, or a patch is damaged, or the digest differs, or a reader does
                not end: full weights are needed. The copy is as it was.
        """
        self._check_holds(base)
        try:
            read = [Patch.from_bytes(patch, layout=self._flat.layout) for patch in patches]
            with self._locked(is_shared=False), self._writing(version):
                return apply(self._flat, read)
        except (PatchError, LayoutError, ExactnessError) as error:
            raise receiver_behind(str(error), f"patches from version {base} to {version}, as they were written") from error

    def _check_holds(self, version: PolicyVersion) -> None:
        held, _, is_whole = self._state()
        if held != version or not is_whole:
            raise receiver_behind(f"version {held}{'' if is_whole else ', half written'}", f"version {version}")

    def _state(self) -> tuple[PolicyVersion, int, bool]:
        version, digest, is_whole = _STATE.unpack_from(self._map, self._state_at)
        return version, digest, is_whole

    def _put_state(self, version: PolicyVersion, digest: int, is_whole: bool) -> None:
        _STATE.pack_into(self._map, self._state_at, version, digest, is_whole)

    @contextmanager
    def _writing(self, version: PolicyVersion) -> Iterator[None]:
        """Note that the block leads to `version`; if it fails and the bits are as they were, so is the state."""
        before, digest, was_whole = self._state()
        self._put_state(before, digest, False)
        try:
            yield
        except BaseException:
            self._put_state(before, digest, was_whole and self._flat.digest == digest)
            raise
        assert self._flat.digest is not None
        self._put_state(version, self._flat.digest, True)

    @contextmanager
    def _locked(self, *, is_shared: bool) -> Iterator[None]:
        import fcntl  # Unix alone has it

        deadline, kind = time.monotonic() + LOCK_S, fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX
        while True:
            try:
                fcntl.flock(self._file, kind | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise receiver_behind(f"a process that has held it for {LOCK_S:g} s", "nobody else in it") from None
                time.sleep(0.001)
        try:
            yield
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)


def _places(layout: Layout, length: int) -> tuple[int, dict[torch.dtype, int], int]:
    """Give the places of the state and of each buffer, and the size of the file."""
    state_at = _aligned(_PREFIX.size + length)
    at = _aligned(state_at + _STATE.size)
    places = {}
    for dtype in layout.dtypes:
        places[dtype] = at
        at = _aligned(at + layout.numel(dtype) * dtype.itemsize)
    return state_at, places, at


def _aligned(at: int) -> int:
    return -(-at // ALIGNMENT) * ALIGNMENT
