"""Weights on their way to another process of this machine: files in shared memory."""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Final
from zlib import crc32

from safetensors.torch import save_file
from torch import Tensor

_SHARED_MEMORY: Final = Path("/dev/shm")
_SUFFIX: Final = ".weights"


def share(tensors: Mapping[str, Tensor]) -> Path:
    """Write tensors to a new file in shared memory if it has room for them, else in the temporary folder.

    The reader deletes the file.
    """
    separate = _without_aliases(tensors)
    path = shared_file(sum(tensor.nbytes for tensor in separate.values()))
    try:
        save_file(separate, path)
    except BaseException:  # no room after all, or interrupted: leave no half file behind
        path.unlink()
        raise
    return path


def share_text(text: str) -> Path:
    """Write a text to a new file where weights would go; the writer deletes it."""
    path = shared_file(len(text))
    path.write_text(text, encoding="utf-8")
    return path


def is_shared(path: Path) -> bool:
    """Whether a path is one that `share` could have made: what another process may be asked to read."""
    own = path.name.startswith("oldlogits-") and path.suffix == _SUFFIX
    return own and path.parent in (_SHARED_MEMORY, Path(tempfile.gettempdir())) and not path.is_symlink()


def share_bytes(parts: Sequence[bytes | memoryview]) -> tuple[Path, tuple[int, ...]]:
    """Write bytes to a new file as `share` does; returns it and the length of each part, for `take_bytes`."""
    path = shared_file(sum(map(len, parts)))
    try:
        with path.open("wb") as file:
            file.writelines(parts)
    except BaseException:
        path.unlink()
        raise
    return path, tuple(map(len, parts))


def take_bytes(path: Path, lengths: Sequence[int]) -> tuple[memoryview, ...]:
    """What `share_bytes` wrote, mapped; the file is deleted, the mapping stays valid."""
    with path.open("r+b") as file:
        view = memoryview(mmap.mmap(file.fileno(), 0))
    path.unlink()
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    return tuple(view[end - length : end] for end, length in zip(ends, lengths, strict=True))


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


def _without_aliases(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors, each with a memory of its own, as safetensors wants them: a tied head is written twice."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():
        detached = tensor.detach()
        separate[name] = detached.clone() if detached.data_ptr() in seen else detached.contiguous()
        seen.add(detached.data_ptr())
    return separate
