"""A trainer over the ranks of torchrun: that of rank 0 leads, the others follow.

    rank 0        controller --call--> trainer ----- "a call is due", method and arguments -----> ranks 1, 2, ...
                                          `------------- all carry it out together --------------'

Every rank makes the same calls with the same arguments, so an error of this package that one raises is raised by all, and the
controller hears of it from rank 0. A rank that dies breaks the exchange that it is missing from: rank 0 then says which.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NoReturn

from oldlogits.backends.torchrun.launch import Launch, launched
from oldlogits.backends.torchrun.rendezvous import SILENT_S, Rendezvous
from oldlogits.core.errors import OldLogitsError, WorkerDiedError
from oldlogits.models.device import configure_process
from oldlogits.models.ranks import Ranks, is_lost, join
from oldlogits.rpc.client import CarryOut
from oldlogits.train.calls import TrainerCalls
from oldlogits.train.spec import TrainerSpec
from oldlogits.train.trainer import Trainer, TrainerService

TIMEOUT_S: Final = 600.0
"""A rank that has not come to an exchange after so many seconds is lost: the ranks do the same work at the same time."""

FIRST_RANK_ALONE: Final = frozenset({TrainerCalls.state.__name__})
"""Calls that exchange nothing between the ranks: the first one carries them out by itself."""


def open_trainer(spec: TrainerSpec, model_folder: Path, probe_ids: Sequence[int], clock: Callable[[], float]) -> CarryOut:
    """Build what carries out the calls of a trainer, alone or, where torchrun started several ranks, with those that follow.

    Raises:
        ModelFolderError: A rank cannot load the folder.
        WorkerDiedError: A rank does not come.
    """
    launch = launched()
    if launch is None:
        return TrainerService(Trainer(spec, model_folder, probe_ids), clock).call
    return _Leader(launch, spec, model_folder, probe_ids, clock).call


class _Leader:
    def __init__(
        self, launch: Launch, spec: TrainerSpec, model_folder: Path, probe_ids: Sequence[int], clock: Callable[[], float]
    ) -> None:
        self._launch, self._board, self._numbers = launch, Rendezvous(launch), itertools.count(1)
        self._board.beat()
        self._board.begin()
        with self._naming_the_lost():
            self._ranks = join(self._board.store, rank=0, num_ranks=launch.num_ranks, timeout_s=TIMEOUT_S)
            self._ranks.receive((spec, model_folder, tuple(probe_ids)))
            self._service = TrainerService(Trainer(spec, model_folder, probe_ids, self._ranks), clock)

    def call(self, method: str, arguments: tuple[object, ...]) -> object:
        """Carry out a call of the trainer on all ranks."""
        if method in FIRST_RANK_ALONE:
            return self._service.call(method, arguments)
        with self._naming_the_lost():
            self._board.announce(next(self._numbers))
            self._ranks.receive((method, arguments))
            return self._service.call(method, arguments)

    @contextmanager
    def _naming_the_lost(self) -> Iterator[None]:
        try:
            yield
        except OldLogitsError:
            raise
        except RuntimeError as error:
            if not is_lost(error):
                raise
            silent = self._board.silent()
            names = ", ".join(map(str, silent)) or "unknown"
            first_sentence = str(error).splitlines()[0].partition(". ")[0]
            raise WorkerDiedError(
                f"rank {names} of {self._launch.num_ranks} ended, or no longer answers",
                got=f"no sign of life within {SILENT_S:g} seconds; {first_sentence}",
                allowed="ranks that live until the end of the run",
                fix="look for a message of that rank, or an out-of-memory kill; go on with --resume from the last checkpoint",
            ) from error


def follow(launch: Launch) -> NoReturn:
    """A rank but the first: carry out what the trainer of rank 0 does, until the run ends, then end the process."""
    status = _status(launch)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # the usual way out waits for exchanges with ranks that may be gone


def _status(launch: Launch) -> int:
    board = Rendezvous(launch)
    for number in (signal.SIGINT, signal.SIGTERM):  # they are the controller's to handle: it ends the run in order
        signal.signal(number, lambda number, frame: board.hurry())
    try:
        if not board.await_begin():
            return 0
        board.beat()
        _follow(board, join(board.store, rank=launch.rank, num_ranks=launch.num_ranks, timeout_s=TIMEOUT_S))
    except WorkerDiedError as error:
        print(f"rank {launch.rank}: {error}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if not is_lost(error):
            raise
        return _parted(launch, board, error)
    return 0


def _follow(board: Rendezvous, ranks: Ranks) -> None:
    built_from: tuple[TrainerSpec, Path, Sequence[int]] = ranks.receive(None)
    spec, model_folder, probe_ids = built_from
    configure_process(num_threads=spec.trainer.num_threads, seed=spec.seed)
    try:
        service = TrainerService(Trainer(spec, model_folder, probe_ids, ranks), time.perf_counter)
    except OldLogitsError:  # rank 0 raises it too, and ends the run
        return
    for number in itertools.count(1):
        if not board.await_call(number):
            return
        call: tuple[str, tuple[object, ...]] = ranks.receive(None)
        method, arguments = call
        try:
            service.call(method, arguments)
        except OldLogitsError:  # rank 0 raises it too, and decides what follows
            continue


def _parted(launch: Launch, board: Rendezvous, error: RuntimeError) -> int:
    """An exchange broke off: in order (status 0) where the run is over, as after an interruption or an error of rank 0's."""
    ends = time.monotonic() + SILENT_S
    while time.monotonic() < ends:
        if board.has_ended:
            return 0
        time.sleep(0.1)
    print(f"rank {launch.rank}: an exchange with the other ranks broke off: {error}", file=sys.stderr)
    return 1
