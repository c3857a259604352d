"""The state of a checkpoint: torch's distributed format, written and read by any number of ranks.

Every rank writes the slices that it holds; a reader takes from the files the slices that it needs. Keys are ``kind|name``.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from oldlogits.core.errors import RunFolderError
from oldlogits.models.ranks import ALONE, Ranks
from oldlogits.models.sharding import as_slice_of


def write_state(folder: Path, tensors: Mapping[str, Tensor], ranks: Ranks = ALONE) -> None:
    """Write tensors to a folder that is the same on all ranks; all ranks call it.

    Tensors of which each rank holds a slice are as `as_slice_of` gives them; others are equal on all ranks.
    """
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # one process that writes by itself is remarked on
        save(dict(tensors), checkpoint_id=folder, no_dist=ranks.mesh is None)


def read_state(folder: Path, model: nn.Module | None = None, ranks: Ranks = ALONE) -> dict[str, Tensor]:
    """Read everything that `write_state` wrote, by any number of ranks; all ranks call it.

    Tensors under the names of a model's parameters are sliced as these are; without a model all are whole.

    Raises:
        RunFolderError: A file is missing or damaged.
    """
    parameters = dict(model.named_parameters()) if model is not None else {}
    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):
            described = FileSystemReader(folder).read_metadata().state_dict_metadata
            found = {key: _empty(entry, parameters.get(key.rpartition("|")[2])) for key, entry in described.items()}
            load(found, checkpoint_id=folder, no_dist=ranks.mesh is None)
    except (OSError, CheckpointException) as error:
        raise RunFolderError(
            "the checkpoint's state cannot be read",
            got=f"{folder}: {error}",
            allowed="a folder with .metadata and the files that it names, readable by every rank",
            fix="resume from another checkpoint",
        ) from error
    return found


def sliced(kind: str, values: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Give one value for each parameter of a model, of which the ranks hold slices, under the keys of a state."""
    parameters = dict(model.named_parameters())
    return {f"{kind}|{name}": as_slice_of(parameters[name], value) for name, value in values.items()}


def of_kind(kind: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Select the tensors of one kind, by name."""
    return {key.removeprefix(f"{kind}|"): value for key, value in state.items() if key.startswith(f"{kind}|")}


def _empty(entry: object, parameter: Tensor | None) -> Tensor:
    assert isinstance(entry, TensorStorageMetadata), "a state holds tensors only"
    if parameter is not None and entry.size == parameter.shape:
        return torch.empty_like(parameter, dtype=entry.properties.dtype, requires_grad=False)
    return torch.empty(entry.size, dtype=entry.properties.dtype)
