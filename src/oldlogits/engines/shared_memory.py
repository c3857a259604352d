"""Weights on their way to other processes of this machine: files in shared memory.

`HostWeights` is the one copy that all engines of a host take over; `share_bytes` makes a file for one reader.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Final, Protocol
from zlib import crc32

from torch import Tensor

from oldlogits.core.errors import ReceiverBehindError, writing
from oldlogits.core.server import SharedWeights
from oldlogits.core.weights import FullWeights, PatchWeights, PolicyVersion, WeightUpdate
from oldlogits.versions import HostCopy, begin_numba

_SHARED_MEMORY: Final = Path("/dev/shm")
_SUFFIX: Final = ".weights"
_ALIGNMENT: Final = 64
"""Each part of a file begins at a multiple of so many bytes."""


class HostWeights:
    """The newest version in a `HostCopy`: patches are applied to it, full weights replace it; `close` it when done."""

    def __init__(self) -> None:
        self._copy: HostCopy | None = None

    def take(self, update: WeightUpdate, version: PolicyVersion) -> Path:
        """Bring the copy to a version, once all engines have read the one before.

        Returns:
            The file, which engines open as `HostCopy` and read at `version`; the same one while names and shapes are.
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
            begin_numba(update.tensors)
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
        """How many copies of the weights it keeps."""

    async def take(self, update: WeightUpdate, version: PolicyVersion) -> SharedWeights:
        """Make a version ready, and return where servers find it; patches that do not lead on are a `ReceiverBehindError`."""

    def close(self) -> None:
        """Leave no file."""


class OnThisHost:
    """A `WeightTransport` for servers of this machine."""

    num_copies: Final = 1

    def __init__(self) -> None:
        self._weights = HostWeights()

    async def take(self, update: WeightUpdate, version: PolicyVersion) -> SharedWeights:
        """Bring this host's copy to a version."""
        path = await asyncio.to_thread(self._weights.take, update, version)
        return SharedWeights(path=path, version=version)

    def close(self) -> None:
        """Delete the copy."""
        self._weights.close()


def share_text(text: str) -> Path:
    """Write a text to a new file where weights would go; the writer deletes it."""
    path = shared_file(len(text))
    path.write_bytes(text.encode())
    return path


def is_shared(path: Path) -> bool:
    """Whether a path is one that `shared_file` could have made: what another process may be asked to read."""
    own = path.name.startswith("oldlogits-") and path.suffix == _SUFFIX and "\0" not in path.name and len(path.name) < 256
    return own and path.parent in (_SHARED_MEMORY, Path(tempfile.gettempdir())) and not path.is_symlink()


def says(path: Path, text: str) -> bool:
    """Whether a file is one that `share_text` could have made, and holds this text: then it was written on this machine."""
    own = is_shared(path) and path.is_file()
    return own and path.stat().st_size == len(content := text.encode()) and path.read_bytes() == content


def share_bytes(parts: Sequence[memoryview]) -> tuple[Path, tuple[int, ...]]:
    """Write bytes to a new file in shared memory if it has room for them, else in the temporary folder.

    Returns:
        The file, which its reader deletes, and the length of each part, for `take_bytes`.
    """
    path = shared_file(sum(len(part) + _ALIGNMENT for part in parts))
    try:
        with writing(path), path.open("wb") as file:
            for part in parts:
                file.write(part)
                file.seek(-file.tell() % _ALIGNMENT, os.SEEK_CUR)
    except BaseException:  # no room after all, or interrupted: leave no half file behind
        path.unlink()
        raise
    return path, tuple(map(len, parts))


def take_bytes(path: Path, lengths: Sequence[int]) -> tuple[memoryview, ...]:
    """What `share_bytes` wrote, mapped; the file is deleted, the mapping stays valid."""
    with path.open("r+b") as file:
        view = memoryview(mmap.mmap(file.fileno(), 0) if any(lengths) else b"")  # an empty file cannot be mapped
    path.unlink()
    starts = accumulate((length + -length % _ALIGNMENT for length in lengths), initial=0)
    return tuple(view[start : start + length] for start, length in zip(starts, lengths, strict=False))


def shared_file(num_bytes: int) -> Path:
    """A new, empty file of this process in shared memory if it has room for so many bytes, else in the temporary folder."""
    fits = _SHARED_MEMORY.is_dir() and shutil.disk_usage(_SHARED_MEMORY).free > 1.1 * num_bytes
    prefix = f"oldlogits-{os.getpid()}-{_machine()}-"
    handle, name = tempfile.mkstemp(prefix=prefix, suffix=_SUFFIX, dir=_SHARED_MEMORY if fits else None)
    os.close(handle)
    return Path(name)


def unshare(pid: int) -> None:
    """Delete the files of a process that was stopped before their reader could."""
    for path in _shared_files(f"oldlogits-{pid}-*{_SUFFIX}"):
        path.unlink(missing_ok=True)


def unshare_ended() -> None:
    """Delete the files of processes that were killed before they could: each is memory of this machine, as large as a model.

    Only of processes that this one would see if they lived: machines and containers may share a folder and not the process
    numbers.
    """
    for path in _shared_files(f"oldlogits-*-{_machine()}-*{_SUFFIX}"):
        pid = path.name.split("-")[1]
        if pid.isdecimal() and not _is_alive(int(pid)):
            with contextlib.suppress(OSError):  # it may be somebody else's
                path.unlink()


def _shared_files(pattern: str) -> Iterator[Path]:
    for folder in (_SHARED_MEMORY, Path(tempfile.gettempdir())):
        yield from folder.glob(pattern)


@cache
def _machine() -> int:
    """What tells process numbers of one machine or container from those of another; 0 where the system does not say."""
    try:
        boot, container = Path("/proc/sys/kernel/random/boot_id").read_bytes(), Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        return 0
    return crc32(boot + str(container).encode())


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True
