"""The trainer and the dedicated scorer in processes of their own; weights travel as files in shared memory."""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from safetensors.torch import load_file

from oldlogits.backends.torchrun.dispatch import open_trainer
from oldlogits.backends.torchrun.launch import launched
from oldlogits.core.scoring import DedicatedScorer
from oldlogits.core.weights import FullWeights, PatchWeights, PolicyVersion, WeightUpdate
from oldlogits.engines.shared_memory import share, share_bytes, take_bytes, unshare
from oldlogits.models.device import configure_process
from oldlogits.rpc.child import Codec, serve_calls
from oldlogits.rpc.client import CarryOut, Dispatcher, Transport, client
from oldlogits.rpc.process import ChildProcess
from oldlogits.train.reports import PublishedVersion
from oldlogits.train.scorer_model import ScorerModel
from oldlogits.train.spec import ScorerSpec, TrainerSpec

_FIX: Final = "look for an out-of-memory kill or a message above; go on with --resume from the last checkpoint"


class ModelProcess(ChildProcess):
    """A child process that holds a model and carries out calls one at a time; `build` makes there what carries them out."""

    def __init__(
        self,
        name: str,
        build: Callable[..., CarryOut],
        spec: TrainerSpec | ScorerSpec,
        model_folder: Path,
        probe_ids: Sequence[int],
    ) -> None:
        arguments = (spec, model_folder, tuple(probe_ids))
        super().__init__(name, serve_calls, (build, arguments), fix=_FIX, codec=WeightsInFiles())

    def close(self) -> None:
        """End the process; pending calls fail. Leaves no process, thread or file."""
        super().close()
        unshare(self.pid)


def start_trainer(spec: TrainerSpec, model_folder: Path, probe_ids: Sequence[int]) -> ModelProcess:
    """Start a trainer process; the transport of `TrainerCalls`."""
    return ModelProcess("trainer", _build_trainer, spec, model_folder, probe_ids)


def start_scorer(spec: ScorerSpec, model_folder: Path, probe_ids: Sequence[int]) -> ModelProcess:
    """Start the process of a dedicated scorer; the transport of `DedicatedScorer`."""
    return ModelProcess("scorer", build_scorer, spec, model_folder, probe_ids)


def _build_trainer(spec: TrainerSpec, model_folder: Path, probe_ids: Sequence[int]) -> CarryOut:
    if launched() is not None:
        atexit.register(os._exit, 0)  # the usual way out waits for exchanges with ranks that may be gone
    configure_process(num_threads=spec.trainer.num_threads, seed=spec.seed)
    return open_trainer(spec, model_folder, probe_ids, time.perf_counter)


def build_scorer(spec: ScorerSpec, model_folder: Path, probe_ids: Sequence[int]) -> CarryOut:
    """Build what carries out the calls of a `DedicatedScorer` in its process."""
    configure_process(num_threads=spec.trainer.num_threads, seed=spec.seed)
    return Dispatcher(DedicatedScorer, ScorerModel(spec, model_folder, probe_ids)).call


def scorer_client(spec: ScorerSpec | None, transport: Transport | None) -> DedicatedScorer | None:
    """Make the client of the dedicated scorer; None where the source asks none."""
    if spec is None or transport is None:
        return None
    return client(DedicatedScorer, transport, window=spec.window)  # type: ignore[type-abstract]


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


class WeightsInFiles(Codec):
    """A codec that writes weights and patches to files in shared memory; who receives one maps it and deletes the file."""

    def encode(self, value: object) -> object:
        """Write the weights of a value to a file."""
        if isinstance(value, PublishedVersion):
            nothing = FullWeights(tensors={})
            return _PublishedInFile(published=replace(value, update=nothing), update=_shared(value.update))
        return _shared(value) if isinstance(value, FullWeights | PatchWeights) else value

    def decode(self, value: object) -> object:
        """Map the weights of a value from their file, and delete it."""
        if isinstance(value, _PublishedInFile):
            return replace(value.published, update=_taken(value.update))
        return _taken(value) if isinstance(value, _FullInFile | _PatchesInFile) else value


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
