"""Runs jobs over worker processes; a job that fails, or whose process is killed, is told and does not end the others."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Generic, TypeVar

from oldlogits.core.errors import OldLogitsError

J = TypeVar("J")
R = TypeVar("R")

KILLED: Final = "its process was killed, often for want of memory: lower --processes; the same command tries it again"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome(Generic[J, R]):
    """How a job ended.

    Args:
        job: The job.
        value: What it gave; None if it failed.
        error: Why it failed; empty if it did not. An error of this package is told without a traceback.
        wall_s: Seconds from its beginning to its end.
    """

    job: J
    value: R | None
    error: str
    wall_s: float


def run_jobs(
    jobs: Iterable[J],
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
    """

    def open_worker() -> ProcessPoolExecutor:
        """One of one process: a pool of several would end with the first process that is killed."""
        return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_begin, initargs=(log,))

    waiting, idle = deque(jobs), [open_worker() for _ in range(processes)]
    running: dict[Future[tuple[R | None, str]], tuple[J, ProcessPoolExecutor, float]] = {}
    try:
        while waiting or running:
            while waiting and idle:
                job, worker = waiting.popleft(), idle.pop()
                on_start(job)
                try:
                    future = worker.submit(_compute, work, job)
                except BrokenProcessPool:  # killed while it waited
                    worker = open_worker()
                    future = worker.submit(_compute, work, job)
                running[future] = job, worker, time.perf_counter()
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job, worker, started = running.pop(future)
                try:
                    value, error = future.result()
                except BrokenProcessPool:
                    value, error, worker = None, KILLED, open_worker()
                idle.append(worker)
                on_done(Outcome(job=job, value=value, error=error, wall_s=time.perf_counter() - started))
    finally:
        for worker in (*idle, *(worker for _, worker, _ in running.values())):
            worker.shutdown(wait=False, cancel_futures=True)


def _compute(work: Callable[[J], R], job: J) -> tuple[R | None, str]:
    """Compute one job in a worker; returns what it gave, and why it failed."""
    try:
        return work(job), ""
    except OldLogitsError as raised:
        return None, str(raised)
    except Exception:  # supervision: one broken job must not end the others; it is reported
        return None, traceback.format_exc()


def _begin(log: Path) -> None:
    """Send a worker's output to the log, and end the worker when its parent ends."""
    threading.Thread(target=_follow_parent, daemon=True).start()
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "workers have one"
    parent.join()
    os._exit(1)
