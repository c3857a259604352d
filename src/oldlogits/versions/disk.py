"""The versions of a store on disk: one full copy, and the patches that lead from it to older and to newer versions.

    owner.lock               held with flock by the one owner; names its process
    versions.json            the manifest: what the folder holds, written anew at every change, by a rename
    12-89abcdef.copy         all bits of version 12; its checksum is in the name of every file
    13-01234567.patch        the patch to version 13 from the version before

A file counts once the manifest names it. So a kill at any moment leaves the versions before the change or those after it, and
what was being written is a file that nobody names, which is removed. A file that is not what was written is damage: an error
names it, and nothing of it is ever returned.

The store on disk can be opened again, rewound and verified: this is what a run needs to go on from its own versions.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import weakref
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Final, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from oldlogits.core.errors import StoreBusyError, StoreDamagedError, StoreUseError, StoreWriteError
from oldlogits.core.weights import PolicyVersion
from oldlogits.versions.defer_sigint import defer_sigint
from oldlogits.versions.patches.flat import FlatWeights, check_fingerprints, fingerprint
from oldlogits.versions.patches.layout import Layout

FORMAT: Final = 1
"""Version of the format of the folder."""
_LENGTH: Final = struct.Struct("<I")


class StoredFile(NamedTuple):
    """A patch on disk, or a full copy, which leads from its version to itself.

    Args:
        base: The version that the file leads from.
        base_digest: The digest of that version.
        target: The version that it leads to.
        target_digest: The digest of that one.
        num_bytes: The size of the file.
        checksum: The CRC-32 of its bytes.
    """

    base: PolicyVersion
    base_digest: int
    target: PolicyVersion
    target_digest: int
    num_bytes: int
    checksum: int

    @property
    def name(self) -> str:
        """The name of the file."""
        return f"{self.target}-{self.checksum:08x}.{'copy' if self.base == self.target else 'patch'}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a folder holds.

    Args:
        copy: The full copy.
        patches: The patches, ascending, each from the version that the one before leads to.
        oldest: The oldest version that is needed; what is older only leads to it.
        frozen: What identifies each frozen tensor, by name; no bits of these are written.
    """

    copy: StoredFile
    patches: tuple[StoredFile, ...] = ()
    oldest: PolicyVersion
    frozen: Mapping[str, str] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """The manifest as a line with a checksum, and JSON."""
        text = json.dumps({"format": FORMAT, **asdict(self)}).encode()
        return b"%08x\n" % zlib.crc32(text) + text

    @classmethod
    def from_bytes(cls, content: bytes) -> Manifest | None:
        """Read what `to_bytes` wrote; None: it is not that."""
        checksum, _, text = content.partition(b"\n")
        if checksum != b"%08x" % zlib.crc32(text) or (found := json.loads(text)).pop("format") != FORMAT:
            return None
        patches = tuple(StoredFile(*row) for row in found.pop("patches"))
        return cls(copy=StoredFile(*found.pop("copy")), patches=patches, **found)


