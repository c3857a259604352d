"""Threads that are reused, and that do not keep the program from ending."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue


class DaemonThreads:
    """Carries out calls in threads that are reused; one whose call never returns does not keep the program from ending."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._idle = threading.Semaphore(0)

    def submit(self, call: Callable[[], None]) -> None:
        """Carry out `call` in an idle thread, or in a new one."""
        self._calls.put(call)
        if not self._idle.acquire(blocking=False):
            threading.Thread(target=self._serve, name="oldlogits-environment", daemon=True).start()

    def _serve(self) -> None:
        while True:
            self._calls.get()()
            self._idle.release()
