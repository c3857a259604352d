"""What several threads ask for at the same time is made once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Once(Generic[K, V]):
    """Keeps the `most` values asked for last; whoever asks for one that is being made waits for it, and for no other one."""

    def __init__(self, make: Callable[[K], V], *, most: int) -> None:
        self._make, self._most = make, most
        self._lock = threading.Lock()
        self._kept: dict[K, Future[V]] = {}

    def get(self, key: K) -> V:
        """Return the value of a key, made now unless it is kept; an error is raised to all who wait, and not kept."""
        with self._lock:
            found = self._kept.pop(key, None)
            self._kept[key] = future = found or Future()
            if len(self._kept) > self._most:
                del self._kept[next(iter(self._kept))]
        if found is None:
            try:
                future.set_result(self._make(key))
            except BaseException as error:
                future.set_exception(error)
                with self._lock:
                    if self._kept.get(key) is future:
                        del self._kept[key]
        return future.result()
