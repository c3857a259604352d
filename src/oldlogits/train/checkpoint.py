"""A checkpoint on its way to the disk and back: safetensors, JSON and checksums, by any number of ranks.

    begin (training waits): copy to the host's memory      then a thread: write, bring to the disk, take checksums
    end (all ranks have written): SHA256SUMS of all files

Each rank writes the rows that it holds to a file of its own; a reader takes from the files the rows that it needs. Keys of
tensors are ``kind|name``. Nothing that is read here is unpickled.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from oldlogits.core.errors import RunFolderError, writing
from oldlogits.core.weights import PolicyVersion
from oldlogits.models.checksums import files_of, sums_of
from oldlogits.models.load import local
from oldlogits.models.ranks import ALONE, Ranks
from oldlogits.models.sharding import as_slice_of

STATE: Final = "state"
"""The folder of a checkpoint with all that the run needs to go on, besides the model."""

OlderVersions = Mapping[tuple[PolicyVersion, PolicyVersion], bytes]
"""The patches between stored versions, as `PatchStore.older` gives them."""

_PATCH: Final = re.compile(r"(\d+)-to-(\d+)-(\d{5})-of-(\d{5})\.patch")
_SHARD: Final = re.compile(r"trainer-(\d{5})-of-(\d{5})\.safetensors")
_SYSTEM_ERROR: Final = re.compile(r"(.*)\(os error (\d+)\)")


class _Rows(Protocol):
    """A tensor of an open file, of which rows are read as they are asked for."""

    def get_shape(self) -> list[int]: ...
    def __getitem__(self, rows: slice) -> Tensor: ...


class _Shard(Protocol):
    """An open safetensors file."""

    def get_slice(self, key: str) -> _Rows: ...
    def get_tensor(self, key: str) -> Tensor: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """All that one rank writes of a checkpoint, in memory that training does not change.

    Args:
        folder: The folder of the checkpoint, the same on all ranks.
        state: The rows of tensors that this rank holds, by `host_copy`.
        parts: The content of other files of this rank by their names in the folder.
        folders: What writes ``model/`` and ``adapter/``; nothing but on the first rank.
    """

    folder: Path
    ranks: Ranks
    state: Mapping[str, Tensor]
    parts: Mapping[str, bytes]
    folders: Sequence[Callable[[], None]]

    def write(self) -> dict[str, str]:
        """Write everything and bring it to the disk; returns the checksums of what this rank has written.

        Raises:
            RunWriteError: It cannot be written.
        """
        folder = self.folder
        with writing(folder):
            own = [write_state(folder / STATE, self.state, self.ranks)]
            for name, content in self.parts.items():
                (folder / name).write_bytes(content)
                own.append(folder / name)
            for write in self.folders:
                with _system_errors():
                    write()
            if self.ranks.is_first:
                own += [path for path in files_of(folder) if path.parent != folder / STATE]
            return sums_of(folder, own)


class Saving:
    """A checkpoint that a thread writes; `outcome` tells its checksums when it has."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.folder, self.is_whole = snapshot.folder, False
        self._sums: Future[dict[str, str]] = Future()
        threading.Thread(target=self._write, args=(snapshot,), name="checkpoint", daemon=True).start()

    def outcome(self, *, wait: bool) -> dict[str, str] | None:
        """Give the checksums of this rank's files; None: they are still being written. Raises what writing has raised."""
        return self._sums.result() if wait or self._sums.done() else None

    def _write(self, snapshot: Snapshot) -> None:
        try:
            self._sums.set_result(snapshot.write())
        except Exception as error:  # supervision: whoever asks for the outcome hears of it
            self._sums.set_exception(error)


def older_files(older: OlderVersions, ranks: Ranks) -> dict[str, bytes]:
    """Name the patches between stored versions as files of a checkpoint, each rank its own."""
    of_rank = f"{ranks.rank:05d}-of-{ranks.num_ranks:05d}"
    return {f"{STATE}/{base}-to-{target}-{of_rank}.patch": content for (base, target), content in older.items()}


def read_older(folder: Path, ranks: Ranks) -> OlderVersions:
    """Read what `older_files` named; nothing where another number of ranks has written it, since they hold other rows."""
    named = {path: _PATCH.fullmatch(path.name) for path in (folder / STATE).iterdir()}
    return {
        (int(found[1]), int(found[2])): path.read_bytes()
        for path, found in named.items()
        if found and (int(found[3]), int(found[4])) == (ranks.rank, ranks.num_ranks)
    }


