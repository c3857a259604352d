"""The trainer and the dedicated scorer in processes of their own; weights travel as files in shared memory."""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np

from oldlogits.backends.packed import Packed, pack, put_back, set_aside, unpack
from oldlogits.backends.torchrun.dispatch import open_trainer
from oldlogits.backends.torchrun.launch import launched
from oldlogits.core.scoring import DedicatedScorer
from oldlogits.engines.shared_memory import share_bytes, take_bytes, unshare
from oldlogits.models.device import configure_process
from oldlogits.rpc.child import Codec, serve_calls
from oldlogits.rpc.client import CarryOut, Dispatcher, Transport, client
from oldlogits.rpc.process import ChildProcess
from oldlogits.train.scorer_model import ScorerModel
from oldlogits.train.spec import ScorerSpec, TrainerSpec

_FIX: Final = (
    "look for a message above, or an out-of-memory kill; go on with --resume from the last checkpoint, "
    "where memory ran out with a smaller trainer.micro_batch_tokens (docs/tuning.md)"
)


class ModelProcess(ChildProcess):
    """A child process that holds a model and carries out calls one at a time; `build` makes there what carries them out."""

    def __init__(
        self,
        name: str,
        build: Callable[..., CarryOut],
        spec: TrainerSpec | ScorerSpec,
        model_folder: Path,
        probe_ids: Sequence[int],
        heartbeat_timeout_s: float,
    ) -> None:
        arguments = (spec, model_folder, tuple(probe_ids))
        codec = WeightsInFiles()
        super().__init__(name, serve_calls, (build, arguments), fix=_FIX, codec=codec, heartbeat_timeout_s=heartbeat_timeout_s)

    def close(self) -> None:
        """End the process; pending calls fail. Leaves no process, thread or file."""
        super().close()
        unshare(self.pid)


def start_trainer(
    spec: TrainerSpec, model_folder: Path, probe_ids: Sequence[int], heartbeat_timeout_s: float = 60.0
) -> ModelProcess:
    """Start a trainer process; the transport of `TrainerCalls`."""
    return ModelProcess("trainer", build_trainer, spec, model_folder, probe_ids, heartbeat_timeout_s)


def start_scorer(
    spec: ScorerSpec, model_folder: Path, probe_ids: Sequence[int], heartbeat_timeout_s: float = 60.0
) -> ModelProcess:
    """Start the process of a dedicated scorer; the transport of `DedicatedScorer`."""
    return ModelProcess("scorer", build_scorer, spec, model_folder, probe_ids, heartbeat_timeout_s)


def build_trainer(spec: TrainerSpec, model_folder: Path, probe_ids: Sequence[int]) -> CarryOut:
    """Build what carries out `TrainerCalls` in its process."""
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
class _InFile:
    """A value whose weights lie in a file; `packed` has no parts, but their lengths are here."""

    value: object
    packed: Packed
    path: Path
    lengths: tuple[int, ...]


class WeightsInFiles(Codec):
    """A codec that writes weights and patches to files in shared memory; who receives one maps it and deletes the file."""

    def encode(self, value: object) -> object:
        """Write the weights of a value to a file."""
        rest, update = set_aside(value)
        if update is None:
            return value
        packed = pack(update)
        path, lengths = share_bytes([part.data for part in packed.parts])
        return _InFile(value=rest, packed=replace(packed, parts=()), path=path, lengths=lengths)

    def decode(self, value: object) -> object:
        """Map the weights of a value from their file, and delete it."""
        if not isinstance(value, _InFile):
            return value
        parts = tuple(np.frombuffer(part, np.uint8) for part in take_bytes(value.path, value.lengths))
        return put_back(value.value, unpack(replace(value.packed, parts=parts)))
