"""Weights on their way to another process of this machine: a safetensors file in shared memory."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from safetensors.torch import save_file
from torch import Tensor

_SHARED_MEMORY: Final = Path("/dev/shm")
_SUFFIX: Final = ".safetensors"


def share(tensors: Mapping[str, Tensor]) -> Path:
    """Write tensors to a new file in shared memory if it has room for them, else in the temporary folder.

    The reader deletes the file.
    """
    separate = _without_aliases(tensors)
    num_bytes = sum(tensor.nbytes for tensor in separate.values())
    fits = _SHARED_MEMORY.is_dir() and shutil.disk_usage(_SHARED_MEMORY).free > 1.1 * num_bytes
    prefix = f"oldlogits-{os.getpid()}-"
    handle, name = tempfile.mkstemp(prefix=prefix, suffix=_SUFFIX, dir=_SHARED_MEMORY if fits else None)
    os.close(handle)
    path = Path(name)
    try:
        save_file(separate, path)
    except BaseException:  # no room after all, or interrupted: leave no half file behind
        path.unlink()
        raise
    return path


def share_text(text: str) -> Path:
    """Write a text to a new file where weights would go; the writer deletes it."""
    folder = _SHARED_MEMORY if _SHARED_MEMORY.is_dir() else None
    handle, name = tempfile.mkstemp(prefix=f"oldlogits-{os.getpid()}-", suffix=_SUFFIX, dir=folder)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    return Path(name)


def is_shared(path: Path) -> bool:
    """Whether a path is one that `share` could have made: what another process may be asked to read."""
    own = path.name.startswith("oldlogits-") and path.suffix == _SUFFIX
    return own and path.parent in (_SHARED_MEMORY, Path(tempfile.gettempdir())) and not path.is_symlink()


def unshare(pid: int) -> None:
    """Delete the files of a process that was stopped before their reader could."""
    for folder in (_SHARED_MEMORY, Path(tempfile.gettempdir())):
        for path in folder.glob(f"oldlogits-{pid}-*{_SUFFIX}"):
            path.unlink(missing_ok=True)


def _without_aliases(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors, each with a memory of its own, as safetensors wants them: a tied head is written twice."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():
        detached = tensor.detach()
        separate[name] = detached.clone() if detached.data_ptr() in seen else detached.contiguous()
        seen.add(detached.data_ptr())
    return separate
