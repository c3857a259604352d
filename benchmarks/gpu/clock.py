"""Seconds of a piece of work, and of a whole run."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import torch

from oldlogits.models.device import wait_for

T = TypeVar("T")


def timed(work: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """Give the result of a piece of work and its wall time, begun and ended with an idle device."""
    wait_for(device)
    started = time.perf_counter()
    result = work()
    wait_for(device)
    return result, time.perf_counter() - started


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Give the wall time of a piece of work."""
    return timed(work, device)[1]


class Budget:
    """The seconds that are left of a time that must not be exceeded."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left_s(self) -> float:
        """Seconds that are left, at least 0."""
        return max(0.0, self._end - time.monotonic())
