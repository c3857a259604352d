"""The trainer in a process of its own.

Weights and patches travel as files in shared memory; everything else through the worker's pipe.
"""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors.torch import load_file

from oldlogits.backends.torchrun.dispatch import open_trainer
from oldlogits.backends.torchrun.launch import launched
from oldlogits.backends.worker_process import CarryOut, WorkerProcess
from oldlogits.config import RunConfig
from oldlogits.core.weights import FullWeights, PatchWeights, PolicyVersion, WeightUpdate
from oldlogits.engines.shared_memory import share, share_bytes, take_bytes
from oldlogits.loop.backend import TrainerClient
from oldlogits.train.reports import PublishedVersion


@dataclass(frozen=True, slots=True, kw_only=True)
class _FullInFile:
    """All weights, in a safetensors file."""

    path: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class _PatchesInFile:
    """Patches, one after another in a file."""

    base: PolicyVersion
    path: Path
    lengths: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _PublishedInFile:
    """A published version whose update lies in a file."""

    published: PublishedVersion
    update: _FullInFile | _PatchesInFile


class TrainerProcess(WorkerProcess):
    """Starts a trainer process.

    Args:
        config: The run.
        model_folder: A Hugging Face folder.
        probe_ids: See `Trainer`.
    """

    def __init__(self, config: RunConfig, model_folder: Path, probe_ids: Sequence[int]) -> None:
        super().__init__("trainer", _build, (config, model_folder, list(probe_ids)))
        self.handle = TrainerClient(self.call)

    def _arrived(self, value: object) -> object:
        """An update with its weights; here, where no cancellation can leave their file behind."""
        if isinstance(value, _PublishedInFile):
            return replace(value.published, update=_taken(value.update))
        return _taken(value) if isinstance(value, _FullInFile) else value


def _build(config: RunConfig, model_folder: Path, probe_ids: Sequence[int]) -> CarryOut:
    if launched() is not None:
        atexit.register(os._exit, 0)  # the usual way out waits for exchanges with ranks that may be gone
    trainer = open_trainer(config, model_folder, probe_ids, time.perf_counter)

    def carry_out(method: str, arguments: tuple[object, ...]) -> object:
        value = trainer(method, arguments)
        if isinstance(value, PublishedVersion):
            nothing = FullWeights(tensors={})
            return _PublishedInFile(published=replace(value, update=nothing), update=_shared(value.update))
        return _shared(value) if isinstance(value, FullWeights) else value

    return carry_out


def _shared(update: WeightUpdate) -> _FullInFile | _PatchesInFile:
    if isinstance(update, FullWeights):
        return _FullInFile(path=share(update.tensors))
    path, lengths = share_bytes(update.patches)
    return _PatchesInFile(base=update.base, path=path, lengths=lengths)


def _taken(shared: _FullInFile | _PatchesInFile) -> WeightUpdate:
    if isinstance(shared, _PatchesInFile):
        return PatchWeights(base=shared.base, patches=take_bytes(shared.path, shared.lengths))
    tensors = load_file(shared.path)
    shared.path.unlink()  # the mapping stays valid
    return FullWeights(tensors=tensors)
