"""How environment code is run: inline in virtual time, or in threads with a deadline.

A method runs in an idle thread, where its time is taken. What an ``async def`` method returns runs on the one event loop of all
asynchronous environment code, in a thread of its own: code that blocks there holds up this loop, and not the run's.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import random
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from typing import Any, ClassVar, Final, Generic, TypeVar, cast
from weakref import WeakSet

from oldlogits.core.errors import RunInterrupted
from oldlogits.envs.text import readable
from oldlogits.rollout.environment_errors import EnvironmentFailed, EnvironmentLost

T = TypeVar("T")

LONGEST_REASON = 2000
"""Characters of a failure that are kept."""

STEP_S: Final = 0.25
"""Steps in which the deadline of asynchronous code is counted down: a longer one was the event loop's, held up by others."""

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
        async with self._room:
            running = self._threads.submit(partial(attempt, call))
            result = await self._in_time(running)
            if not inspect.isawaitable(result):
                return result
            return await in_time(result, self._timeout_s, self._timed_out(), left_s=self._timeout_s - running.took_s)

    async def _in_time(self, running: _Timed[T]) -> T:
        """Wait for a call in a thread; its time is taken there, whatever holds up the event loop meanwhile."""
        future = asyncio.wrap_future(running.future)
        while not future.done() and (left := self._timeout_s - running.took_s) > 0:
            await asyncio.wait({future}, timeout=left)
        if running.took_s > self._timeout_s:
            future.cancel()
            raise self._timed_out()
        return await future

    def _timed_out(self) -> EnvironmentFailed:
        return EnvironmentFailed(f"timed out after {self._timeout_s:g} s")


def environment_loop() -> asyncio.AbstractEventLoop:
    """Return the event loop on which asynchronous environment code runs, in a thread of its own."""
    return _LoopThread.shared().loop


async def in_time(result: Awaitable[T], timeout_s: float, timed_out: EnvironmentFailed, *, left_s: float | None = None) -> T:
    """Wait for asynchronous code; where it blocks its event loop for longer than the deadline, another one takes over.

    Args:
        result: What the code returned.
        timeout_s: Seconds that it may take.
        timed_out: What is raised when it takes longer.
        left_s: Seconds that are left of them.

    Raises:
        EnvironmentFailed: It raised or took too long; `EnvironmentLost`: code of another episode blocked the event loop.
    """
    where, call = _LoopThread.shared(), _AsyncCall(result, timeout_s if left_s is None else left_s, timed_out)
    future = asyncio.wrap_future(asyncio.run_coroutine_threadsafe(call.finish(), where.loop))
    rounds, held_s = -1, 0.0
    try:
        while not future.done():
            await asyncio.wait({future}, timeout=STEP_S)
            rounds, held_s = where.rounds, held_s + STEP_S if where.rounds == rounds else 0.0  # of waits, not of the clock
            if held_s > timeout_s and not future.done() and (blocking := asyncio.current_task(where.loop)):
                where.give_up()
                if blocking is not call.task and blocking in _LoopThread.calls:
                    raise EnvironmentLost("asynchronous code of another episode blocked the event loop of all")
                raise timed_out
        return await future
    finally:
        future.cancel()


class _AsyncCall(Generic[T]):
    """A call of asynchronous code, and its deadline."""

    def __init__(self, result: Awaitable[T], left_s: float, timed_out: EnvironmentFailed) -> None:
        self._result, self._left_s, self._timed_out = result, left_s, timed_out
        self.task: asyncio.Task[T] | None = None

    async def finish(self) -> T:
        """Wait for it on its event loop; what holds up the loop for long does not count."""
        self.task = task = asyncio.ensure_future(finished(self._result))
        _LoopThread.calls.add(task)
        task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # seen, also where nobody waits any more
        try:
            while not task.done() and self._left_s > 0:
                await asyncio.wait({task}, timeout=min(self._left_s, STEP_S))
                self._left_s -= STEP_S
            if task.done():
                return await task
            raise self._timed_out
        finally:
            task.cancel()


class _LoopThread:
    """The event loop of all asynchronous environment code, in a daemon thread of its own; one that is blocked is given up.

    Attributes:
        calls: The calls of all such loops.
        rounds: A number that grows while code returns to the loop.
    """

    _current: ClassVar[_LoopThread | None] = None
    calls: ClassVar[WeakSet[asyncio.Task[Any]]] = WeakSet()

    def __init__(self) -> None:
        self.loop, self.rounds = asyncio.new_event_loop(), 0
        self.loop.call_soon(self._come_round)
        threading.Thread(target=self.loop.run_forever, name="oldlogits-environment-loop", daemon=True).start()

    @classmethod
    def shared(cls) -> _LoopThread:
        """The one that takes calls."""
        cls._current = cls._current or cls()
        return cls._current

    def give_up(self) -> None:
        """Let another loop take the calls that come."""
        if _LoopThread._current is self:
            _LoopThread._current = None

    def _come_round(self) -> None:
        self.rounds += 1
        self.loop.call_later(STEP_S / 2, self._come_round)


async def finished(result: Awaitable[T]) -> T:
    """Wait for environment code; whatever it raises ends the episode and not the run, but for a cancellation from outside."""
    try:
        return await result
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

    def submit(self, call: Callable[[], T]) -> _Timed[T]:
        """Carry out `call` in an idle thread, or in a new one."""
        running = _Timed(call)
        self._calls.put(running.run)
        if not self._idle.acquire(blocking=False):
            threading.Thread(target=self._serve, name="oldlogits-environment", daemon=True).start()
        return running

    def _serve(self) -> None:
        while True:
            self._calls.get()()
            self._idle.release()


class _Timed(Generic[T]):
    """A call that a thread carries out, and how long that took there."""

    def __init__(self, call: Callable[[], T]) -> None:
        self._call, self._began_s, self._ended_s = call, math.inf, math.inf
        self.future: Future[T] = Future()

    @property
    def took_s(self) -> float:
        """Seconds since it began, to its end; 0 before."""
        return max(0.0, min(self._ended_s, time.monotonic()) - self._began_s)

    def run(self) -> None:
        """Carry it out."""
        if not self.future.set_running_or_notify_cancel():
            return
        self._began_s = time.monotonic()
        try:
            value = self._call()
        except EnvironmentFailed as error:
            self._ended_s = time.monotonic()
            self.future.set_exception(error)
        else:
            self._ended_s = time.monotonic()
            self.future.set_result(value)


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
        EnvironmentFailed: It is one already.
    """
    if isinstance(error, RunInterrupted | EnvironmentFailed):
        raise error
    try:
        said = f"{type(error).__name__}: {error}"
    except Exception as own:
        said = f"{type(error).__name__}, which raised {type(own).__name__} when it was to be printed"
    return EnvironmentFailed(readable(said)[:LONGEST_REASON])
