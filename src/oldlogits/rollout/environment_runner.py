"""How environment code is run: inline in virtual time, or in threads with a deadline.

A method runs in an idle thread, where its time is taken. What an ``async def`` method returns runs on the one event loop of all
asynchronous environment code, in a thread of its own: code that blocks there holds up this loop, and not the run's.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import random
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Final, Generic, TypeVar, cast
from weakref import WeakSet

from oldlogits.core.errors import RunInterrupted
from oldlogits.envs.text import readable
from oldlogits.rollout.daemon_threads import DaemonThreads
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
        self._threads = DaemonThreads()

    async def __call__(self, call: Callable[[], T | Awaitable[T]], *, is_tool: bool = False) -> T:
        """Run environment code with the deadline.

        Raises:
            EnvironmentFailed: It raised or took too long.
        """
        if is_tool and self._latency_s:
            await asyncio.sleep(self._rng.expovariate(1 / self._latency_s))
        async with self._room:
            running = _Timed(partial(attempt, call), self._timeout_s, delays_tools=self._latency_s > 0)
            self._threads.submit(running.run)
            result = await running.in_time()
            if not inspect.isawaitable(result):
                return result
            return await in_time(result, self._timeout_s, running.timed_out(), left_s=self._timeout_s - running.took_s)


async def blocking_place(for_s: float) -> str:
    """Wait until asynchronous environment code blocks its event loop for so long; return which function it is in."""
    rounds, held_s = -1, 0.0
    while True:
        await asyncio.sleep(STEP_S)
        where = _LoopThread.shared()
        rounds, held_s = where.rounds, held_s + STEP_S if where.rounds == rounds else 0.0
        if held_s >= for_s and (place := where.place()):
            return place


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
                place = f" in {found}" if (found := where.place()) else ""
                where.give_up()
                if blocking is not call.task and blocking in _LoopThread.calls:
                    raise EnvironmentLost(f"asynchronous code of another episode blocked the event loop of all{place}")
                raise EnvironmentFailed(f"{timed_out}: it blocked the event loop of all episodes{place}")
        return await future
    finally:
        future.cancel()
        where.loop.call_soon_threadsafe(close_unbegun, result)


def close_unbegun(result: object) -> None:
    """Close a coroutine that nobody will wait for, if it has not begun: it would be warned of."""
    if inspect.iscoroutine(result) and inspect.getcoroutinestate(result) == inspect.CORO_CREATED:
        result.close()


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
        self._thread = threading.Thread(target=self.loop.run_forever, name="oldlogits-environment-loop", daemon=True)
        self._thread.start()

    @classmethod
    def shared(cls) -> _LoopThread:
        """The one that takes calls."""
        cls._current = cls._current or cls()
        return cls._current

    def place(self) -> str:
        """The function of an episode that the loop carries out now, with its file and line; empty: it carries out none."""
        frame, found = sys._current_frames().get(self._thread.ident or 0), ""
        while frame is not None and frame.f_code is not finished.__code__:
            found = f"{frame.f_code.co_qualname} ({Path(frame.f_code.co_filename).name}, line {frame.f_lineno})"
            frame = frame.f_back
        return found if frame is not None else ""

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


class _Timed(Generic[T]):
    """A call that a thread carries out in time; its time is taken there, whatever holds up the event loop meanwhile."""

    here: Final = threading.local()
    """`running`: what the thread carries out now."""

    def __init__(self, call: Callable[[], T], timeout_s: float, *, delays_tools: bool) -> None:
        self._call, self._timeout_s, self.delays_tools = call, timeout_s, delays_tools
        self._began_s, self._ended_s = math.inf, math.inf
        self._loop = asyncio.get_running_loop()
        self._done: asyncio.Future[None] = self._loop.create_future()
        self._outcome: T | EnvironmentFailed | None = None

    @property
    def took_s(self) -> float:
        """Seconds since it began, to its end; 0 before."""
        return max(0.0, min(self._ended_s, time.monotonic()) - self._began_s)

    def timed_out(self) -> EnvironmentFailed:
        """The failure of a call that took too long."""
        return EnvironmentFailed(f"timed out after {self._timeout_s:g} s")

    def begin_anew(self) -> None:
        """Give what follows the whole time, if what came before was in time."""
        if self.took_s > self._timeout_s:
            raise self.timed_out()
        self._began_s = time.monotonic()

    async def in_time(self) -> T:
        """Wait for it."""
        timer = self._loop.call_later(self._timeout_s, self._look)
        try:
            await self._done
        finally:
            timer.cancel()
            self._done.cancel()
        if self._ended_s == math.inf or self.took_s > self._timeout_s:
            close_unbegun(self._outcome)
            raise self.timed_out()
        if isinstance(self._outcome, EnvironmentFailed):
            raise self._outcome
        return cast(T, self._outcome)

    def _look(self) -> None:
        """Wake who waits where the time is up."""
        if self._done.done():
            return
        if (left_s := self._timeout_s - self.took_s) <= 0:
            self._done.set_result(None)
        else:
            self._loop.call_later(left_s, self._look)

    def run(self) -> None:
        """Carry it out, unless nobody waits for it."""
        if self._done.cancelled():
            return
        self.here.running, self._began_s = self, time.monotonic()
        try:
            self._outcome = self._call()
        except EnvironmentFailed as error:
            self._outcome = error
        self._ended_s, self.here.running = time.monotonic(), None
        try:
            self._loop.call_soon_threadsafe(self._end)
        except RuntimeError:  # the run is over, and its event loop is closed
            close_unbegun(self._outcome)

    def _end(self) -> None:
        if not self._done.done():
            self._done.set_result(None)
        else:  # nobody waits any more
            close_unbegun(self._outcome)


def begin_next_call() -> bool:
    """Say, within environment code that is run, that what follows is another call, with a deadline of its own.

    Returns:
        Whether a tool may follow here: it is nothing that the runner delays.

    Raises:
        EnvironmentFailed: The call before took too long.
    """
    running: _Timed[object] | None = getattr(_Timed.here, "running", None)
    if running is not None:
        running.begin_anew()
    return running is not None and not running.delays_tools


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
