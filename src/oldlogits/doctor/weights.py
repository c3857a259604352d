"""The weights of versions, as a user has them: a store of patches, checkpoints, or adapters beside their base."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Final, Protocol

from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from oldlogits.core.errors import ConfigError, ModelFolderError, reading
from oldlogits.models.adapters import merged
from oldlogits.models.load import load_model, named_weights, point_at
from oldlogits.run.checkpoint import NamedModel
from oldlogits.versions.store import PatchStore

_NUMBER: Final = re.compile(r"(\d{1,9})$")
_ADAPTER: Final = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.[^.]+)?\.weight$")


_UNKNOWN: Final = ("rank_pattern", "alpha_pattern", "use_dora", "fan_in_fan_out", "lora_bias")
"""Settings of PEFT under which a product is scaled or laid out otherwise."""


class WeightsOfVersions(Protocol):
    """Models by version."""

    @property
    def versions(self) -> tuple[int, ...]:
        """The versions that are there, ascending."""

    def at(self, version: int) -> AbstractContextManager[PreTrainedModel]:
        """The model of a version, for reading inside the block only."""


def open_weights(path: Path, model: str | None) -> WeightsOfVersions:
    """Find out what a folder holds.

    Args:
        path: A `PatchStore`'s folder, or one whose folders have names that end in a version: checkpoints, or adapters; a run.
        model: The model of a store's weights, the base of adapters, or version 0 beside checkpoints: a model folder or a run.

    Raises:
        ConfigError: It holds neither, or `model` is needed.
        ModelFolderError: A model cannot be loaded.
    """
    if (path / "versions.json").is_file():
        return _Store(path, _base(path, model))
    folders = _numbered(path / "checkpoints" if (path / "checkpoints").is_dir() else path)
    if any((folder / "adapter_config.json").is_file() for folder in folders.values()):
        return _Adapters(folders, _base(path, model))
    checkpoints = {version: found for version, folder in folders.items() if (found := _model_in(folder)) is not None}
    if checkpoints:
        start = {} if model is None else {0: Path(NamedModel.find(model).path)}
        return _Checkpoints(start | checkpoints)
    inside = ", ".join(sorted(entry.name for entry in path.iterdir())[:5]) if path.is_dir() else "no folder"
    raise ConfigError(
        f"{path} holds no weights of versions",
        got=inside or "an empty folder",
        allowed="a PatchStore's folder; folders whose names end in a version, each with a model or an adapter",
        fix="name the store with --model FOLDER, or the folder of the checkpoints",
    )


class _Store:
    """Versions of a patch store, which the doctor owns while it reads."""

    def __init__(self, path: Path, model: PreTrainedModel) -> None:
        self._store, self._model = PatchStore.open(path), model
        known = set(named_weights(model))
        with self._store.checkout(self._store.versions[-1]) as weights:
            if unknown := sorted(set(weights) ^ known):
                raise ConfigError(
                    f"the versions of {path} are not of this model",
                    got=f"{len(unknown)} names that only one of them has, such as {unknown[0]}",
                    allowed="the model that was trained, all of its weights",
                    fix="name its folder with --model",
                )

    @property
    def versions(self) -> tuple[int, ...]:
        return self._store.versions

    @contextmanager
    def at(self, version: int) -> Iterator[PreTrainedModel]:
        with self._store.checkout(version) as weights:
            point_at(self._model, weights)
            yield self._model


class _Checkpoints:
    """A model folder a version."""

    def __init__(self, folders: Mapping[int, Path]) -> None:
        self._folders = folders

    @property
    def versions(self) -> tuple[int, ...]:
        return tuple(sorted(self._folders))

    @contextmanager
    def at(self, version: int) -> Iterator[PreTrainedModel]:
        yield load_model(self._folders[version])


class _Adapters:
    """PEFT's adapters of a version, merged into one base."""

    def __init__(self, folders: Mapping[int, Path], base: PreTrainedModel) -> None:
        self._folders, self._model = folders, base
        self._base = {name: weight.clone() for name, weight in named_weights(base).items()}

    @property
    def versions(self) -> tuple[int, ...]:
        return tuple(sorted(self._folders))

    @contextmanager
    def at(self, version: int) -> Iterator[PreTrainedModel]:
        point_at(self._model, self._merged(self._folders[version]))
        yield self._model

    def _merged(self, folder: Path) -> dict[str, Tensor]:
        allowed, fix = "a LoRA adapter of this base, as PEFT saves it", "name its base with --model"
        with reading(ModelFolderError, f"the adapter {folder} cannot be read", got=folder.name, allowed=allowed, fix=fix):
            config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
            if odd := [key for key in _UNKNOWN if config.get(key)]:
                raise ValueError(f"{odd[0]}, which is merged in another way")
            scale = float(config["lora_alpha"]) / (float(config["r"]) ** (0.5 if config.get("use_rslora") else 1.0))
            halves: dict[str, dict[str, Tensor]] = {}
            for name, tensor in load_file(folder / "adapter_model.safetensors").items():
                match = _ADAPTER.match(name)
                if match is None:
                    raise ValueError(f"a tensor that is none of LoRA's: {name}")
                halves.setdefault(f"{match[1]}.weight", {})[match[2]] = tensor
            found = {name: merged(self._base[name], half["A"], half["B"], scale) for name, half in halves.items()}
        return {**self._base, **found}


def _numbered(path: Path) -> dict[int, Path]:
    """The folders of a folder by the version that their names end in."""
    entries = sorted(path.iterdir()) if path.is_dir() else []
    found: dict[int, Path] = {}
    for entry in entries:
        match = _NUMBER.search(entry.name)
        if match is None or not (_model_in(entry) or (entry / "adapter_config.json").is_file()):
            continue
        if (other := found.setdefault(int(match[1]), entry)) != entry:
            raise ConfigError(
                f"two folders of {path} are of version {int(match[1])}",
                got=f"{other.name} and {entry.name}",
                allowed="one folder a version",
                fix="name a folder that holds those of one training run alone",
            )
    return found


def _model_in(folder: Path) -> Path | None:
    return next((found for found in (folder / "model", folder) if (found / "config.json").is_file()), None)


def _base(path: Path, model: str | None) -> PreTrainedModel:
    if model is None:
        what, allowed = f"{path} holds weights without their model", "a model folder, or a run"
        raise ConfigError(what, got="no --model", allowed=allowed, fix="add --model FOLDER")
    return load_model(Path(NamedModel.find(model).path))
