"""Versions that lie in folders which another process writes: safetensors of whole models, or of adapters.

Whoever writes them may be anybody: what is not a plain file of tensors is refused, and nothing is unpickled.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from oldlogits.core.errors import StoreDamagedError, VersionEvictedError, reading
from oldlogits.core.weights import PolicyVersion
from oldlogits.models.finite import check_finite

_PEFT_PREFIX = "base_model.model."


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Read the tensors of all safetensors files of a folder.

    Raises:
        StoreDamagedError: There is none, one is a link, damaged, or absent though an index names its tensors, or two hold
            tensors of one name.
        ModelFolderError: A weight is NaN or infinite.
    """
    found: dict[str, Tensor] = {}
    paths = sorted(folder.glob("*.safetensors"))
    for path in paths:
        if path.is_symlink() or not path.is_file():
            raise _refused(path, "a link, or no file", "plain safetensors files")
        with reading(StoreDamagedError, "a file of weights cannot be read", got=str(path), allowed="safetensors", fix=_AGAIN):
            tensors = load_file(path)
        if twice := sorted(found.keys() & tensors.keys()):
            raise _refused(path, f"{twice[0]} a second time", "each tensor in one file")
        found |= tensors
    if not found:
        raise _refused(folder, f"{len(paths)} safetensors files with no tensor", "safetensors files with the weights")
    for index in sorted(folder.glob("*.safetensors.index.json")):
        with reading(StoreDamagedError, "the index of weights cannot be read", got=str(index), allowed="JSON", fix=_AGAIN):
            named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        if absent := sorted(named - found.keys()):
            raise _refused(folder, f"no file with {absent[0]}, which {index.name} names", "all files of a version")
    check_finite(found, folder)
    return found


_AGAIN = "let the trainer write that version again, or leave its tokens out"


def _refused(path: Path, got: str, allowed: str) -> StoreDamagedError:
    return StoreDamagedError(f"{path} holds no weights that can be used", got=got, allowed=allowed, fix=_AGAIN)


class StepFolders:
    """The versions that a folder holds as folders of their own, named by number.

    Args:
        folder: Holds them.
        prefix: What their names begin with; the number follows.
        marker: The file whose presence says that a folder is whole; empty: a folder is renamed into place when it is.
    """

    def __init__(self, folder: Path, *, prefix: str, marker: str = "") -> None:
        self._folder, self._prefix, self._marker = folder, prefix, marker

    @property
    def versions(self) -> tuple[PolicyVersion, ...]:
        """The versions that are there and whole, ascending."""
        name = re.compile(re.escape(self._prefix) + r"(0|[1-9]\d{0,17})")
        entries = sorted(self._folder.iterdir()) if self._folder.is_dir() else []
        steps = ((name.fullmatch(entry.name), entry) for entry in entries)
        whole = (match for match, entry in steps if match and self._is_whole(entry))
        return tuple(sorted(int(match[1]) for match in whole))

    def read(self, version: PolicyVersion) -> dict[str, Tensor]:
        """Read the weights of a version by the names in its files.

        Raises:
            VersionEvictedError: It is not there, or not whole yet.
            StoreDamagedError: It cannot be read.
            ModelFolderError: A weight is NaN or infinite.
        """
        folder = self._folder / f"{self._prefix}{version}"
        if not self._is_whole(folder):
            raise VersionEvictedError(
                f"version {version} is not in {self._folder}",
                got=f"version {version}",
                allowed=", ".join(map(str, self.versions)) or "no version yet",
                fix="keep the folders of as many versions as tokens in flight may have",
            )
        return read_weights(folder)

    def _is_whole(self, folder: Path) -> bool:
        marker = folder / self._marker if self._marker else folder
        return folder.is_dir() and not folder.is_symlink() and marker.exists() and not marker.is_symlink()


class AdapterFolders:
    """Adapters of several versions on disk, which give the forward weights of a model that has them put in.

    A checkout reads one folder: megabytes. The names are those of a model in which peft's adapter is called `adapter`.
    """

    def __init__(self, steps: StepFolders, *, adapter: str = "default") -> None:
        self._steps, self._adapter = steps, adapter

    @contextmanager
    def checkout(self, version: PolicyVersion) -> Iterator[Mapping[str, Tensor]]:
        """Give a version's adapters by the names of the model's parameters; see `StepFolders.read`."""
        tensors = self._steps.read(version)
        yield {self._named(name): tensor for name, tensor in tensors.items()}

    def retain(self, oldest_needed: PolicyVersion) -> list[PolicyVersion]:
        """Drop nothing: whoever writes the folders removes them."""
        return []

    def _named(self, name: str) -> str:
        return re.sub(r"\.(lora_[AB])\.weight$", rf".\1.{self._adapter}.weight", name.removeprefix(_PEFT_PREFIX))
