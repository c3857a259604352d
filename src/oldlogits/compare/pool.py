"""Runs jobs over worker processes; a job that fails is told and does not end the others."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from oldlogits.core.errors import OldLogitsError, WorkerDiedError


class Job(Protocol):
    """Something to compute in another process."""

    @property
    def label(self) -> str:
        """Name it to the person who waits for it."""


J = TypeVar("J", bound=Job)
R = TypeVar("R")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome(Generic[J, R]):
    """How a job ended.

    Args:
        job: The job.
        value: What it gave; None if it failed.
        error: Why it failed; empty if it did not. An error of this package is told without a traceback.
        cpu_s: CPU seconds of its process, and of the processes that it started.
        wall_s: Seconds from its beginning to its end.
    """

    job: J
    value: R | None
    error: str
    cpu_s: float
    wall_s: float


def run_jobs(
    jobs: Sequence[J],
    work: Callable[[J], R],
    *,
    processes: int,
    log: Path,
    on_done: Callable[[Outcome[J, R]], None],
    on_start: Callable[[J], object] = lambda job: None,
) -> None:
    """Run every job once, at most `processes` at the same time.

    Args:
        jobs: In the order in which they are started.
        work: Computes a job; a function that a new process can import.
        processes: How many worker processes there are.
        log: A file that gets what the workers print.
        on_done: Called in this process after each job.
        on_start: Called in this process before each job.

    Raises:
        WorkerDiedError: A process was killed.
    """
    waiting, running = list(reversed(jobs)), dict[Future[Outcome[J, R]], J]()
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(processes, mp_context=context, initializer=_begin, initargs=(log,))
    try:
        while waiting or running:
            while waiting and len(running) < processes:
                job = waiting.pop()
                on_start(job)
                running[executor.submit(_compute, work, job)] = job
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                outcome = future.result()
                del running[future]
                on_done(outcome)
    except BrokenProcessPool as error:
        raise WorkerDiedError(
            "a worker process was killed",
            got=", ".join(job.label for job in running.values()),
            allowed="processes that live as long as the command",
            fix="often too little memory: lower --processes; the same command goes on with what is left",
        ) from error
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


def _compute(work: Callable[[J], R], job: J) -> Outcome[J, R]:
    """Compute one job in a worker, whatever becomes of it."""
    cpu, wall = sum(os.times()[:4]), time.perf_counter()
    value, error = None, ""
    try:
        value = work(job)
    except OldLogitsError as raised:
        error = str(raised)
    except Exception:  # supervision: one broken job must not end the others; it is reported
        error = traceback.format_exc()
    cpu_s, wall_s = sum(os.times()[:4]) - cpu, time.perf_counter() - wall
    return Outcome(job=job, value=value, error=error, cpu_s=cpu_s, wall_s=wall_s)


def _begin(log: Path) -> None:
    """Send a worker's output to the log, and end the worker when its parent ends."""
    threading.Thread(target=_follow_parent, daemon=True).start()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "workers have one"
    parent.join()
    os._exit(1)
