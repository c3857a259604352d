"""Seconds of a piece of work: what it keeps one thread or the accelerator busy, beside the time that passes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Seconds:
    """What a piece of work took.

    Args:
        busy_s: CPU time of the calling thread; on an accelerator the device's time between two events.
        wall_s: Time that passed.
    """

    busy_s: float
    wall_s: float

    def __add__(self, other: Seconds) -> Seconds:
        """One after the other."""
        return Seconds(busy_s=self.busy_s + other.busy_s, wall_s=self.wall_s + other.wall_s)

    def __sub__(self, other: Seconds) -> Seconds:
        """The one net of the other."""
        return Seconds(busy_s=self.busy_s - other.busy_s, wall_s=self.wall_s - other.wall_s)

    def __mul__(self, factor: float) -> Seconds:
        """So many of it."""
        return Seconds(busy_s=self.busy_s * factor, wall_s=self.wall_s * factor)


def clock_of(device: str) -> Callable[[Callable[[], object]], Seconds]:
    """The clock of a device: runs a piece of work and says what it took."""
    return _thread_clock if torch.device(device).type == "cpu" else _event_clock


def _thread_clock(work: Callable[[], object]) -> Seconds:
    wall, busy = time.perf_counter(), time.thread_time()
    work()
    return Seconds(busy_s=time.thread_time() - busy, wall_s=time.perf_counter() - wall)


def _event_clock(work: Callable[[], object]) -> Seconds:
    begin, end = torch.Event("cuda", enable_timing=True), torch.Event("cuda", enable_timing=True)
    torch.accelerator.synchronize()
    wall = time.perf_counter()
    begin.record()
    work()
    end.record()
    torch.accelerator.synchronize()
    return Seconds(busy_s=begin.elapsed_time(end) / 1000, wall_s=time.perf_counter() - wall)
