"""How environment code is run: inline in virtual time, or in threads with a deadline."""

from __future__ import annotations

import asyncio
import inspect
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar, cast

import anyio
import anyio.to_thread

from oldlogits.rollout.turns import EnvironmentFailed

T = TypeVar("T")

NUM_THREADS = 64
"""Threads for environment code; a call that never returns keeps one."""


async def run_inline(call: Callable[[], T | Awaitable[T]], *, is_tool: bool = False) -> T:
    """Run environment code here and now, without a deadline: repeatable.

    Raises:
        EnvironmentFailed: It raised.
    """
    try:
        result = call()
        return await cast(Awaitable[T], result) if inspect.isawaitable(result) else result
    except Exception as error:  # environment code is the user's: whatever it raises ends this episode, not the run
        raise EnvironmentFailed(_describe(error)) from error


class ThreadRunner:
    """Runs environment code in daemon threads, each call with a deadline.

    Args:
        timeout_s: Seconds that one call may take.
        latency_s: Mean of a simulated, exponentially distributed latency before a tool answers; 0: none.
        seed: Of the latency.
    """

    def __init__(self, *, timeout_s: float, latency_s: float, seed: int) -> None:
        self._timeout_s, self._latency_s = timeout_s, latency_s
        self._rng = random.Random(seed)
        self._limiter = anyio.CapacityLimiter(NUM_THREADS)

    async def __call__(self, call: Callable[[], T | Awaitable[T]], *, is_tool: bool = False) -> T:
        """Run environment code with the deadline.

        Raises:
            EnvironmentFailed: It raised or took too long.
        """
        if is_tool and self._latency_s:
            await asyncio.sleep(self._rng.expovariate(1 / self._latency_s))
        try:
            async with asyncio.timeout(self._timeout_s):
                result = await anyio.to_thread.run_sync(call, abandon_on_cancel=True, limiter=self._limiter)
                return await cast(Awaitable[T], result) if inspect.isawaitable(result) else result
        except TimeoutError as error:
            raise EnvironmentFailed(f"timed out after {self._timeout_s:g} s") from error
        except Exception as error:  # environment code is the user's: whatever it raises ends this episode, not the run
            raise EnvironmentFailed(_describe(error)) from error


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
