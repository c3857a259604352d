"""The trainer in a process of its own.

    controller                              trainer process
    call(method, arguments) --- pipe --->   Trainer.method(*arguments)
             value or error <-- pipe ----   one call at a time, in order

Published weights travel as a safetensors file in shared memory; everything else through the pipe, between processes
of one user. A trainer that dies fails the pending call and every later one with `WorkerDiedError`.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path

from safetensors.torch import load_file

from oldlogits.config import RunConfig
from oldlogits.core.errors import OldLogitsError, WorkerDiedError
from oldlogits.rollout.shared import share, unshare
from oldlogits.runtime.handles import CallingTrainer, TimedTrainer
from oldlogits.train.trainer import Published, Trainer


@dataclass(frozen=True, slots=True, kw_only=True)
class _PublishedInFile:
    """A published version whose weights lie in a file."""

    published: Published
    weights: Path


EXIT_S = 5.0
"""How long a process that was told to end may take before it is killed."""


class TrainerProcess:
    """Starts a trainer process and carries out calls in it.

    Args:
        config: The run.
        model_folder: A Hugging Face folder.
        probe_ids: See `Trainer`.
    """

    def __init__(self, config: RunConfig, model_folder: Path, probe_ids: Sequence[int]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        arguments = (theirs, config, model_folder, list(probe_ids))
        self._process = context.Process(target=_serve, args=arguments, name="oldlogits-trainer", daemon=True)
        self._process.start()
        theirs.close()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="trainer")
        self.handle = CallingTrainer(self._call)

    async def ready(self) -> None:
        """Wait until the model is loaded.

        Raises:
            OldLogitsError: What the trainer raised while it started.
            WorkerDiedError: It ended.
        """
        await asyncio.get_running_loop().run_in_executor(self._thread, self._receive)

    async def _call(self, method: str, arguments: tuple[object, ...]) -> object:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._exchange, method, arguments)

    def _exchange(self, method: str, arguments: tuple[object, ...]) -> object:
        try:
            self._pipe.send((method, arguments))
        except OSError as error:
            raise self._died() from error
        return self._receive()

    def _receive(self) -> object:
        wait([self._pipe, self._process.sentinel])
        try:
            succeeded, value = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise self._died() from error
        if isinstance(value, _PublishedInFile):  # here, where no cancellation can leave the file behind
            weights = load_file(value.weights)
            value.weights.unlink()  # the mapping stays valid
            return replace(value.published, weights=weights)
        if succeeded:
            return value
        assert isinstance(value, BaseException)
        raise value

    def _died(self) -> WorkerDiedError:
        self._process.join(timeout=1)
        return WorkerDiedError(
            "the trainer process ended",
            got=f"exit code {self._process.exitcode}",
            allowed="a trainer that runs until the end of the run",
            fix="look for an out-of-memory kill or a message above; go on with --resume from the last checkpoint",
        )

    def close(self) -> None:
        """End the process, whatever it does. Leaves no process, thread or file."""
        self._process.terminate()
        self._process.join(timeout=EXIT_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._pipe.close()
        assert self._process.pid is not None, "it was started"
        unshare(self._process.pid)


def _serve(pipe: Connection, config: RunConfig, model_folder: Path, probe_ids: Sequence[int]) -> None:
    """The trainer process: carry out calls until the pipe closes. Ctrl-C is the controller's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    trainers: list[TimedTrainer] = []

    def start() -> None:
        trainers.append(TimedTrainer(Trainer(config, model_folder, probe_ids), time.perf_counter))

    work: Callable[[], object] = start
    while _answer(pipe, work):
        try:
            method, arguments = pipe.recv()
        except (EOFError, OSError):
            return
        work = partial(trainers[0].call, method, arguments)


def _answer(pipe: Connection, work: Callable[[], object]) -> bool:
    """Send the result of `work`, or the error of this package that it raised; False when nobody listens."""
    try:
        value = work()
        if isinstance(value, Published):
            value = _into_file(value)
        message: tuple[bool, object] = (True, value)
    except OldLogitsError as error:
        message = (False, error)
    try:
        pipe.send(message)
    except OSError:
        return False
    return True


def _into_file(published: Published) -> _PublishedInFile:
    return _PublishedInFile(published=replace(published, weights={}), weights=share(published.weights))
