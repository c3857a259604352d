"""Virtual time for asyncio: a loop that never waits.

The project's buffer, admission and routes are coroutines. On this loop they run as they are, and asyncio's own heap of
timers is the event queue: neither simpy nor a heap of our own is needed.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import TypeVar

from oldlogits.core.errors import AccountingError

T = TypeVar("T")


class _Skipping(selectors.DefaultSelector):
    """Instead of waiting, moves the clock to when the wait would have ended."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Nothing ever arrives from outside."""
        if timeout is None:
            raise AccountingError(
                "the simulation stands still: everything waits and nothing is due",
                got=f"no timer at {self.now_s:.3f} s",
                allowed="something that goes on",
                fix="this is a defect, please report it with the scenario",
            )
        self.now_s += max(0.0, timeout)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose `time` starts at 0 and jumps from timer to timer."""

    def __init__(self) -> None:
        self._skipping = _Skipping()
        super().__init__(self._skipping)

    def time(self) -> float:
        """Virtual seconds since the loop was made."""
        return self._skipping.now_s


def run_virtually(main: Coroutine[None, None, T]) -> T:
    """Run a coroutine to its end in virtual time.

    Raises:
        AccountingError: It waits for something that never comes.
    """
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)