class Disk:
    """One owner's folder of versions; make it with `create` or `open`. One thread uses it at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._path = folder, folder / "versions.json"
        self._lock = weakref.finalize(self, os.close, _own(folder))
        self._manifest: Manifest | None = None
        self.cut: str | None = None

    @classmethod
    def create(cls, folder: Path) -> Self:
        """Become the owner of a folder without versions; a `StoreWriteError` if it has some."""
        disk = cls(folder)
        if disk._path.exists():
            disk.close()
            what, fix = f"{folder} holds versions already", "open it to go on from what it holds, or give another folder"
            raise StoreWriteError(what, got=disk._path.name, allowed="a folder without versions", fix=fix)
        return disk

    @classmethod
    def open(cls, folder: Path, *, cut_damage: bool = False) -> Self:
        """Become the owner of a folder's versions, and check every file.

        With `cut_damage` a damaged patch is given up with all that lead on from it, away from the full copy; `cut` tells of it.
        Without it such a file is a `StoreDamagedError`, as are always a damaged manifest or copy and a folder without versions.
        """
        if not (folder / "versions.json").is_file():
            what, got = f"{folder} holds no versions", "no versions.json"
            raise StoreDamagedError(what, got=got, allowed="the folder of a store", fix="publish to it first")
        disk = cls(folder)
        try:
            disk._check(cut_damage=cut_damage)
        except BaseException:
            disk.close()
            raise
        return disk

    @classmethod
    def clear(cls, folder: Path) -> None:
        """Remove the versions of a folder that has no owner; other files stay."""
        with contextlib.closing(cls(folder)) as disk:
            disk._path.unlink(missing_ok=True)  # first: without it there are no versions
            disk._remove_unnamed()

    @property
    def held(self) -> Manifest:
        """What the folder holds, once a version was published."""
        assert self._manifest is not None, "there is a manifest once a version was published"
        return self._manifest

    def begin(self, version: PolicyVersion, flat: FlatWeights) -> None:
        """Write the first version."""
        frozen = {name: fingerprint(name, tensor) for name, tensor in flat.frozen.items()}
        self._commit(Manifest(copy=self._write_copy(version, flat), oldest=version, frozen=frozen))

    def append(self, patch: StoredFile, content: bytes | memoryview) -> StoredFile:
        """Write the patch to a new version, wholly or not at all; returns it with its size and checksum."""
        patch = self._write(patch, [content])
        self._commit(replace(self.held, patches=(*self.held.patches, patch)))
        return patch

    def drop(self, oldest: PolicyVersion, at: PolicyVersion, flat: FlatWeights) -> None:
        """Note that versions below `oldest` are not needed.

        Where most bytes of the patches are kept only to reach `oldest`, `flat` becomes the full copy, as version `at`. If the
        disk does not take the note, the folder holds more than is needed.
        """
        held = self.held
        held = replace(held, oldest=oldest, patches=_above(min(oldest, held.copy.target), held.patches))
        needed = _above(oldest, held.patches)
        needed_bytes, patch_bytes = (sum(patch.num_bytes for patch in patches) for patches in (needed, held.patches))
        try:
            if patch_bytes - needed_bytes > flat.num_bytes + needed_bytes:
                held = replace(held, copy=self._write_copy(at, flat), patches=needed)
            self._commit(held)
        except StoreWriteError:
            return

    def rewind(self, version: PolicyVersion, flat: FlatWeights) -> None:
        """Give up what is newer than `version`, which `flat` holds, wholly or not at all."""
        held = self.held
        copy = held.copy if held.copy.target <= version else self._write_copy(version, flat)
        patches = tuple(patch for patch in held.patches if patch.target <= version)
        self._commit(replace(held, copy=copy, patches=patches))

    def read(self, file: StoredFile) -> memoryview:
        """The bytes of a file; a `StoreDamagedError` if they are not those that were written."""
        self._check_open()
        try:
            content = np.fromfile(self._folder / file.name, np.uint8)
        except OSError as error:
            raise self._damaged(file.name, str(error)) from error
        if len(content) != file.num_bytes or zlib.crc32(content.data) != file.checksum:
            raise self._damaged(file.name, f"{len(content)} bytes, of {file.num_bytes}, or another checksum")
        return content.data

    def read_copy(self, frozen: Mapping[str, Tensor], device: torch.device | str | None) -> FlatWeights:
        """Read the full copy, to a device; a `LayoutError` if `frozen` are not the tensors that it was published with."""
        held = self.held
        view = self.read(held.copy)
        (length,) = _LENGTH.unpack_from(view)
        start = _LENGTH.size + length
        layout = Layout.from_json(bytes(view[_LENGTH.size : start]))
        check_fingerprints(held.frozen, frozen)
        flat = FlatWeights.empty(layout, device=device or "cpu", frozen=frozen)
        for dtype in layout.dtypes:
            words = flat.words(dtype)
            if words.numel():
                words.copy_(torch.frombuffer(view[start : start + words.nbytes], dtype=words.dtype))
            start += words.nbytes
        flat.digest = held.copy.target_digest
        return flat

    def close(self) -> None:
        """Give the folder up; a second call does nothing."""
        self._lock()

    def _check(self, *, cut_damage: bool) -> None:
        """Read the manifest, check all files that it names, and remove those that it does not."""
        held = Manifest.from_bytes(self._path.read_bytes())
        if held is None:
            raise self._damaged(self._path.name, "another checksum, or another format")
        self.read(held.copy)
        ways = [p for p in held.patches if p.target <= held.copy.target][::-1], _above(held.copy.target, held.patches)
        kept: list[StoredFile] = []
        for way in ways:
            try:
                for patch in way:
                    self.read(patch)
                    kept.append(patch)
            except StoreDamagedError as error:
                if not cut_damage:
                    raise
                self.cut = error.what
        self._manifest = held
        if self.cut is None:
            return self._remove_unnamed()
        newest = max(held.copy.target, *(patch.target for patch in kept)) if kept else held.copy.target
        self._commit(replace(held, patches=tuple(sorted(kept)), oldest=min(held.oldest, newest)))

    def _write_copy(self, version: PolicyVersion, flat: FlatWeights) -> StoredFile:
        digest = flat.digest
        assert digest is not None, "a copy is written of a version"
        text = flat.layout.to_json().encode()
        buffers = (flat.words(dtype).cpu().numpy().view(np.uint8) for dtype in flat.layout.dtypes)
        copy = StoredFile(version, digest, version, digest, 0, 0)
        return self._write(copy, [_LENGTH.pack(len(text)), text, *(buffer.data for buffer in buffers if buffer.size)])

    def _write(self, file: StoredFile, parts: Sequence[bytes | memoryview]) -> StoredFile:
        """Write a file that the manifest does not name yet; returns it with its size and checksum."""
        self._check_open()
        num_bytes, checksum = 0, 0
        for part in parts:
            num_bytes, checksum = num_bytes + memoryview(part).nbytes, zlib.crc32(part, checksum)
        file = file._replace(num_bytes=num_bytes, checksum=checksum)
        self._put(self._folder / file.name, parts)
        return file

    def _commit(self, manifest: Manifest) -> None:
        """Let a manifest take effect, by a rename, and remove the files that it does not name."""
        self._check_open()
        with defer_sigint():
            partial = self._path.with_suffix(".partial")
            self._put(partial, [manifest.to_bytes()])
            try:
                os.replace(partial, self._path)
            except OSError as error:
                raise _not_written(self._path, error) from error
            self._manifest = manifest
            with contextlib.suppress(OSError):  # it has taken effect: a power failure undoes the whole of it or nothing
                _sync(self._folder)
            self._remove_unnamed()

    def _remove_unnamed(self) -> None:
        """Remove the files that the manifest does not name; what cannot be removed is tried again at the next change."""
        held = self._manifest
        names = set() if held is None else {file.name for file in (held.copy, *held.patches)}
        for path in (path for kind in ("*-*.patch", "*-*.copy", "*.partial") for path in list(self._folder.glob(kind))):
            if path.name not in names:
                with contextlib.suppress(OSError):
                    path.unlink()

    def _put(self, path: Path, parts: Iterable[bytes | memoryview]) -> None:
        """Write a file and bring it to the disk; a `StoreWriteError` leaves none."""
        try:
            with path.open("wb") as file:
                for part in parts:
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            path.unlink(missing_ok=True)
            raise _not_written(path, error) from error

    def _check_open(self) -> None:
        if not self._lock.alive:
            what, fix = f"the store in {self._folder} is closed", "open it again"
            raise StoreUseError(what, got="a call after close()", allowed="calls before it", fix=fix)

    def _damaged(self, name: str, found: str) -> StoreDamagedError:
        return StoreDamagedError(
            f"{name} of {self._folder} is damaged",
            got=found,
            allowed="the bytes that were written",
            fix="restore the file from a copy, or open the store with cut_damage=True to give up a patch and what follows it",
        )


def _above(version: PolicyVersion, patches: Iterable[StoredFile]) -> tuple[StoredFile, ...]:
    return tuple(patch for patch in patches if patch.target > version)


def _own(folder: Path) -> int:
    """Make a folder if there is none; returns an open file that locks it until it is closed or the process ends."""
    import fcntl  # Unix alone has it

    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / "owner.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.pwrite(lock, f"{os.getpid():<20}\n".encode(), 0)
    except BlockingIOError:
        owner = os.pread(lock, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(lock)
        raise StoreBusyError(
            f"the versions in {folder} have an owner",
            got=f"a second owner, process {os.getpid()}; the first is process {owner}",
            allowed="one owner at a time",
            fix=f"end process {owner} or close its store, or give another folder",
        ) from None
    except BaseException:
        os.close(lock)
        raise
    return lock


def _not_written(path: Path, error: OSError) -> StoreWriteError:
    return StoreWriteError(
        f"{path} could not be written",
        got=str(error),
        allowed="a disk with room for it",
        fix="free space on that disk and publish again; what was published before is intact",
    )


def _sync(folder: Path) -> None:
    """Put the names of a folder's files on the disk."""
    file = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)