def host_copy(tensors: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """Copy to the CPU what this rank writes of a state: its rows of what is sharded; the rest, which all have, on the first."""
    return {
        key: local(tensor).detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for key, tensor in tensors.items()
        if ranks.is_first or isinstance(tensor, DTensor)
    }


def unshared(weights: Mapping[str, Tensor], live: Mapping[str, Tensor], copies: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give weights in memory that training does not change: where one is a view of a live master, the master's copy.

    The base of adapters is frozen, and what is cast or gathered is no view.
    """
    copied = {master.data_ptr(): copies[name] for name, master in live.items()}
    return {name: copied.get(weight.data_ptr(), weight) for name, weight in weights.items()}


def write_model(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write a standard folder."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_state(folder: Path, tensors: Mapping[str, Tensor], ranks: Ranks = ALONE) -> Path:
    """Write what `host_copy` gives, into a folder that is the same on all ranks; returns this rank's file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"trainer-{ranks.rank:05d}-of-{ranks.num_ranks:05d}.safetensors"
    save_tensors(tensors, path)
    return path


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file; what the file system refuses is an OSError."""
    with _system_errors():
        save_file(dict(tensors), path)


def read_state(folder: Path, model: nn.Module | None = None) -> dict[str, Tensor]:
    """Read everything that the ranks of a trainer have written, of which there may be more or fewer now.

    Tensors under the names of a model's parameters are where these are, and sliced as these are; without a model all are whole.

    Raises:
        RunFolderError: A file is missing or damaged.
    """
    parameters = dict(model.named_parameters()) if model is not None else {}
    try:
        with ExitStack() as stack:
            held: dict[str, list[_Shard]] = {}
            for path in _shards(folder):
                shard = stack.enter_context(safe_open(path, framework="pt"))
                for key in shard.keys():  # noqa: SIM118
                    held.setdefault(key, []).append(shard)
            return {key: _read(key, shards, parameters.get(key.rpartition("|")[2])) for key, shards in held.items()}
    except (OSError, SafetensorError) as error:
        raise RunFolderError(
            "the checkpoint's state cannot be read",
            got=f"{folder}: {error}",
            allowed="the file of each rank that has written it, which every rank reads",
            fix="resume from another checkpoint",
        ) from error


def sliced(kind: str, values: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Give one value for each parameter of a model, of which the ranks hold slices, under the keys of a state."""
    parameters = dict(model.named_parameters())
    return {f"{kind}|{name}": as_slice_of(parameters[name], value) for name, value in values.items()}


def of_kind(kind: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Select the tensors of one kind, by name."""
    return {key.removeprefix(f"{kind}|"): value for key, value in state.items() if key.startswith(f"{kind}|")}


def _shards(folder: Path) -> list[Path]:
    """The files of all ranks, by rank."""
    found = {path.name: path for path in sorted(folder.iterdir()) if _SHARD.fullmatch(path.name)}
    counts = {name.partition("-of-")[2] for name in found} or {"00001.safetensors"}
    due = [f"trainer-{rank:05d}-of-{count}" for count in counts for rank in range(int(count.partition(".")[0]))]
    if len(counts) > 1 or list(found) != due:
        raise FileNotFoundError(f"there is {', '.join(found) or 'no file of the trainer'}, due is {', '.join(due)}")
    return list(found.values())


def _read(key: str, shards: Sequence[_Shard], parameter: Tensor | None) -> Tensor:
    """Read the rows that this rank holds of a parameter, or all rows: those of the first shard come first."""
    parts = [shard.get_slice(key) for shard in shards]
    num_rows = [part.get_shape()[0] if part.get_shape() else 1 for part in parts]
    shape = [sum(num_rows), *parts[0].get_shape()[1:]] if parts[0].get_shape() else []
    if parameter is None or list(parameter.shape) != shape:
        return _joined([shard.get_tensor(key) for shard in shards])
    if not isinstance(parameter, DTensor):
        return _joined([shard.get_tensor(key) for shard in shards]).to(parameter.device)
    most = -(-shape[0] // parameter.device_mesh.size())
    start = min(most * parameter.device_mesh.get_local_rank(), shape[0])
    stop, begin, rows = min(start + most, shape[0]), 0, [shards[0].get_tensor(key)[:0]]
    for part, num in zip(parts, num_rows, strict=True):
        low, high = max(start, begin), min(stop, begin + num)
        rows += [part[low - begin : high - begin]] if low < high else []
        begin += num
    return as_slice_of(parameter, torch.cat(rows).to(local(parameter).device))


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """One tensor, in memory that is no file's."""
    return parts[0].clone() if len(parts) == 1 else torch.cat(list(parts))


@contextmanager
def _system_errors() -> Iterator[None]:
    """Raise what the file system said to safetensors, which passes it on as text."""
    try:
        yield
    except SafetensorError as error:
        found = _SYSTEM_ERROR.search(str(error))
        raise OSError(int(found[2]), found[1].strip()) if found else OSError(str(error)) from error


def as_lists(of_probe: Mapping[PolicyVersion, NDArray[np.float32]]) -> Mapping[str, list[float]]:
    """Values of the probe tokens by version, as JSON holds them: float32 comes back bit for bit."""
    return {str(version): values.tolist() for version, values in of_probe.items()}


def as_arrays(listed: Mapping[str, list[float]]) -> dict[PolicyVersion, NDArray[np.float32]]:
    """Give what `as_lists` has written."""
    return {int(version): np.array(values, np.float32) for version, values in listed.items()}
