"""Files that hold pickles: read as tensors alone where that suffices, and unpickled only where the user trusts them."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import torch

from oldlogits.core.errors import TokenTableError, reading


def load_torch(path: Path, *, trust: bool) -> object:
    """What ``torch.save`` has written: tensors, lists and dictionaries; other objects only with `trust`.

    Raises:
        TokenTableError: The file is damaged, or holds other objects and is not trusted.
    """
    with reading(TokenTableError, f"{path} cannot be read", got=path.name, allowed="a file of torch.save", fix="write it anew"):
        _check_stored(path)
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            if not trust:
                raise _untrusted(path, "objects other than tensors, lists and dictionaries") from error
            return torch.load(path, map_location="cpu", weights_only=False)


def _check_stored(path: Path) -> None:
    """Refuse compressed entries, which `torch.save` does not write: a small file may claim any amount of memory with them.

    Raises:
        ValueError: An entry is compressed.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if packed := [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]:
                raise ValueError(f"a compressed entry, {packed[0]}")


def unpickle(path: Path, *, trust: bool) -> object:
    """What ``pickle.dump`` has written; classes of SkyRL need not be installed.

    Raises:
        TokenTableError: The file is damaged, or not trusted.
    """
    if not trust:
        raise _untrusted(path, "a pickle")
    allowed, fix = "a whole pickle", "write it anew"
    with (
        reading(TokenTableError, f"{path} cannot be unpickled", got=path.name, allowed=allowed, fix=fix),
        path.open("rb") as file,
    ):
        return _Unpickler(file).load()


class _Unpickler(pickle.Unpickler):
    """Gives the state of SkyRL's batches, without SkyRL."""

    def find_class(self, module: str, name: str) -> object:
        if module.startswith(("skyrl", "skyrl_train")):
            return _state if name.startswith("_rebuild") else _Absent
        return super().find_class(module, name)


class _Absent:
    """Stands for a class that is not installed."""


def _state(_: type, state: object) -> object:
    return state


def _untrusted(path: Path, got: str) -> TokenTableError:
    return TokenTableError(
        f"{path} would have to be unpickled, which runs whatever code it names",
        got=got,
        allowed="files of tensors, JSON and Parquet",
        fix="pass --trust if you or your own trainer wrote it",
    )
