"""How environment code is run: inline in virtual time, or in threads with a deadline."""

from __future__ import annotations

import asyncio
import inspect
import random
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from typing import TypeVar, cast

from oldlogits.core.errors import RunInterrupted
from oldlogits.envs.text import readable
from oldlogits.rollout.turns import EnvironmentFailed

T = TypeVar("T")

LONGEST_REASON = 2000
"""Characters of a failure that are kept."""

NUM_THREADS = 64
"""Calls of environment code that run at the same time; one that timed out no longer counts."""


async def run_inline(call: Callable[[], T | Awaitable[T]], *, is_tool: bool = False) -> T:
    """Run environment code here and now, without a deadline: repeatable.

    An asynchronous method runs to its end at once; one that really waits would bring real time into the run.

    Raises:
        EnvironmentFailed: It raised, or it waits.
    """
    result = attempt(call)
    if not inspect.isawaitable(result):
        return result
    steps = cast(Awaitable[T], result).__await__()
    try:
        while next(steps) is None:  # asyncio.sleep(0): it only lets others go first
            pass
    except StopIteration as end:
        return cast(T, end.value)
    except BaseException as error:  # as in attempt
        raise _failure(error) from error
    raise EnvironmentFailed("asynchronous code that waits needs real time: use runtime.type = 'local'")


class ThreadRunner:
    """Runs environment code in daemon threads, each call with a deadline.

    Args:
        timeout_s: Seconds that one call may take, once it runs.
        latency_s: Mean of a simulated, exponentially distributed latency before a tool answers; 0: none.
        seed: The seed of the latency.
    """

    def __init__(self, *, timeout_s: float, latency_s: float, seed: int) -> None:
        self._timeout_s, self._latency_s = timeout_s, latency_s
        self._rng = random.Random(seed)
        self._room = asyncio.Semaphore(NUM_THREADS)
        self._threads = _DaemonThreads()

    async def __call__(self, call: Callable[[], T | Awaitable[T]], *, is_tool: bool = False) -> T:
        """Run environment code with the deadline.

        Raises:
            EnvironmentFailed: It raised or took too long.
        """
        if is_tool and self._latency_s:
            await asyncio.sleep(self._rng.expovariate(1 / self._latency_s))
        try:
            async with self._room, asyncio.timeout(self._timeout_s):
                result = await asyncio.wrap_future(self._threads.submit(partial(attempt, call)))
                return await _finish(result)
        except TimeoutError as error:  # the deadline's: one that the environment raises is an EnvironmentFailed by now
            raise EnvironmentFailed(f"timed out after {self._timeout_s:g} s") from error


async def _finish(result: T | Awaitable[T]) -> T:
    if not inspect.isawaitable(result):
        return result
    try:
        return await cast(Awaitable[T], result)
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling():  # by the deadline, or because the run ends
            raise
        raise _failure(error) from error
    except BaseException as error:  # as in attempt
        raise _failure(error) from error


class _DaemonThreads:
    """Carries out calls in threads that are reused; one whose call never returns does not keep the program from ending."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._idle = threading.Semaphore(0)

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """Carry out `call` in an idle thread, or in a new one."""
        future: Future[T] = Future()
        self._calls.put(partial(_fulfil, future, call))
        if not self._idle.acquire(blocking=False):
            threading.Thread(target=self._serve, name="oldlogits-environment", daemon=True).start()
        return future

    def _serve(self) -> None:
        while True:
            self._calls.get()()
            self._idle.release()


def _fulfil(future: Future[T], call: Callable[[], T]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(call())
    except EnvironmentFailed as error:
        future.set_exception(error)


def attempt(call: Callable[[], T | Awaitable[T]]) -> T | Awaitable[T]:
    """Call environment code; whatever it raises ends the episode and not the run.

    `asyncio.CancelledError`, `GeneratorExit`, `KeyboardInterrupt` and `SystemExit` are included: the code is the user's.
    """
    try:
        return call()
    except BaseException as error:
        raise _failure(error) from error


def _failure(error: BaseException) -> EnvironmentFailed:
    """What ends the episode; the interruption of the run itself is raised on.

    Raises:
        RunInterrupted: The user wants the run to stop at once, while this code ran in the main thread.
    """
    if isinstance(error, RunInterrupted):
        raise error
    try:
        said = f"{type(error).__name__}: {error}"
    except Exception as own:
        said = f"{type(error).__name__}, which raised {type(own).__name__} when it was to be printed"
    return EnvironmentFailed(readable(said)[:LONGEST_REASON])
