"""Clocks tell the busy time of this thread from the time that passes; the machine says what it is."""

import time
from pathlib import Path

import pytest

from oldlogits.bench import machine
from oldlogits.bench.clock import Seconds, clock_of
from oldlogits.bench.machine import this_machine


def test_sleeping_passes_time_and_keeps_nothing_busy():
    asleep = clock_of("cpu")(lambda: time.sleep(0.05))
    assert asleep.wall_s >= 0.05
    assert asleep.busy_s < 0.02


def test_work_keeps_the_thread_busy():
    busy = clock_of("cpu")(lambda: sum(range(1_000_000)))
    assert 0 < busy.busy_s <= busy.wall_s + 0.01


def test_seconds_are_added_and_scaled_on_both_clocks():
    a, b = Seconds(busy_s=1, wall_s=2), Seconds(busy_s=0.5, wall_s=1)
    assert a + b == Seconds(busy_s=1.5, wall_s=3)
    assert a - b == b == a * 0.5


CPUINFO = """processor\t: 0
model name\t: A Processor
flags\t\t: fpu avx2 avx512f made_up avx512bw

processor\t: 1
model name\t: Another
flags\t\t: fpu
"""


def test_the_features_are_those_of_the_first_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "cpuinfo").write_text(CPUINFO, encoding="utf-8")
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    found = this_machine("cpu", "the kernels")
    assert (found.device, found.features, found.fast_path) == ("A Processor", ("avx2", "avx512f", "avx512bw"), "the kernels")
    assert found.num_cores >= 1
    assert "A Processor (avx2 avx512f avx512bw)" in str(found)
    assert str(found).endswith("kernels: the kernels")


def test_a_system_that_does_not_tell_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "missing")
    monkeypatch.delattr(machine.os, "getloadavg", raising=False)
    monkeypatch.delattr(machine.os, "sched_getaffinity", raising=False)
    found = this_machine("cpu", "torch")
    assert found.device
    assert (found.features, found.load) == ((), -1)
    assert "features unknown" in str(found)
    assert "load" not in str(found)
