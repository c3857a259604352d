"""The trainer in a process of its own.

Published weights travel as a safetensors file in shared memory; everything else through the worker's pipe.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors.torch import load_file

from oldlogits.config import RunConfig
from oldlogits.rollout.shared import share
from oldlogits.runtime.handles import CallingTrainer, TimedTrainer
from oldlogits.runtime.worker_process import CarryOut, WorkerProcess
from oldlogits.train.trainer import Published, Trainer


@dataclass(frozen=True, slots=True, kw_only=True)
class _PublishedInFile:
    """A published version whose weights lie in a file."""

    published: Published
    weights: Path


class TrainerProcess(WorkerProcess):
    """Starts a trainer process.

    Args:
        config: The run.
        model_folder: A Hugging Face folder.
        probe_ids: See `Trainer`.
    """

    def __init__(self, config: RunConfig, model_folder: Path, probe_ids: Sequence[int]) -> None:
        super().__init__("trainer", _build, (config, model_folder, list(probe_ids)))
        self.handle = CallingTrainer(self.call)

    def _arrived(self, value: object) -> object:
        """A published version with its weights; here, where no cancellation can leave their file behind."""
        if isinstance(value, _PublishedInFile):
            weights = load_file(value.weights)
            value.weights.unlink()  # the mapping stays valid
            return replace(value.published, weights=weights)
        return value


def _build(config: RunConfig, model_folder: Path, probe_ids: Sequence[int]) -> CarryOut:
    timed = TimedTrainer(Trainer(config, model_folder, probe_ids), time.perf_counter)

    def carry_out(method: str, arguments: tuple[object, ...]) -> object:
        value = timed.call(method, arguments)
        if isinstance(value, Published):
            return _PublishedInFile(published=replace(value, weights={}), weights=share(value.weights))
        return value

    return carry_out
